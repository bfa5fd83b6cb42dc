"""What a person is told when something fails or the job ends: true, with the cause, and with what to do next."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.records.exits import ADVICE, Exit, of_script, what_to_do
from deadpool_megatron.observe import EVENTS, STATUS
from deadpool_megatron.observe.figures import timeline_figure
from deadpool_megatron.observe.narrative import paragraph
from deadpool_megatron.observe.recoveries import Recovery, Story
from deadpool_megatron.observe.status import JobView
from deadpool_megatron.observe.tables import grid_table
from deadpool_megatron.observe.timeline import timeline
from simulated import SimulatedJob

ROOT = Path(__file__).parents[2]


def events_of(job: SimulatedJob) -> list[dict[str, Any]]:
    """As the run directory has them, a tenth of a second apart."""
    return [{"t": 1000 + i / 10, "event": e.event, **e.fields} for i, e in enumerate(job.emitted)]


def _story(job: SimulatedJob, **started: int) -> Story:
    """As its events tell it; ``started``: of the nodes that it began with, where the story counts them."""
    story = Story()
    for event in [*([{"t": 0.0, "event": "started", **started}] if started else []), *events_of(job)]:
        story.take(event)
    return story


def told(job: SimulatedJob) -> tuple[Recovery, str]:
    """The last recovery and its paragraph."""
    story = Story()
    done = [one for one in map(story.take, events_of(job)) if one is not None]
    return done[-1], paragraph(done[-1], len(done), story)


def shown(run_dir: Path, status: dict[str, Any], events: list[dict[str, Any]] | None = None) -> str:
    """`deadpool status` of such a run, in plain text."""
    (run_dir / STATUS).write_text(json.dumps(status))
    (run_dir / EVENTS).write_text("".join(json.dumps(e) + "\n" for e in events or []))
    console = Console(width=100, no_color=True, highlight=False)
    with console.capture() as out:
        console.print(JobView(run_dir).render(console))
    return out.get()


def status_of(phase: str = "training", **more: Any) -> dict[str, Any]:
    """A job of two nodes and a spare."""
    return {
        "t": time.time(),
        "phase": phase,
        "end": None,
        "epoch": 1,
        "iteration": 7,
        "nodes": [{"node": n, "agent_pid": 1, "role": "spare" if n == 2 else "active"} for n in range(3)],
        "coordinates": [],
        "spares": [{"node": 2, "pids": [5], "state": "parked"}],
        "generation": {"committed": 7},
        "protection": {"groups": [[0, 1]], "survives_now": 1, "survives_when_full": 1, "full": True, "tolerated": "1"},
        "coordinator_pid": os.getpid(),
        "coordinator_host": os.uname().nodename,
        **more,
    }


def test_a_node_whose_loss_ends_the_job_is_lost_and_does_not_stay() -> None:
    job = SimulatedJob(nodes=2, spares=0, can_rescue=False).train()
    job.iterate(4)
    job.commit(5)
    job.lose(1)
    assert job.end[0] == Exit.NO_SPARE
    recovery, text = told(job)
    assert recovery.lost == [1] and recovery.what == "node 1 lost: its agent is gone or silent"
    assert "node 1 failed and ranks 2-3 with it" in text and "stays" not in text
    assert "could not go on: no spare is left for node 1" in text and what_to_do(Exit.NO_SPARE)[1:] in text


def test_a_picture_names_no_generation_that_there_was_not_and_an_end_at_once_has_none() -> None:
    pytest.importorskip("matplotlib")
    job = SimulatedJob(nodes=2, spares=0, can_rescue=False).train()
    job.lose(1)
    recovery, _ = told(job)
    line = timeline(recovery)
    assert not line.bars
    (axes,) = timeline_figure(line, 1).axes
    assert axes.get_title(loc="left") == "Recovery 1 (epoch 0): node 1 lost"


@pytest.mark.parametrize("state", ["silent", "busy"])
def test_a_stuck_rank_reads_as_stuck_and_not_as_killed_and_its_detection_is_counted(state: Any) -> None:
    job = SimulatedJob().train()
    job.feed(r.Stalled(0, 2, 5, 7, 30.0, state))
    job.wait(4.0)
    assert job.events("stuck")[0]["seconds"] == 30.0
    job.feed(r.WorkerExited(2, 1, 5, 77, -9))
    job.recover()
    story = _story(job)
    (recovery,) = story.recoveries
    text = paragraph(recovery, 1, story)
    assert "signal 9" not in text and "rank 5 is stuck: no progress for 30.0 s" in text
    assert "stacks-node2-1.txt" in text and "From the last progress of rank 5" in text
    assert recovery.began - recovery.first_sign == pytest.approx(30.1)
    assert timeline(recovery).zero == recovery.first_sign
    # Its next worker may be killed by anybody else.
    job.park([2])
    job.feed(r.WorkerExited(2, 1, None, 78, -9))
    assert "stuck" not in job.events("detected")[-1]["cause"]


def test_a_worker_that_raised_is_told_with_its_error_and_only_a_killed_one_with_the_kernel() -> None:
    job = SimulatedJob().train()
    job.feed(r.WorkerFailed(1, 0, 2, "training", 0, 5, 0, "builtins.ValueError", "a.py:1", "ValueError: no", "..."))
    job.feed(r.WorkerExited(1, 0, 2, 11, 1))
    job.recover()
    job.feed(r.WorkerExited(2, 0, 4, 12, -9))
    job.recover()
    story = _story(job)
    first, second = (paragraph(one, 1, story) for one in story.recoveries)
    assert "rank 2 ended (exit code 1): ValueError: no" in first and "kernel log" not in first
    assert "rank 4 ended (signal 9)" in second and "kernel log" in second


def test_a_fault_that_the_job_never_came_to_is_named_at_its_end() -> None:
    job = SimulatedJob().train()
    for node, iteration in ((1, 50), (2, 7)):
        error, actions = job.core.inject(r.Fault("kill", node, 0, iteration, 1, "", 0.0), job.now)
        assert not error
        job.take(actions)
    job.iterate(7)
    job.take(job.core.interrupted(job.now))
    (missed,) = job.events("never_struck")
    assert missed["node"] == 1 and "for iteration 50" in missed["message"] and "was 7" in missed["message"]


def test_a_spare_that_lost_a_worker_is_still_a_spare() -> None:
    job = SimulatedJob().train()
    job.feed(r.WorkerExited(3, 0, None, 77, -9))
    story = _story(job, nodes=4, spares=1)
    assert story.spares == {3} and not story.lost


def test_a_spare_that_was_drained_is_none_that_is_left() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.iterate(4)
    job.commit(5)
    _, actions = job.core.drain(4, job.now)
    job.take(actions)
    job.lose(1)
    job.recover()
    story = _story(job, nodes=5, spares=2)
    (recovery,) = story.recoveries
    assert recovery.new_nodes == [3] and recovery.spares_left == 0
    assert "no spare node left" in (text := paragraph(recovery, 1, story)) and "bring a spare node soon" in text


def test_a_healthy_node_that_gave_way_to_a_spare_is_a_spare_that_is_left_and_a_drained_one_is_none() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.iterate(4)
    job.commit(5)
    job.feed(r.WorkerExited(1, 0, 2, 77, -9))
    job.recover()
    job.park()
    job.iterate(6)
    _, actions = job.core.drain(2, job.now)
    job.take(actions)
    job.wait(60.0)
    job.recover()
    story = _story(job, nodes=5, spares=2)
    ended, drained = story.recoveries
    assert ended.new_nodes == [3] and ended.spares_left == 2
    assert "2 spare nodes left" in (text := paragraph(ended, 1, story)) and "bring a spare" not in text
    assert drained.spares_left == 1 == len([n for n in job.core.nodes.values() if n.role == "spare"])


def test_a_node_that_keeps_both_copies_itself_promises_nothing(tmp_path: Path) -> None:
    """``--alone``."""
    alone = {"groups": [], "survives_now": 0, "survives_when_full": 0, "full": False, "not_covered_yet": []}
    status = status_of(protection=alone | {"tolerated": "no node"})
    text = shown(tmp_path, status, [{"t": 1.0, "event": "committed", "epoch": 1, "iteration": 7}])
    assert "protection: none: one node has all copies (--alone)" in text
    job = SimulatedJob(nodes=1, spares=0).train()
    job.feed(r.WorkerExited(0, 0, 0, 77, -9))
    job.recover()
    story = _story(job)
    story.committed = story.recoveries[0].generation or 0
    story.committed_epoch = job.core.epoch
    assert "is committed again, all of it on one node" in paragraph(story.recoveries[0], 1, story)


def test_last_events_are_not_those_of_every_few_iterations(tmp_path: Path) -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    for iteration in range(1, 30):
        job.feed(r.SideEffect(2, 5, 0, iteration, "evaluation"))
    assert job.events("evaluation")
    shown(tmp_path, status_of(), [{"t": 1.0, "event": "straggler", "node": 1}, *events_of(job)])
    assert "straggler" in [event["event"] for event in JobView(tmp_path).last]


def test_the_status_of_a_job_that_is_over_says_how_it_ended_and_promises_nothing(tmp_path: Path) -> None:
    end = {"code": 76, "message": "no spare is left for node 1 (its agent is gone or silent)"}
    text = shown(tmp_path, status_of("ended", end=end))
    assert "exit code 76" in text and end["message"] in text and "docs/operations.md#exit-76" in text.replace("\n", "")
    assert "may be lost" not in text and "parked warm" not in text


def test_protection_is_said_in_words_that_fit(tmp_path: Path) -> None:
    lacking = {"groups": [[0, 1]], "survives_now": 0, "survives_when_full": 1, "full": False, "tolerated": "1"}
    text = shown(tmp_path, status_of(protection=lacking | {"not_covered_yet": [0, 1]}))
    assert "no node may be lost now (any 1 once nodes 0-1 have their copies back)" in text
    text = shown(tmp_path, status_of(protection=lacking | {"not_covered_yet": [1]}))
    assert "(any 1 once node 1 has its copies back)" in text
    assert "none: the job runs without --deadpool" in shown(tmp_path, status_of(deadpool=False))


def test_a_coordinator_that_was_killed_is_not_training(tmp_path: Path) -> None:
    text = shown(tmp_path, status_of(t=time.time() - 30, coordinator_pid=1 << 22))
    assert "ended without a word" in text and "training" not in text and "may be lost" not in text
    assert JobView(tmp_path).over
    # Elsewhere nobody can look for the process: only after a while.
    there = status_of(t=time.time() - 30, coordinator_pid=1 << 22, coordinator_host="another")
    text = shown(tmp_path, there)
    assert "training" in text and "does the coordinator run?" in text and not JobView(tmp_path).over
    # That of thousands of nodes is written seldom.
    text = shown(tmp_path, there | {"t": time.time() - 130, "again_s": 70.0})
    assert "does the coordinator run?" not in text and not JobView(tmp_path).over
    shown(tmp_path, there | {"t": time.time() - 25 * 3600})
    assert JobView(tmp_path).over


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, 3600.0])
def test_a_job_is_over_for_a_viewer_on_another_host_when_nothing_changes_whatever_the_clocks_say(
    ahead_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + ahead_s + now[0])

    def written(seconds: int) -> None:
        there = status_of(t=1.8e9 + now[0], coordinator_host="another")
        shown(tmp_path, there)
        os.utime(tmp_path / STATUS, (1 + seconds, 1 + seconds))

    written(0)
    view = JobView(tmp_path)
    assert ahead_s < 3600 or any("by this host's clock" in line.plain for line in view._alarms())
    for seconds in range(1, 40):  # it lives
        now[0] += 5.0
        written(seconds)
        assert not view.over and view.refresh() and not view.over and not view.overdue
    now[0] += 119.0
    assert not view.over and view.overdue
    now[0] += 2.0
    assert not view.refresh() and "has not written for 2 minutes" in view.gone


def test_a_spare_that_builds_its_model_is_not_aborted() -> None:
    cell = {"pid": 1, "local_rank": 0, "generation": 3, "pp": 0, "tp": 0, "state": "restoring", "step": "aborted"}
    coordinates = [{**cell, "rank": 0, "dp": 0, "node": 2}, {**cell, "rank": 1, "dp": 1, "node": 1}]
    console = Console(width=100, no_color=True)
    with console.capture() as out:
        console.print(grid_table(console, status_of("restoring", coordinates=coordinates), moved={0}))
    assert "building" in out.get() and "restoring" in out.get() and "aborted" not in out.get()


def test_every_code_that_a_job_ends_with_says_what_to_do_and_where_that_is_documented() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    ends = {code for code in Exit if code not in (Exit.OK, Exit.DEPOSED, Exit.NEIGHBOUR_LOST)}
    assert set(ADVICE) == ends
    for code in ends:
        place = f"docs/operations.md#exit-{code:d}"
        assert place in what_to_do(code) and f'<a id="exit-{code:d}"></a>' in page, code
    assert "exit code 5;" in what_to_do(5) and "#exit-1)" in what_to_do(5) and what_to_do(Exit.OK) == ""


def test_a_script_s_own_code_is_the_job_s_unless_it_means_something_else_here() -> None:
    """Batch scripts queue 74 to 78 again, and 126 is a coordinator that another one leads in the place of."""
    assert [of_script(code) for code in (2, 5, 16, 125)] == [2, 5, 16, 125]
    assert {of_script(code) for code in (*range(73, 81), 83, 126, 130, 143, -9)} == {Exit.FAILED}
