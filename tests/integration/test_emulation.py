"""Real Megatron, unmodified, trains under the emulation in every layout that DeadPool is tested in.

These runs have no DeadPool in them: they are plain Megatron, the reference for everything else.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from flags import Schedule, tiny_gpt, world_size
from jobs import EXAMPLE, alone

pytestmark = pytest.mark.versions(torch=True, megatron=True)

Numbers = list[tuple[str, str]]


def train(directory: Path, flags: list[str], script: Path = EXAMPLE) -> Numbers:
    """Loss and gradient norm of each of the iterations, as Megatron prints them."""
    printed = alone(directory, world_size(flags), flags, script)
    assert list(printed) == list(range(1, len(printed) + 1))
    return [(line["lm loss"], line["grad norm"]) for line in printed.values()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """TP2 PP2 DP2, three iterations."""
    return train(tmp_path_factory.mktemp("reference"), tiny_gpt(iters=3))


def check(numbers: Numbers) -> None:
    trained = [(float(loss), float(norm)) for loss, norm in numbers]
    assert len(trained) == 3
    assert all(math.isfinite(loss) and math.isfinite(norm) for loss, norm in trained)
    # The untrained model knows nothing: the loss is that of a guess among about 256 tokens.
    assert trained[0][0] == pytest.approx(math.log(256), abs=0.5)
    assert trained[-1][0] < trained[0][0]
    assert all(norm > 0 for _, norm in trained)


def test_a_pipeline_trains(reference: Numbers) -> None:
    check(reference)


def test_the_same_run_gives_the_same_numbers_again(reference: Numbers, tmp_path: Path) -> None:
    # What every comparison of a swapped run with an undisturbed one rests on.
    assert train(tmp_path, tiny_gpt(iters=3)) == reference


@pytest.mark.parametrize(
    ("schedule", "moe"),
    [
        pytest.param("interleaved", False, id="interleaved", marks=pytest.mark.slow),
        pytest.param("none", False, id="no pipeline", marks=pytest.mark.slow),
        pytest.param("1f1b", True, id="experts"),
    ],
)
def test_other_layouts_train(schedule: Schedule, moe: bool, tmp_path: Path) -> None:
    check(train(tmp_path, tiny_gpt(schedule, moe, iters=3)))


def test_upstreams_own_script_gives_the_numbers_of_ours(reference: Numbers, tmp_path: Path) -> None:
    folder = os.environ.get("DEADPOOL_UPSTREAM")
    if not folder:
        pytest.skip(
            "DEADPOOL_UPSTREAM is not set: a folder with pretrain_gpt.py, gpt_builders.py and model_provider.py of "
            "Megatron-LM core_v0.19.0, which the wheel does not carry"
        )
    assert train(tmp_path, tiny_gpt(iters=3), Path(folder) / "pretrain_gpt.py") == reference
