"""Thousands of simulated jobs keep their promises, and each fix that the simulation asked for is still needed.

`tests/simulation` says what runs there. A seed that fails is looked at with ``python -m simulation --seed S --trace``
(in tests/), and becomes a case here.
"""

from __future__ import annotations

import pytest

from simulation import simulate
from simulation.faults import Profile
from simulation.mutants import MUTANTS

_BATCHES, _RUNS = 16, 125

# Seeds that showed something in what the product is now, or was: kinds of faults that are drawn, and what it was.
FOUND: dict[int, tuple[tuple[str, ...], str]] = {}

# By fix that is taken back, a run that finds it missing: seed, and the kinds of faults that are drawn.
MISSED: dict[str, tuple[int, tuple[str, ...]]] = {}


@pytest.mark.parametrize("batch", range(_BATCHES))
def test_no_fault_breaks_a_promise(batch: int) -> None:
    runs = [simulate(seed) for seed in range(batch * _RUNS, (batch + 1) * _RUNS)]
    broken = {run.seed: f"{run.violation} [{run.shape}; {', '.join(run.faults)}]" for run in runs if run.violation}
    assert not broken
    assert sum(run.epochs for run in runs) > _RUNS // 3, "faults struck, and were recovered from"
    assert sum(run.code == 0 for run in runs) > _RUNS // 2, "most jobs survive them"


@pytest.mark.parametrize("fix", MISSED)
def test_a_fix_that_is_taken_back_is_missed(fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, kinds = MISSED[fix]
    profile = Profile(only=kinds)
    assert not simulate(seed, profile).violation
    MUTANTS[fix](monkeypatch)
    assert simulate(seed, profile).violation


def test_every_fix_has_a_run() -> None:
    assert MISSED.keys() == MUTANTS.keys()


def test_a_seed_is_one_run_to_the_message() -> None:
    first, again = (simulate(3, trace=True) for _ in range(2))
    assert len(first.trace) > 500 and first.trace == again.trace
    assert simulate(4, trace=True).trace != first.trace
