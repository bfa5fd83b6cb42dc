"""What the GPU kit reports is what its steps have seen: a killed step's records count, a dry run's never do."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
import torch

from deadpool_bench.gpu_kit.__main__ import STEPS, main
from deadpool_bench.gpu_kit.nccl import NotPruned, prune
from deadpool_bench.gpu_kit.report import BEGIN, CLAIMS, END, NOT_RUN, NoResults, column, report
from deadpool_bench.gpu_kit.step import Step, run_step
from deadpool_bench.paths import ROOT

EVALUATION = ROOT / "docs" / "evaluation.md"


def _records(out: Path, step: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / f"step-{step}.jsonl").read_text().splitlines()]


def _as_on_a_card(path: Path) -> None:
    """Records of a step that ran here, as a GPU machine would have written them."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["dry"] = False
        if line["kind"] == "begin":
            line["machine"]["card"] = "NVIDIA H100 80GB HBM3"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- a step


def test_a_step_ends_with_one_line_and_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def code(step: Step) -> None:
        step.check("copies", True, "40 GB/s")
        step.check("soak", False, "1 not recovered")

    assert run_step(6, code, True, tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL copies: 40 GB/s; soak: 1 not recovered"
    assert [each["kind"] for each in _records(tmp_path, 6)] == ["begin", "check", "check", "verdict"]
    assert run_step(6, lambda step: step.check("copies", True, "40 GB/s"), True, tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "PASS copies: 40 GB/s"
    assert run_step(6, lambda step: None, True, tmp_path) == 1


def test_what_a_step_saw_before_its_time_was_over_or_it_broke_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_long(step: Step) -> None:
        step.check("copies", True, "40 GB/s")
        signal.setitimer(signal.ITIMER_REAL, 0.5)  # now its time is over, however long it took to come here
        step.command([sys.executable, "-c", "import time; time.sleep(600)"], {}, 600)
        time.sleep(600)

    assert run_step(1, too_long, True, tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL its 540 s are over; checked until then: copies")
    assert [each["kind"] for each in _records(tmp_path, 1)] == ["begin", "check", "verdict"]

    def broken(step: Step) -> None:
        raise ValueError("no\nsuch thing")

    assert run_step(2, broken, True, tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL ValueError: no such thing"


def test_a_command_is_read_line_by_line_and_ended_with_all_it_started(tmp_path: Path) -> None:
    step = Step(1, True, tmp_path, tmp_path, time.monotonic() + 100)
    seen: list[str] = []
    assert step.command(["sh", "-c", "echo one; echo two; exit 3"], {}, 100, seen.append) == 3
    assert seen == ["one", "two"] and "two" in (tmp_path / "step-1.log").read_text()
    mine = str(tmp_path)  # the same test may run elsewhere on this machine
    assert step.command(["sh", "-c", "(setsid sleep 600 &) ; sleep 600"], {"MINE": mine}, 0.5) is None
    left = [p for p in Path("/proc").glob("[0-9]*/environ") if _has(p, f"\0MINE={mine}\0".encode())]
    assert not left


def _has(environ: Path, word: bytes) -> bool:
    try:
        return word in b"\0" + environ.read_bytes()
    except OSError:
        return False


# ---- the report


def _three_steps(out: Path) -> None:
    """One passed, one was killed after a check, one was run dry only."""
    run_step(1, lambda step: step.check("copies", True, "40 | 44 GB/s"), True, out)
    run_step(2, lambda step: step.check("swap-pipeline", False, "losses differ at iteration 7"), True, out)
    for number in (1, 2):
        _as_on_a_card(out / f"step-{number}.jsonl")
    whole = (out / "step-2.jsonl").read_text().splitlines(keepends=True)
    (out / "step-2.jsonl").write_text("".join(whole[:-1]) + whole[-1][:20])
    run_step(6, lambda step: step.check("soak", True, "9 nodes lost"), True, out)


def test_the_page_and_the_column_have_what_was_checked_and_keep_what_was_not(tmp_path: Path) -> None:
    out, docs = tmp_path / "out", tmp_path / "docs"
    _three_steps(out)
    (docs / "measurements").mkdir(parents=True)
    shutil.copy(EVALUATION, docs)
    before = (docs / "evaluation.md").read_text()
    told = report(out, False, docs)
    (page,) = (docs / "measurements").iterdir()
    assert str(page) in told and page.name.startswith("gpu-h100-80gb-hbm3-20")
    text = page.read_text()
    assert "| 1 | passed |" in text and "| 2 | killed before its end |" in text
    assert "losses differ at iteration 7" in text and "9 nodes lost" not in text
    after = (docs / "evaluation.md").read_text()
    table = after.split(BEGIN)[1].split(END)[0]
    assert f"yes: 40 / 44 GB/s, [{page.name}](measurements/{page.name}) |" in table
    assert "**no**: losses differ at iteration 7" in table
    assert table.count(NOT_RUN) == len(CLAIMS) - 2
    assert after.replace(table, "") == before.replace(before.split(BEGIN)[1].split(END)[0], "")
    # Another day another step: what was found before stays.
    for path in out.glob("step-*"):
        path.unlink()
    run_step(6, lambda step: step.check("soak", True, "9 nodes lost"), True, out)
    _as_on_a_card(out / "step-6.jsonl")
    report(out, False, docs)
    table = (docs / "evaluation.md").read_text()
    assert "40 / 44 GB/s" in table and "yes: 9 nodes lost" in table


def test_a_dry_run_says_nothing_about_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_step(6, lambda step: step.check("soak", True, "9 nodes lost"), True, tmp_path)
    with pytest.raises(NoResults, match="no step has been run on a GPU"):
        report(tmp_path, False, tmp_path)
    assert main(["report", "--out", str(tmp_path)]) == 1
    assert "gpu_kit.sh: " in capsys.readouterr().err
    assert main(["report", "--dry", "--out", str(tmp_path)]) == 0
    assert "A dry run of the kit, without a GPU" in Path(capsys.readouterr().out.strip()).read_text()


def test_the_documented_claims_are_those_of_the_kit() -> None:
    table = EVALUATION.read_text().split(BEGIN)[1].split(END)[0]
    assert table == column({}, before=table)
    assert len(STEPS) == 6


# ---- the library that is carried


def _container(elements: dict[int, bytes]) -> bytes:
    body = b""
    for sm, code in elements.items():
        header = struct.pack("<HHIQ", 2, 0x101, 64, len(code)) + bytes(12) + struct.pack("<I", sm)
        body += header.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def _library(*containers: bytes) -> bytes:
    """An ELF file with the sections of a CUDA library, and nothing else."""
    code = b"".join(containers)
    names = b"\0.nv_fatbin\0.shstrtab\0"
    at = 64 + len(code) + len(names)
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, at, 0, 64, 0, 0, 64, 3, 2
    )
    sections = [(0, 0, 0), (1, 64, len(code)), (12, 64 + len(code), len(names))]
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, where, size, 0, 0, 0, 0) for name, where, size in sections
    )
    return head + code + names + table


def test_the_code_of_other_devices_is_taken_out_and_the_rest_stays_where_it_is(tmp_path: Path) -> None:
    both = _container({80: b"A" * 64, 90: b"B" * 32, 100: b"C" * 64})
    other = _container({100: b"D" * 16})
    source, target = tmp_path / "libnccl.so", tmp_path / "pruned.so"
    source.write_bytes(_library(both, other))
    assert "1 containers left whole" in prune(source, target, 90)
    whole, pruned = source.read_bytes(), target.read_bytes()
    assert len(pruned) == len(whole) and b"A" * 64 not in pruned and b"C" * 64 not in pruned
    only = _container({90: b"B" * 32})
    assert pruned[64 : 64 + len(both)] == only + bytes(len(both) - len(only))
    assert pruned[64 + len(both) :] == whole[64 + len(both) :] and pruned[:64] == whole[:64]
    with pytest.raises(NotPruned, match="nothing in it is for sm_70"):
        prune(source, target, 70)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_bytes(b"hello, this is text" * 9)
    assert main(["prune", str(tmp_path / "x"), str(tmp_path / "y")]) == 1
    assert "not a 64-bit ELF file" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_device_nothing_is_recorded_as_if_there_were_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "6", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out == "FAIL no CUDA device here; --dry rehearses the step without one\n"
    assert not (tmp_path / "out").exists()
