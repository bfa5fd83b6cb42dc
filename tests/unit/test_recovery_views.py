"""After a recovery people and tools are told the same story: paragraph, picture, trace, page, node log and metrics."""

from __future__ import annotations

import itertools
import json
import math
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deadpool_megatron import cli
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.watch import Watch
from deadpool_megatron.observe import EVENTS, LOGS, STATUS, NodeLog, RunDirectory, read_events
from deadpool_megatron.observe.narrative import paragraph
from deadpool_megatron.observe.recoveries import Story, recoveries
from deadpool_megatron.observe.rundir import RECOVERIES, read_node_logs
from deadpool_megatron.observe.timeline import deaths, timeline
from deadpool_megatron.observe.trace import chrome_trace
from machines import free_port
from test_screen import status_of

STEPS = {"aborted": 12.2, "prepared": 12.6, "reformed": 12.95, "restored": 13.05, "resumed": 13.15}


def _iteration(t: float, number: int, epoch: int = 0) -> dict[str, Any]:
    said = {"losses": {"lm loss": 5.0}, "seconds": 0.5, "blocked_s": 0.001}
    return {"t": t, "event": "iteration", "epoch": epoch, "iteration": number, "node": 1, **said}


def story_of_a_run(spares: int = 2, generation: int = 2, redone: float = 14.0) -> list[dict[str, Any]]:
    """Node 0 of two active ones dies at 12.0 in iteration 3; node 2 takes over."""

    def event(name: str, t: float, **fields: Any) -> dict[str, Any]:
        return {"t": t, "event": name, "epoch": 1, **fields}

    return [
        event("started", 10.0, nodes=2 + spares, spares=spares, world_size=2),
        *(_iteration(10.5 + 0.5 * i, i) for i in range(3)),
        event("detected", 12.0, node=0, cause="its agent is gone or silent", ranks=[0]),
        event("declared", 12.1, lost=[0], replaced=[0], nodes=[1, 2], reason="gone", purpose="resume"),
        *(event("step", t, node=n, step=s) for s, t in STEPS.items() for n in (1, 2)),
        event("aborted", 12.3),
        event("agreed", 12.3, iteration=generation, sources={"0": 1}),
        event("prepared", 12.9),
        event("reformed", 13.0, groups=24),
        event("restored", 13.1),
        event("resumed", 13.2, iteration=generation),
        event("committed", 13.5, iteration=generation),
        _iteration(redone, generation, 1),
    ]


def _paragraph(events: list[dict[str, Any]]) -> str:
    story = Story()
    done = [x for x in map(story.take, events) if x is not None]
    return paragraph(done[-1], len(done), story)


def test_a_start_that_began_anew_is_over_and_says_so() -> None:
    events: list[dict[str, Any]] = [
        {"t": 10.0, "event": "started", "epoch": 0, "nodes": 3, "spares": 1, "world_size": 2},
        {"t": 12.0, "event": "detected", "epoch": 0, "node": 0, "cause": "its agent is gone or silent", "ranks": [0]},
        {"t": 12.1, "event": "started_over", "epoch": 1, "lost": [0], "nodes": [1, 2], "reason": "gone"}
        | {"message": "node 0 was lost before the first generation was committed: the job begins anew on nodes 2, 1"},
    ]
    story = Story()
    (done,) = [each for each in map(story.take, events) if each is not None]
    assert done.end == "started_over" and story.under_way is None and story.spares == set()
    text = paragraph(done, 1, story)
    assert "node 0 failed" in text and "begins anew on nodes 2, 1" in text and "What to do: look at node 0" in text


def test_the_paragraph_says_what_failed_how_it_was_seen_what_was_lost_who_took_over_and_what_to_do() -> None:
    text = _paragraph(story_of_a_run())
    for said in (
        "Recovery 1",
        "in iteration 3",
        "node 0 failed and rank 0 with it",
        "its agent is gone or silent",
        "Node 2, until then spare, took over rank 0, with the shards out of the vault of node 1",
        "from the start of iteration 2; 1 completed iteration had to be done again",
        "it took 2.00 s, 1.50 s more than the iteration takes anyway",
        "600 ms building the spare's model",
        "generation 2 is committed again",
        "1 spare node left",
        "look at node 0",
    ):
        assert said in text, said
    assert "bring a spare" not in text


def test_the_paragraph_asks_for_a_spare_when_none_is_left_and_says_when_shards_are_not_safe_yet() -> None:
    events = [e for e in story_of_a_run(spares=1, generation=3) if e["event"] != "committed"]
    text = _paragraph(events)
    assert "no spare node left" in text and "bring a spare node soon" in text
    assert "no completed one is lost" in text
    assert "until the next generation is committed, the loss of another node may lose shards" in text


def test_a_job_that_goes_on_with_fewer_replicas_says_so_and_what_the_next_loss_costs() -> None:
    of = {"width": 1, "was": 2, "iteration": 2, "nodes": [1], "spares": []}
    shrunk = {"t": 13.2, "event": "shrunk", "epoch": 2, **of}
    text = _paragraph([*story_of_a_run(spares=0)[:6], shrunk, _iteration(20.0, 2, 2)])
    assert "the job began anew with 1 of 2 data-parallel replicas" in text
    assert "1 completed iteration had to be done again. " in text and "bit for bit" not in text
    assert "the replica comes back; the next loss costs another one" in text


def test_a_replica_that_comes_back_has_taken_the_spares_that_it_needs() -> None:
    story = Story()
    of = {"width": 2, "was": 1, "iteration": 4, "nodes": [1, 2], "spares": [3]}
    for event in [*story_of_a_run(spares=0)[:6], {"t": 15.0, "event": "grown", "epoch": 3, **of}]:
        story.take(event)
    assert (story.active, story.spares) == ([1, 2], {3})


def test_a_job_that_could_not_go_on_says_so_in_its_paragraph() -> None:
    stopped = {"t": 12.5, "event": "stopped", "epoch": 1, "code": 77, "message": "more nodes were lost than ..."}
    text = _paragraph([*story_of_a_run()[:6], stopped])
    assert "could not go on: more nodes were lost" in text


def test_the_paragraph_is_written_once_for_each_recovery_even_if_the_next_loss_comes_before_an_iteration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    for e in story_of_a_run()[:-2]:
        run.event(**{k: v for k, v in e.items() if k != "t"})
    assert not (tmp_path / RECOVERIES).exists(), "the first iteration is not complete yet"
    run.event("detected", epoch=1, node=1, cause="gone", ranks=[1])
    text = (tmp_path / RECOVERIES).read_text()
    assert text.count("Recovery 1,") == 1 and max(map(len, text.splitlines())) <= 80
    assert "Recovery 1," in capsys.readouterr().err


def test_events_of_other_releases_do_not_disturb_the_story() -> None:
    odd = [{"t": 11.9, "event": name, "epoch": 0, "node": 1} for name in ("straggler", "draining", "hang", "new")]
    events = story_of_a_run()
    (got,) = recoveries([*events[:4], *odd, *events[4:]])
    (want,) = recoveries(events)
    assert got == want


def test_a_worker_replaced_in_its_slot_does_not_count_its_node_as_lost() -> None:
    story = Story()
    for e in story_of_a_run():
        story.take({**e, "rank": 0} if e["event"] == "detected" else e)
    assert story.lost == set()


def test_the_paragraph_says_when_who_took_over_had_stood_by_also_for_one_that_ended_a_moment_later() -> None:
    events = story_of_a_run()
    at = next(i for i, e in enumerate(events) if e["event"] == "declared")
    events[at - 1] |= {"rank": 0, "local": 0, "stood_by": True}
    events[at] |= {"lost": [], "nodes": [0, 1]}
    later = {**events[at - 1], "t": 12.15, "node": 1, "rank": 1, "ranks": [1]}
    text = _paragraph([*events[: at + 1], later, *events[at + 1 :]])
    assert "Processes that stood by in their own slots took over ranks 0-1" in text
    assert "Other slots took over rank 0" in _paragraph(
        [*events[: at - 1], {**events[at - 1], "stood_by": False}, *events[at:]]
    )


def test_every_node_has_its_bars_and_detection_begins_at_the_strike(tmp_path: Path) -> None:
    (tmp_path / LOGS).mkdir()
    (tmp_path / LOGS / "rank-0.log").write_text("x\ndeadpool: fault kill strikes node 0 at 11.75\n")
    events = story_of_a_run()
    (one,) = recoveries(events)
    line = timeline(one, deaths(tmp_path, events))
    assert line.exact and line.zero == 11.75
    bars = {(b.row, b.act): (round(b.start, 3), round(b.end, 3)) for b in line.bars}
    assert bars["job", "detect"] == (0.0, 0.25) == bars["node 0 (lost)", "detect"]
    assert bars["node 1", "abort"] == (0.35, 0.45)
    assert bars["node 1", "re-form"] == (1.15, 1.2)
    assert bars["node 2 (spare)", "gather"] == (1.2, 1.3)
    assert bars["job", "redo"] == (1.45, 2.25)
    assert {b.row for b in line.bars} == {"job", "node 0 (lost)", "node 1", "node 2 (spare)"}
    assert all(b.end > b.start >= 0 for b in line.bars)


def test_without_an_injected_fault_detection_begins_at_the_last_sign_of_life(tmp_path: Path) -> None:
    (tmp_path / LOGS).mkdir()
    log = NodeLog(tmp_path / LOGS, 0)
    log.write("shard", t=11.0)
    (one,) = recoveries(story_of_a_run())
    line = timeline(one, deaths(tmp_path, []))
    assert not line.exact and line.zero == 11.0


def _shard(node: int, rank: int, generation: int, t: float) -> dict[str, Any]:
    times = {"opened": t, "copied": t + 0.1, "stored": t + 0.2}
    return {"t": t, "event": "shard", "node": node, "rank": rank, "epoch": 0, "generation": generation, **times}


def test_the_trace_has_iterations_snapshots_sends_and_commits_and_nests_as_the_format_wants() -> None:
    events = story_of_a_run()
    trace = chrome_trace(events, [_shard(1, 1, g, 10.1 + 0.5 * g) for g in range(3)])
    entries = trace["traceEvents"]
    names = [e["name"] for e in entries]
    assert "iteration 1" in names and "snapshot generation 2" in names and "send generation 2" in names
    assert "generation 2 committed" in names and "re-form" in names
    assert all(e["ts"] >= 0 for e in entries if e["ph"] != "M")
    opened: dict[tuple[Any, ...], float] = {}
    for e in entries:
        if e["ph"] == "b":
            opened[e["pid"], e["tid"], e["id"]] = e["ts"]
        elif e["ph"] == "e":
            assert e["ts"] >= opened.pop((e["pid"], e["tid"], e["id"]))
    assert not opened, "every begun span ends"
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for e in entries:
        if e["ph"] == "X":
            tracks.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    for spans in tracks.values():
        spans.sort()
        assert all(a[1] <= b[0] + 0.2 for a, b in itertools.pairwise(spans)), "no overlap within a track"
    json.dumps(trace)


def test_an_event_may_have_any_field(tmp_path: Path) -> None:
    odd = {"t": 11.0, "event": "durable", "name": "generation-1", "pid": 3, "tid": 4, "iteration": 1}
    entries = chrome_trace([*story_of_a_run(), odd], [])["traceEvents"]
    (one,) = [e for e in entries if e["name"] == "durable"]
    assert one["args"]["name"] == "generation-1" and one["args"]["pid"] == 3


def _run(tmp_path: Path) -> Path:
    run = RunDirectory(tmp_path / "run")
    run.status({"t": 14.0, "phase": "ended", "epoch": 1, "iteration": 2, "nodes": [], "coordinates": [], "spares": [],
                "generation": {"committed": 2}})  # fmt: skip
    run.close()
    (tmp_path / "run" / EVENTS).write_text("".join(json.dumps(e) + "\n" for e in story_of_a_run()))
    shard = {k: v for k, v in _shard(1, 1, 1, 11.0).items() if k != "node"}
    NodeLog(tmp_path / "run" / LOGS, 1).write(**shard, bytes=9)
    return tmp_path / "run"


def test_timeline_and_report_write_pictures_and_pages_that_need_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run = _run(tmp_path)
    assert cli.main(["timeline", "--run-dir", str(run)]) == 0
    assert cli.main(["report", "--run-dir", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    png = (run / "timeline" / "recovery-1.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert 900 < width < 1200 and height < width, "page width at 150 dots an inch"
    for page in (run / "timeline" / "timeline.html", tmp_path / "report.html"):
        text = page.read_text()
        assert "took over rank 0" in text and "<img alt=" in text
        assert not re.search(r"""(src|href)=(?!["']?data:)""", text), "everything is in the page"
    report = (tmp_path / "report.html").read_text()
    for section in ("Status", "Loss", "Pace", "Snapshots and commits", "Events", "trace.json"):
        assert section in report


def test_what_programs_read_is_json_where_a_loss_is_not_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path)
    (run / STATUS).write_text(json.dumps(status_of(3)))
    writer = RunDirectory(run, fresh=False)
    for number, loss in ((20, math.nan), (21, math.inf)):
        fields = {k: v for k, v in _iteration(30.0, number).items() if k not in ("t", "event")}
        writer.event("iteration", **{**fields, "losses": {"lm loss": loss}})
        writer.event("straggler", node=1, iteration=number, ratio=loss)
    with open(run / EVENTS, "a") as events:  # as an older version has written it
        events.write('{"t": 31.0, "event": "straggler", "node": 1, "iteration": 22, "ratio": NaN}\n')
    writer.close()

    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    assert [strict(line)["losses"] for line in (run / EVENTS).read_text().splitlines() if '"lm loss"' in line][-2:] == [
        {"lm loss": None}, {"lm loss": None},
    ]  # fmt: skip
    assert cli.main(["timeline", "--run-dir", str(run)]) == cli.main(["report", "--run-dir", str(run)]) == 0
    strict((run / "timeline" / "trace.json").read_text())
    capsys.readouterr()
    assert cli.main(["status", "--run-dir", str(run), "--json"]) == 0
    assert strict(capsys.readouterr().out)["last_events"][-1]["ratio"] is None


def test_a_report_without_a_whole_status_says_so_and_has_the_rest(tmp_path: Path) -> None:
    run = _run(tmp_path)
    (run / STATUS).write_text((run / STATUS).read_text()[:40])
    assert cli.main(["report", "--run-dir", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert f"{run / STATUS} is not whole" in text and "took over rank 0" in text


def test_without_matplotlib_the_pages_say_how_to_get_it_and_have_all_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    run = _run(tmp_path)
    assert cli.main(["timeline", "--run-dir", str(run)]) == 0 and cli.main(["report", "--run-dir", str(run)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert json.loads((run / "timeline" / "trace.json").read_text())["traceEvents"]
    for page in (run / "timeline" / "timeline.html", run / "report.html"):
        text = page.read_text()
        assert text.count("pip install matplotlib") == 1 and "took over rank 0" in text and "<img" not in text


@pytest.mark.parametrize("command", ["timeline", "report"])
def test_a_directory_without_a_run_is_one_clear_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--run-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no events in" in err


def test_a_node_log_stays_bounded_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / LOGS).mkdir()
    log = NodeLog(tmp_path / LOGS, 3, limit=2000)
    for i in range(200):
        log.write("shard", number=i)
    log.close()
    with open(tmp_path / LOGS / "node-3.jsonl", "a") as f:
        f.write('{"event": "ha')
    lines = list(read_node_logs(tmp_path))
    assert lines[-1]["number"] == 199 and all(x["node"] == 3 for x in lines)
    assert sum(p.stat().st_size for p in (tmp_path / LOGS).iterdir()) < 6000


@pytest.fixture
def watch(tmp_path: Path) -> Callable[..., Watch]:
    made: list[Watch] = []

    def make(port: int) -> Watch:
        made.append(Watch(1, "job", str(tmp_path), None, port))
        return made[-1]

    yield make  # type: ignore[misc]
    for each in made:
        each.close()


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def test_the_endpoint_serves_what_the_agent_said_and_heard(watch: Callable[..., Watch]) -> None:
    port = free_port()
    one = watch(port)
    one.entered(3, 2, "gone")
    one.sent(r.NodeResumed(3, 1, 7))
    one.received(r.CommittedTo(3, (3, 7), 8), 2, 6)
    for blocked, copied in ((0.25, 100), (0.5, 50)):
        one.sent(r.Iteration(1, 0, 3, 7, {}, None, 0.5, blocked, copied, 0))
    text = _scrape(port)
    for line in (
        "deadpool_epoch 3.0",
        "deadpool_node_coordinates 2.0",
        "deadpool_node_spare 0.0",
        "deadpool_job_coordinates 6.0",
        "deadpool_committed_generation 7.0",
        "deadpool_blocked_seconds_total 0.75",
        "deadpool_snapshot_bytes_total 150.0",
        'deadpool_recoveries_total{end="resumed"} 1.0',
        'deadpool_recovery_step_seconds_count{step="resumed"} 1.0',
    ):
        assert line in text, line


def test_names_and_help_follow_the_conventions_of_prometheus(watch: Callable[..., Watch]) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    port = free_port()
    watch(port)
    families = list(text_string_to_metric_families(_scrape(port)))
    assert len(families) > 15
    for family in families:
        assert re.fullmatch(r"deadpool_[a-z_]+", family.name) and len(family.documentation) > 15
        assert not family.name.endswith(("_ms", "_count", "_sum", "_total"))
        if family.type == "histogram":
            assert family.name.endswith("_seconds"), "base units"


def test_the_dashboard_asks_only_for_metrics_there_are(watch: Callable[..., Watch]) -> None:
    port = free_port()
    watch(port)
    served = set(re.findall(r"^# HELP (\S+)", _scrape(port), re.MULTILINE))
    dashboard = json.loads((Path(__file__).parents[2] / "configs" / "grafana" / "deadpool.json").read_text())
    targets = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    assert len(targets) >= 8
    for expression in targets:
        for name in re.findall(r"deadpool_[a-z_]+", expression):
            assert {name, re.sub("_(bucket|sum)$", "", name)} & served, name


def test_a_taken_port_costs_a_line_and_not_the_node(
    watch: Callable[..., Watch], capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    watch(port)
    second = watch(port)
    assert f"--deadpool-metrics-port {port}" in capsys.readouterr().err
    second.received(r.CommittedTo(0, (0, 1), 0), 1, 6)
    watch(65536)  # of the second of several nodes on a machine, where 65535 was asked for
    assert "--deadpool-metrics-port 65536: " in capsys.readouterr().err


def test_read_events_of_the_written_story_is_the_story(tmp_path: Path) -> None:
    assert [e["event"] for e in read_events(_run(tmp_path))] == [e["event"] for e in story_of_a_run()]
