"""Real Megatron, unmodified, trains under the emulation in every layout that DeadPool is tested in.

These runs have no DeadPool in them: they are plain Megatron under torchrun, the reference for everything else.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flags import Schedule, tiny_gpt, world_size

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "examples" / "pretrain_gpt.py"
_LINE = re.compile(r"iteration +(\d+)/ .*?lm loss: (\S+) .*?grad norm: (\S+) ")


def train(script: Path, flags: list[str]) -> list[tuple[float, float]]:
    """Train under torchrun with the emulation; loss and gradient norm of each iteration, as Megatron prints them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command += ["--nproc-per-node", str(world_size(flags))]
    command += [sys.executable, "-m", "deadpool_megatron.emulation", str(script), *flags]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate()
    finally:
        if process.poll() is None:
            # torchrun ends its workers then, which have process groups of their own.
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
    assert process.returncode == 0, output[-6000:]
    found = [(int(i), float(loss), float(norm)) for i, loss, norm in _LINE.findall(output)]
    assert [i for i, _, _ in found] == list(range(1, len(found) + 1)), output[-6000:]
    return [(loss, norm) for _, loss, norm in found]


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float]]:
    """TP2 PP2 DP2, three iterations."""
    return train(OURS, tiny_gpt(iters=3))


def check(trained: list[tuple[float, float]]) -> None:
    assert len(trained) == 3
    assert all(math.isfinite(loss) and math.isfinite(norm) for loss, norm in trained)
    # The untrained model knows nothing: the loss is that of a guess among about 256 tokens.
    assert trained[0][0] == pytest.approx(math.log(256), abs=0.5)
    assert trained[-1][0] < trained[0][0]
    assert all(norm > 0 for _, norm in trained)


def test_a_pipeline_trains(reference: list[tuple[float, float]]) -> None:
    check(reference)


def test_the_same_run_gives_the_same_numbers_again(reference: list[tuple[float, float]]) -> None:
    # What every comparison of a swapped run with an undisturbed one rests on.
    assert train(OURS, tiny_gpt(iters=3)) == reference


@pytest.mark.parametrize(
    ("schedule", "moe"),
    [
        pytest.param("interleaved", False, id="interleaved", marks=pytest.mark.slow),
        pytest.param("none", False, id="no pipeline", marks=pytest.mark.slow),
        pytest.param("1f1b", True, id="experts"),
    ],
)
def test_other_layouts_train(schedule: Schedule, moe: bool) -> None:
    check(train(OURS, tiny_gpt(schedule, moe, iters=3)))


def test_upstreams_own_script_gives_the_numbers_of_ours(reference: list[tuple[float, float]]) -> None:
    folder = os.environ.get("DEADPOOL_UPSTREAM")
    if not folder:
        pytest.skip(
            "DEADPOOL_UPSTREAM is not set: a folder with pretrain_gpt.py, gpt_builders.py and model_provider.py of "
            "Megatron-LM core_v0.19.0, which the wheel does not carry"
        )
    assert train(Path(folder) / "pretrain_gpt.py", tiny_gpt(iters=3)) == reference
