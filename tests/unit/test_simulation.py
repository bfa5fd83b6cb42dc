"""The simulated goodput is what can be worked out by hand, and every input is shown with its source."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from deadpool_bench.validation import Disturbed, _account, _costs, predicted
from deadpool_megatron import cli
from deadpool_megatron.simulate.command import _INPUTS, _measured, read_trace
from deadpool_megatron.simulate.goodput import Cluster, Costs, best_interval, poisson, simulate

NEVER = iter(())
WEEK = 7 * 86400.0


def test_without_failures_goodput_is_what_spares_and_overhead_leave() -> None:
    cluster = Cluster(nodes=90, spares=10, iteration_s=10.0, repair_s=3600.0)
    out = simulate("deadpool", cluster, Costs(overhead=0.25), iter(()), WEEK)
    assert out.goodput == pytest.approx(0.9 / 1.25) and out.failures == 0


def test_the_overhead_that_is_called_measured_is_what_the_measurement_says() -> None:
    where = "docs/measurements/recovery"
    (default,) = (each for each in _INPUTS if each[0] == "overhead")
    measured, _ = _measured(Path(__file__).parents[2] / f"{where}.json")["overhead"]
    assert default[1] == round(measured, 2) and where in default[4]


def test_one_failure_costs_deadpool_its_recovery_and_the_iteration_begun() -> None:
    cluster = Cluster(nodes=4, spares=0, iteration_s=10.0, repair_s=1e9)
    late = simulate("deadpool", Cluster(4, 1, 10.0, 1e9), Costs(recovery_s=30.0), iter([107.0]), 1000.0)
    assert late.useful_s == pytest.approx(1000 - 30 - 7), "past the commit: only the iteration begun"
    early = simulate("deadpool", Cluster(4, 1, 10.0, 1e9), Costs(recovery_s=30.0), iter([103.0]), 1000.0)
    assert early.useful_s == pytest.approx(1000 - 30 - 3 - 10), "before the commit: the one before it, too"
    starved = simulate("deadpool", cluster, Costs(recovery_s=30.0), iter([107.0]), 1000.0)
    assert starved.starved == 1 and starved.useful_s == pytest.approx(100)


def test_one_failure_costs_a_restart_everything_since_the_last_checkpoint() -> None:
    costs = Costs(restart_s=50.0, interval_s=90.0, save_s=10.0)
    out = simulate("checkpoint", Cluster(4, 1, 1.0, 1e9), costs, iter([250.0]), 1000.0)
    assert out.useful_s == pytest.approx((1000 - 50 - 50) * 0.9)


def test_without_a_spare_a_replica_is_missing_until_the_repair() -> None:
    cluster, costs = Cluster(8, 0, 1.0, 200.0, replica_nodes=2), Costs(commit_share=0, shrink_s=20.0, growth_s=10.0)
    out = simulate("shrink", cluster, costs, iter([100.0]), 1000.0)
    assert out.useful_s == pytest.approx(1000 - 20 - 180 / 4 - 10) and out.narrow_s == pytest.approx(180)
    assert out.down_s == pytest.approx(30) and out.starved == 1


def test_spares_come_first_and_the_healthy_nodes_of_a_replica_that_has_left_are_spares() -> None:
    cluster, costs = Cluster(8, 1, 1.0, 1e9, replica_nodes=4), Costs(commit_share=0, recovery_s=1.0, shrink_s=20.0)
    for losses, down, share in ((1, 1, 1.0), (2, 21, 0.5), (3, 22, 0.5), (5, 24, 0.5)):
        out = simulate("shrink", cluster, costs, iter([100.0] * losses), 1000.0)
        assert out.down_s == pytest.approx(down), losses
        narrow_s = 1000 - 200 - 20 - 1.0 * (losses - 2) if losses > 1 else 0.0
        assert out.useful_s == pytest.approx(1000 - down - (1 - share) * narrow_s, abs=1.0)
    out = simulate("shrink", cluster, costs, iter([100.0] * 6), 1000.0)
    assert out.down_s == pytest.approx(24 + 400), "no replica is left: as without shrinking"


def test_a_job_takes_as_many_replicas_back_as_the_repaired_nodes_make_up() -> None:
    cluster, costs = Cluster(8, 0, 1.0, 1e9, replica_nodes=2), Costs(commit_share=0, growth_s=5.0)
    out = simulate("shrink", cluster, costs, iter([100.0, 0.0, 0.0]), 1000.0, iter([200.0, 300.0, 500.0]))
    assert out.useful_s == pytest.approx(100 + 200 / 2 + (300 - 5) * 0.75 + (400 - 5)) and out.down_s == 10


def test_shrinking_is_worth_what_a_job_without_a_spare_would_wait() -> None:
    cluster, costs = Cluster(512, 2, 11.0, 24 * 3600.0, 8), Costs(recovery_s=40.0, shrink_s=150.0, restart_s=150.0)
    waits, shrinks = (
        simulate(strategy, cluster, costs, poisson(0.0065, 514, random.Random(1)), 90 * 86400.0)  # type: ignore[arg-type]
        for strategy in ("deadpool", "shrink")
    )
    assert waits.failures == shrinks.failures and waits.starved > 10 and shrinks.narrow_s > 0
    assert shrinks.goodput > 1.05 * waits.goodput


def test_a_failure_during_a_recovery_begins_it_anew_and_takes_another_spare() -> None:
    costs = Costs(recovery_s=30.0)
    twice = simulate("deadpool", Cluster(4, 2, 10.0, 1e9), costs, iter([107.0, 20.0]), 1000.0)
    assert twice.failures == 2 and twice.down_s == pytest.approx(50.0) and twice.starved == 0
    assert simulate("deadpool", Cluster(4, 1, 10.0, 1e9), costs, iter([107.0, 20.0]), 1000.0).starved == 1


def test_a_repaired_node_is_a_spare_again() -> None:
    out = simulate("deadpool", Cluster(4, 1, 10.0, 50.0), Costs(), iter([100.0, 100.0, 100.0]), 1000.0)
    assert out.failures == 3 and out.starved == 0


def test_youngs_interval_is_the_best_of_those_near_it() -> None:
    rate, costs = 1 / 3600.0, Costs(restart_s=60.0, save_s=20.0)
    best = best_interval(costs, rate)
    assert best.interval_s == pytest.approx(math.sqrt(2 * 20 * 3600))

    def goodput(interval: float) -> float:
        gaps = poisson(rate * 86400 / 100, 100, random.Random(1))
        return simulate("checkpoint", Cluster(100, 10**6, 1.0, 1.0), Costs(restart_s=60.0, save_s=20.0,
                        interval_s=interval), gaps, 3e7).useful_s  # fmt: skip

    assert goodput(best.interval_s) > max(goodput(best.interval_s / 3), goodput(best.interval_s * 3))


def test_failures_come_at_the_rate_asked_for() -> None:
    gaps = poisson(0.0065, 1000, random.Random(0))
    mean = sum(next(gaps) for _ in range(4000)) / 4000
    assert mean == pytest.approx(86400 / 6.5, rel=0.05)


def test_a_trace_is_read_in_hours_and_a_bad_line_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("# hours, node\n2.0, n7\n0.5\n")
    assert read_trace(trace) == [1800.0, 7200.0]
    trace.write_text("1.0\nsoon\n")
    with pytest.raises(ValueError, match="line 2: 'soon' is not a number of hours"):
        read_trace(trace)
    for text in ("1.0\nnan\n", "inf", "0\n0\n", "-1"):  # of which the simulation would not end
        trace.write_text(text)
        with pytest.raises(ValueError, match="expected failure times of 0 to 1e"):
            read_trace(trace)


def test_a_trace_that_is_taken_as_it_is_has_as_many_failures_a_day_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("6\n12\n24\n")
    for more, expected in (([], [3.0, 3.0]), (["--trace-nodes", "64"], [3.0, 6.0])):
        words = ["--trace", str(tmp_path / "trace.csv"), "--gpus", "512", "1024", "--days", "30", *more]
        assert _run(*words, "--out", str(tmp_path / "out.json")) == 0
        results = json.loads((tmp_path / "out.json").read_text())["results"]
        assert [one["failures_a_day"] for one in results] == pytest.approx(expected)


def _run(*options: str) -> int:
    try:
        return cli.main(["simulate", "--runs", "2", *options])
    except SystemExit as end:
        return int(end.code or 0)


def test_every_input_has_a_source_and_a_flag_replaces_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert _run("--gpus", "512", "16384", "--recovery", "3", "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    inputs = {i["meaning"]: i for i in json.loads(out.read_text())["inputs"]}
    assert inputs["DeadPool: failure to training again"] == {
        "meaning": "DeadPool: failure to training again", "value": "3 s", "source": "--recovery",
    }  # fmt: skip
    assert all(i["source"] for i in inputs.values()) and len(inputs) > 10
    small, large = json.loads(out.read_text())["results"]
    assert large["shrink"]["goodput"] > large["deadpool"]["goodput"] > large["checkpoint"]["goodput"]
    assert large["failures_a_day"] == pytest.approx(32 * small["failures_a_day"])


def test_measured_figures_come_from_the_bench_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = Path(__file__).parents[2] / "docs" / "measurements" / "recovery.json"
    assert _run("--gpus", "1024", "--measured", str(measured), "--picture", str(tmp_path / "p.png")) == 0
    assert f"measured: {measured}, median of 10" in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 10000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--iteration", "0"], "--iteration 0: must be more than 0"),
        (["--trace", "nowhere.csv"], "--trace nowhere.csv"),
        (["--measured", "nowhere.json"], "--measured nowhere.json"),
        (["--recovery", "-1"], "--recovery: must be 0 to 1e+09, not -1"),
        (["--commit-share", "2"], "--commit-share 2: must be 0 or more, at most 1"),
        (["--failures-per-1000-node-days", "-1"], "--failures-per-1000-node-days: must be"),
        (["--failures-per-1000-node-days", "1e9"], "failures are too many to simulate"),
        (["--spares", "-100"], "--spares: must be 0 to 1000000000, not -100"),
        (["--spares", "1000000000"], "failures are too many to simulate"),
        (["--days", "nan"], "--days: must be a number, not 'nan'"),
        (["--runs", "0"], "--runs: must be 1 to"),
        (["--trace-nodes", "0"], "--trace-nodes: must be"),
        (["--out", "no/such/directory/a.json"], "--out no/such/directory/a.json: there is no directory"),
        (["--out", "/"], "--out /: "),
        (["--picture", "p.foo"], "--picture p.foo: must end in .png, .svg, .pdf"),
    ],
)
def test_a_bad_input_is_one_clear_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--gpus", "512", *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err


def _iterations(epoch: int, first: int, ends: list[float], seconds: float, replicas: int) -> list[dict[str, Any]]:
    return [
        {"event": "iteration", "epoch": epoch, "iteration": first + i, "t": t, "seconds": seconds, "replicas": replicas}
        for i, t in enumerate(ends)
    ]


def test_a_disturbed_job_is_accounted_for_and_predicted_by_the_model() -> None:
    """Iterations of one second; a fault at 5.7 (in iteration 5), back with iteration 5 complete at 9.0."""
    back = _iterations(1, 5, [9.0, 10.0, 11.0, 12.0], 1.0, 2)
    back[0]["seconds"] = 3.0
    before = [*_iterations(0, 0, [1.0, 2.0, 3.0, 4.0, 5.0], 1.0, 2), {"event": "declared", "t": 5.8, "width": 2}]
    job = _account([*before, *back], [5.7], 1.0, 2, 1, [])
    costs = {"recovery": [pytest.approx(2.3)], "shrink": [], "growth": []}
    assert job == Disturbed(Cluster(2, 1, 1.0, 1e9, 1), [pytest.approx(4.7)], 11.0, 8, costs)  # type: ignore[list-item,arg-type]
    assert job.goodput == pytest.approx(8 / 11)
    assert predicted(job, Costs(recovery_s=2.3)) == pytest.approx(8 / 11, rel=0.01)
    assert predicted(job, Costs(recovery_s=6.0)) < 0.9 * job.goodput, "a wrong recovery time shows"


def test_a_job_that_shrinks_and_grows_back_is_accounted_for_and_predicted_by_the_model() -> None:
    """A fault at 5.7 and iteration 5 complete at 9.0, of two seconds from then on; a node is there at 14.0, and the job
    goes on from iteration 8 again, complete at 18.0."""
    events = [
        *_iterations(0, 0, [1.0, 2.0, 3.0, 4.0, 5.0], 1.0, 2),
        {"event": "shrunk", "epoch": 2, "t": 6.5, "width": 1, "was": 2},
        *_iterations(2, 5, [9.0, 11.0, 13.0, 15.0], 2.0, 1),
        {"event": "grown", "epoch": 3, "t": 15.5, "width": 2, "was": 1},
        *_iterations(3, 8, [18.0, 19.0, 20.0], 1.0, 2),
    ]
    job = _account(events, [5.7], 1.0, 2, 0, [8.3])
    costs = {"recovery": [], "shrink": [pytest.approx(1.3)], "growth": [pytest.approx(4.0)]}
    assert job.costs_s == costs and job.kept == 10 and job.wall_s == 19.0
    assert predicted(job, Costs(shrink_s=1.3, growth_s=4.0), "shrink") == pytest.approx(10 / 19, abs=0.03)
    other = Disturbed(job.cluster, [], 1.0, 1, {"recovery": [1.0], "shrink": [2.0, 4.0], "growth": [5.0]})
    assert _costs(job, [other]) == Costs(recovery_s=1.0, shrink_s=3.0, growth_s=5.0)
    with pytest.raises(ValueError, match="a recovery in one job and none in the others"):
        _costs(other, [job])
