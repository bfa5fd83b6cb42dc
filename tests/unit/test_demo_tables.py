"""What `deadpool status` and the demo show of a recovery is what the events say."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deadpool_megatron import cli
from deadpool_megatron.observe import EVENTS, STATUS
from deadpool_megatron.observe.narrative import ranks_text
from deadpool_megatron.observe.recoveries import PHASES, recoveries
from deadpool_megatron.observe.tables import grid_table, phases_table

NOW = time.time()


def _event(name: str, t: float, **fields: Any) -> dict[str, Any]:
    return {"t": t, "event": name, "epoch": 0, **fields}


def _declared(t: float, epoch: int, lost: list[int], replaced: list[int]) -> dict[str, Any]:
    return _event("declared", t, lost=lost, replaced=replaced, reason="gone") | {"epoch": epoch}


def _rest(t: float) -> list[dict[str, Any]]:
    return [
        _event("aborted", t + 0.1),
        _event("agreed", t + 0.2, iteration=6, sources={"0": 1, "1": 1}),
        _event("prepared", t + 0.3),
        _event("reformed", t + 0.4, groups=24, changed=130, of=192),
        _event("restored", t + 0.5),
        _event("compared", t + 0.55, seconds=0.04),
        _event("resumed", t + 0.6, iteration=6),
    ]


STORY = [
    _event("detected", 10.0, node=0, cause="gone", ranks=[0, 1]),
    _declared(10.0, 1, [0], [0, 1]),
    *_rest(10.0),
]


def test_a_recovery_has_every_phase_in_order() -> None:
    (one,) = recoveries([_event("started", 1.0), *STORY, _event("finished", 20.0)])
    assert tuple(one.times) == PHASES
    assert (one.lost, one.replaced, one.generation, one.sources) == ([0], [0, 1], 6, {0: 1, 1: 1})
    assert one.end == "resumed" and one.began == 10.0


def test_second_loss_on_the_way_belongs_to_the_same_recovery_and_restarts_its_phases() -> None:
    second = [_event("detected", 10.15, node=2, cause="gone", ranks=[4]), _declared(10.15, 2, [2], [4]), *_rest(10.15)]
    (one,) = recoveries([*STORY[:4], *second])
    assert one.lost == [0, 2] and one.replaced == [0, 1, 4] and one.epoch == 2
    assert one.began == 10.0 and one.times["aborted"] == 10.25
    assert list(one.times.values()) == sorted(one.times.values())


def test_loss_of_a_spare_is_no_recovery() -> None:
    assert recoveries([_event("detected", 1.0, node=4, cause="gone", ranks=[])]) == []


def test_recovery_under_way_and_recovery_that_failed_are_told_apart() -> None:
    (under_way,) = recoveries(STORY[:3])
    assert under_way.end is None and "agreed" not in under_way.times
    (failed,) = recoveries([*STORY[:3], _event("stopped", 11.0, code=77, message="lost")])
    assert failed.end == "stopped"


def test_declaration_without_a_loss_is_a_recovery_too() -> None:
    (one,) = recoveries([_declared(5.0, 1, [], []), *_rest(5.0)])
    assert one.lost == [] and one.began == 5.0 and one.end == "resumed"


def _text(table: Any) -> str:
    console = Console(width=130, no_color=True)
    with console.capture() as shown:
        console.print(table)
    return shown.get()


def test_phase_times_are_relative_to_the_moment_given() -> None:
    (one,) = recoveries(STORY)
    text = _text(phases_table(Console(), one, 9.9, [("redone", "iteration 6 is complete", 11.4)]))
    lines = {line.split()[0]: line for line in text.splitlines() if len(line.split()) > 2}
    assert "+100 ms" in lines["detected"] and "+700 ms" in lines["resumed"] and "+1.50 s" in lines["redone"]
    assert "800 ms" in lines["redone"]


def _status(**changed: Any) -> dict[str, Any]:
    coordinates = [
        {"rank": 0, "tp": 0, "pp": 0, "dp": 0, "node": 2, "local_rank": 0, "pid": 300, "state": "training"},
        {"rank": 1, "tp": 0, "pp": 1, "dp": 0, "node": 1, "local_rank": 0, "pid": 200, "state": "training"},
    ]
    nodes = [
        {"node": 0, "agent_pid": 10, "role": "lost"},
        {"node": 1, "agent_pid": 11, "role": "active"},
        {"node": 2, "agent_pid": 12, "role": "active"},
    ]
    return {
        "t": NOW,
        "phase": "ended",
        "epoch": 1,
        "iteration": 7,
        "nodes": nodes,
        "coordinates": coordinates,
        "spares": [],
        "generation": {"committed": 7},
    } | changed


def test_grid_puts_each_coordinate_at_its_place_with_its_node() -> None:
    table = grid_table(Console(), _status(), moved=[0])
    lines = _text(table).splitlines()
    assert any("pp 0" in line and "rank 0" in line and "node 2+" in line for line in lines)
    assert any("pp 1" in line and "rank 1" in line and "node 1 " in line for line in lines)


def test_no_grid_before_the_coordinates_are_known() -> None:
    unknown = [{**c, "tp": None} for c in _status()["coordinates"]]
    assert grid_table(Console(), _status(coordinates=unknown)) is None


def test_ranks_are_written_as_ranges() -> None:
    assert ranks_text([3, 0, 1, 2, 6]) == "0-3, 6"
    assert ranks_text([]) == ""


def _write(run_dir: Path) -> None:
    (run_dir / STATUS).write_text(json.dumps(_status(), indent=1) + "\n")
    (run_dir / EVENTS).write_text("".join(json.dumps(e) + "\n" for e in STORY))


def test_status_shows_roles_progress_and_the_last_recovery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path)
    assert cli.main(["status", "--run-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "ended, epoch 1, last iteration 7, committed generation 7" in out
    assert "node 0 lost: gone; resumed from iteration 6" in out
    assert all(name in out for name in PHASES)
    assert "\x1b" not in out


def test_status_as_json_is_the_file_with_what_the_events_add(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path)
    assert cli.main(["status", "--run-dir", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {k: said[k] for k in _status()} == _status()
    assert said["recoveries"][0]["generation"] == 6 and said["last_events"][-1]["event"] == "resumed"


def test_status_fits_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = [
        {"rank": 8 * dp + pp, "tp": 0, "pp": pp, "dp": dp, "node": dp, "local_rank": pp, "pid": 1234567, "state": "t"}
        for dp in range(5)
        for pp in range(8)
    ]
    nodes = [{"node": n, "agent_pid": 1234567, "role": "active"} for n in range(5)]
    (tmp_path / STATUS).write_text(json.dumps(_status(coordinates=wide, nodes=nodes)))
    (tmp_path / EVENTS).write_text("".join(json.dumps(e) + "\n" for e in STORY))
    assert cli.main(["status", "--run-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert cli.main(["status", "--detail", "--run-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and any("39@4" in line for line in lines), "the grid is there"


def test_status_of_no_job_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--run-dir", str(tmp_path / "none")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no status at" in err


def _ends(run_dir: Path) -> None:
    """The rest of the recovery and the end of the job appear."""
    with open(run_dir / EVENTS, "a") as f:
        f.writelines(json.dumps(e) + "\n" for e in STORY[4:])
    fresh = run_dir / "fresh"
    fresh.write_text(json.dumps(_status()))
    fresh.replace(run_dir / STATUS)


def _under_way(run_dir: Path) -> None:
    # Now, not when this module was imported: whoever is silent for minutes is taken for dead.
    (run_dir / STATUS).write_text(json.dumps(_status(phase="restoring", t=time.time())))
    (run_dir / EVENTS).write_text("".join(json.dumps(e) + "\n" for e in STORY[:4]))


def test_watching_without_a_terminal_prints_each_event_once_and_ends_with_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _under_way(tmp_path)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            _ends(tmp_path)

    monkeypatch.setattr("time.sleep", pause)
    assert cli.main(["status", "--run-dir", str(tmp_path), "--watch"]) == 0
    assert len(pauses) == 3
    out = capsys.readouterr().out
    assert "on the way to prepared" in out
    shown = [line.split()[1] for line in out.splitlines() if re.match(r"\d\d:\d\d:\d\d  ", line)]
    assert shown == [e["event"] for e in STORY]


def test_watching_on_a_terminal_draws_the_recovery_with_its_running_time(tmp_path: Path) -> None:
    _under_way(tmp_path)
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS="100", LINES="50", TERM="xterm-256color")
        command = [sys.executable, "-m", "deadpool_megatron.cli", "status", "--run-dir", str(tmp_path), "--watch"]
        os.execv(sys.executable, command)
    drawn = b""
    ended = False
    with contextlib.suppress(OSError):  # what reading says when the other end is gone
        while part := os.read(fd, 1 << 16):
            drawn += part
            if not ended and drawn.count(b"on the way to prepared") > 1:  # drawn again while it runs
                _ends(tmp_path)
                ended = True
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(fd)
    assert ended
    assert b"\x1b[?1049h" in drawn and b"\x1b[?1049l" in drawn, "a screen of its own, and back"
    assert b"resumed from iteration 6" in drawn
