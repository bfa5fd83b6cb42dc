"""Who is stuck is told from who waits for it, by each run's own pace; who is slow from who does the same work."""

from __future__ import annotations

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.lookout import Pulse, StallRule
from deadpool_megatron.cluster.core.observations import StragglerJudge
from deadpool_megatron.cluster.core.suspicions import FRESH_S, SETTLE_S, StallJudge

RULE = StallRule(factor=10.0, floor=2.0, outside=60.0)


def stalled(rank: int, state: str) -> r.Stalled:
    return r.Stalled(0, rank, rank, 7, 30.0, state)  # type: ignore[arg-type]


def beating(gap: float, times: int = 20) -> tuple[Pulse, float]:
    pulse, now = Pulse(RULE), 0.0
    for mark in range(times):
        now += gap
        pulse.look(mark, True, now)
    return pulse, now


@pytest.mark.parametrize(("gap", "limit"), [(0.1, 2.0), (1.0, 10.0)])
def test_the_limit_follows_the_runs_own_pace_but_not_below_the_floor(gap: float, limit: float) -> None:
    pulse, now = beating(gap)
    assert pulse.limit() == pytest.approx(limit)
    assert pulse.look(19, True, now + limit - 0.01) < 0 < pulse.look(19, True, now + limit + 0.01)


def test_before_a_pace_is_known_and_outside_of_steps_the_long_limit_holds() -> None:
    pulse, now = beating(0.1, times=4)
    assert pulse.look(3, True, now + 50.0) < 0
    pulse, now = beating(0.1)
    pulse.look(20, False, now + 0.1)
    assert pulse.look(20, False, now + 50.0) < 0 < pulse.look(20, False, now + 61.0)


def test_a_recovery_is_no_gap() -> None:
    pulse, now = beating(0.1)
    pulse.restart(now + 100.0)
    assert pulse.look(19, False, now + 101.0) < 0


def test_the_rank_that_waits_for_nobody_is_stuck_and_named_once() -> None:
    judge = StallJudge(4)
    for rank in (0, 1, 3):
        judge.report(stalled(rank, "waiting"), 10.0)
    assert judge.due is None
    judge.report(stalled(2, "busy"), 11.0)
    assert judge.due == 11.0 + SETTLE_S
    assert judge.verdict(11.0 + SETTLE_S) == ([2], False)
    judge.report(stalled(2, "busy"), 16.0)
    assert judge.verdict(16.0) == ([], False)


def test_one_that_does_not_answer_at_all_is_judged_at_once() -> None:
    judge = StallJudge(4)
    judge.report(stalled(2, "silent"), 11.0)
    assert judge.due == 11.0 and judge.verdict(11.0) == ([2], False)


def test_when_every_rank_waits_it_is_the_communication_that_is_stuck() -> None:
    judge = StallJudge(3)
    for rank in range(3):
        judge.report(stalled(rank, "waiting"), 10.0)
    assert judge.due == 10.0 and judge.verdict(10.0) == ([], True)


def test_when_most_ranks_look_busy_nobody_is_blamed() -> None:
    # On a device, waiting for a collective's kernel looks like work of one's own.
    judge = StallJudge(4)
    for rank in range(4):
        judge.report(stalled(rank, "busy"), 10.0)
    assert judge.verdict(10.0 + SETTLE_S) == ([], True)


@pytest.mark.parametrize("silent", [(2,), (2, 3)])
def test_what_does_not_answer_is_named_also_where_all_others_look_busy_as_on_a_device(silent: tuple[int, ...]) -> None:
    """One rank, or all of a node; the busy ones told of themselves first, since nobody had to wait for their answer."""
    judge = StallJudge(6)
    for rank in {*range(6)} - {*silent}:
        judge.report(stalled(rank, "busy"), 10.0)
    named = []
    for rank in silent:
        judge.report(stalled(rank, "silent"), 12.0)
        ranks, communication = judge.verdict(12.0)
        assert not communication
        named += ranks
    assert named == list(silent)


def test_when_most_ranks_do_not_answer_nobody_is_blamed() -> None:
    judge = StallJudge(4)
    for rank in range(2):
        judge.report(stalled(rank, "silent"), 10.0)
        judge.verdict(10.0)
    judge.report(stalled(2, "silent"), 10.0)
    assert judge.verdict(10.0) == ([], True)


def test_old_reports_count_for_nothing() -> None:
    judge = StallJudge(2)
    judge.report(stalled(0, "waiting"), 10.0)
    judge.report(stalled(1, "waiting"), 10.0 + FRESH_S + 1)
    assert judge.due is None


@pytest.mark.parametrize("every", [2.0, 16.0])
def test_a_straggler_is_named_against_its_own_stage_when_it_has_lasted(every: float) -> None:
    judge, stages = StragglerJudge(factor=1.5, lasting_s=every * 2), {0: 0, 1: 0, 2: 1, 3: 1}
    named = []
    for i in range(5):
        for rank, seconds in ((0, 0.1), (1, 0.3), (2, 0.9), (3, 0.9)):
            named.append((i, rank, judge.report(rank, {rank: seconds}, stages, now=i * every)))
    assert [(i, rank, round(x, 1)) for i, rank, x in named if x] == [(2, 1, 3.0)]


def test_a_short_hiccup_is_no_straggler() -> None:
    judge, stages = StragglerJudge(factor=1.5, lasting_s=4.0), {0: 0, 1: 0}
    judge.report(0, {0: 0.1}, stages, now=0.0)
    for i, seconds in enumerate((0.3, 0.3, 0.1, 0.3, 0.3, 0.1)):
        assert judge.report(1, {1: seconds}, stages, now=2.0 * i) is None
