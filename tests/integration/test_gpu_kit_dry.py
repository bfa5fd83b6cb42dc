"""The GPU kit cannot rot: each step runs dry in a replica of the machine it is for, with no network but loopback."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from deadpool_bench.gpu_kit.__main__ import STEPS
from deadpool_bench.gpu_kit.report import CLAIMS
from jobs import ROOT

pytestmark = pytest.mark.slow
KIT = ROOT / "scripts" / "gpu_kit.sh"
# What a dry run cannot check: copies need a device, IPC needs a newer NCCL on it.
ON_A_DEVICE = {"copies", "abort-ipc", "replaced-ipc", "connected-ipc", "latency-ipc"}


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(KIT), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kit")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", sorted(STEPS))
def test_each_step_runs_without_a_gpu(out: Path, number: int) -> None:
    done = _run("rehearse", str(number), "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("PASS ")
    records = [json.loads(line) for line in (out / f"step-{number}.jsonl").read_text().splitlines()]
    assert records[0]["machine"]["torch"].startswith("2.11.") and all(each["dry"] for each in records)


def test_what_the_steps_check_is_what_the_report_tells_of(out: Path) -> None:
    if len(list(out.glob("step-*.jsonl"))) < len(STEPS):
        pytest.skip("not all steps were run before")
    lines = [json.loads(line) for path in out.glob("step-*.jsonl") for line in path.read_text().splitlines()]
    assert {each["name"] for each in lines if each["kind"] == "check"} == set(CLAIMS) - ON_A_DEVICE
    done = _run("report", "--dry", "--out", str(out))
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip()).read_text()
    assert all(f"| {number} | passed |" in page for number in STEPS)


def test_a_machine_without_what_was_prepared_says_so(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("gpu_kit.sh", "_env.sh"):
        (tmp_path / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (tmp_path / "scripts" / "gpu_kit.sh").chmod(0o755)
    done = subprocess.run(
        [tmp_path / "scripts" / "gpu_kit.sh", "run", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("run 'scripts/gpu_kit.sh prepare' where PyPI is, and bring it")
