"""The promise: what snapshots cost is told as it was, with an interval that says how sure it is."""

from __future__ import annotations

import random

import pytest

from deadpool_bench.ratio import compare, spread
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.observations import SnapshotAccount
from deadpool_megatron.observe.status import snapshot_lines


def iteration(number: int, seconds: float) -> r.Iteration:
    return r.Iteration(0, 0, 0, number, {}, None, seconds, 0.001, 100, 0)


def test_time_to_commit_counts_from_the_opening_whichever_is_heard_of_first() -> None:
    account = SnapshotAccount()
    assert account.committed(5, 10.4) is None  # within the iteration, of which nothing is known yet
    assert account.iterated(iteration(5, 1.0), 11.0) == pytest.approx(0.4)
    assert account.iterated(iteration(6, 1.0), 12.0) is None
    assert account.committed(6, 12.2) == pytest.approx(1.2)  # in the iteration after
    summary = account.summary()
    sized = {**summary, "planned_bytes": 1_000_000, "expected_bytes": 999_000}
    (planned,) = snapshot_lines({**sized, "copied_bytes": None})
    assert planned == "snapshots: 1 MB a generation over all coordinates (+0.10 % of the arithmetic)"
    lines = snapshot_lines(sized)
    assert "committed after 0.80 of an iteration, so a loss costs 1.30 iterations" in lines[1]
    assert snapshot_lines(SnapshotAccount().summary()) == []
    assert summary["commit_share"] == pytest.approx(0.8)
    assert summary["expected_lost_iterations"] == pytest.approx(0.5 + 0.8)


def test_a_longer_interval_costs_half_of_it_on_average() -> None:
    account = SnapshotAccount()
    for generation in (4, 8, 12):
        account.committed(generation, float(generation) + 0.25)
        account.iterated(iteration(generation, 1.0), float(generation) + 1.0)
    assert account.summary()["expected_lost_iterations"] == pytest.approx(2.0 + 0.25)


def test_the_interval_covers_the_truth_and_a_drift_of_the_machine_does_not_fool_it() -> None:
    rng = random.Random(1)
    truth, covered = 1.002, 0
    for _ in range(20):
        pairs = []
        for block in range(20):
            drift = 1.0 + 0.02 * block
            on = [truth * drift * rng.gauss(0.1, 0.001) for _ in range(20)]
            pairs.append((on, [drift * rng.gauss(0.1, 0.001) for _ in range(20)]))
        c = compare(pairs, resamples=2000)
        assert c.low < c.ratio < c.high and c.high - c.low < 0.005
        covered += c.low <= truth <= c.high
    assert covered >= 16


def test_every_iteration_counts() -> None:
    assert spread([1.0] * 99 + [101.0]).mean == pytest.approx(2.0)
    assert spread([1.0] * 98 + [5.0, 101.0]).p99 == 101.0
    with pytest.raises(ValueError, match="too few"):
        compare([([1.0], [1.0])])
