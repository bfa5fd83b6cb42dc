"""Protection that falls behind is told, with its reason, and no more than a person can read."""

from __future__ import annotations

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.observations import LagJudge
from simulated import SimulatedJob


def test_a_few_generations_under_way_or_a_few_seconds_are_no_lag() -> None:
    judge = LagJudge(1)
    assert not judge.committed(0.0)
    assert not judge.iterated(5, str, 1000.0), "they are under way"
    assert not judge.iterated(50, str, 9.0), "it costs nine seconds"
    assert judge.lag is None
    assert judge.iterated(6, lambda: "node 1", 11.0)
    assert judge.lag is not None and judge.lag.cause == "node 1"


def test_a_lag_is_told_each_time_it_has_doubled_and_once_when_it_is_over() -> None:
    judge = LagJudge(10)
    judge.committed(0.0)
    told = [n for n in range(1, 500) if judge.iterated(n, str, 20.0 * n)]
    assert told == [33, 66, 132, 264]
    assert judge.committed(10_000.0) and judge.lag is None and not judge.committed(10_001.0)


def test_a_job_whose_commits_have_stopped_says_since_when_and_because_of_whom() -> None:
    job = SimulatedJob().train()
    job.commit(0)
    for iteration in range(14):
        job.wait(5)
        job.iterate(iteration)
        job.feed(r.Committed(0, 0, iteration + 1))
        job.feed(r.Committed(0, 2, iteration + 1))
    first, second = job.events("behind")
    assert first["committed"] == 0 and first["cause"].startswith("node 1 has not stored a newer generation")
    assert second["iteration"] >= 2 * first["iteration"]
    lag = job.core.seen.lag
    assert lag is not None and lag.iterations == 13
    for generation in range(1, 15):
        job.feed(r.Committed(0, 1, generation))
    assert job.core.committed == 14 and job.core.seen.lag is None and len(job.events("caught_up")) == 1
