"""`deadpool status` is one screen: any job on any terminal, with what is wrong never off it. Rendered from records."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deadpool_megatron.cluster.records.exits import what_to_do
from deadpool_megatron.observe import EVENTS, STATUS
from deadpool_megatron.observe.screen import nodes_of
from deadpool_megatron.observe.status import JobView

SIZES = [(80, 24), (200, 50)]
NODES = [3, 16, 64, 512, 4096]
SLOTS = 8


def status_of(total: int, lost: int | None = None, recovers: bool = False, slow: int | None = None) -> dict[str, Any]:
    """So many nodes, the last one (of 512: four) a spare; node ``lost`` is lost and the first spare has its ranks."""
    spares = set(range(total - max(1, total // 128), total))
    active = [n for n in range(total) if n not in spares]
    first = min(spares)
    role = dict.fromkeys(active, "active") | dict.fromkeys(spares, "spare")
    holder = {n: n for n in active}
    if lost is not None:
        role[lost], role[first], holder[lost] = "lost", "active", first
    step = {n: "aborted" if n == slow else "prepared" for n in range(total)} if recovers else {}
    coordinates = [
        {"rank": SLOTS * n + i, "tp": i, "pp": n % 4, "dp": n // 4, "node": holder[n], "local_rank": i, "pid": 7,
         "state": "training", "step": step.get(holder[n]), "generation": 41}
        for n in active for i in range(SLOTS)
    ]  # fmt: skip
    return {
        "t": time.time(),
        "phase": "restoring" if recovers else "training",
        "end": None,
        "epoch": 0 if lost is None else 1,
        "iteration": 41,
        "nodes": [{"node": n, "name": f"gpu-{n:04}", "agent_pid": 5, "role": role[n]} for n in range(total)],
        "coordinates": coordinates,
        "spares": [{"node": n, "pids": [3], "state": "parked"} for n in sorted(spares) if role[n] == "spare"],
        "generation": {"committed": 41, "durable": -1},
        "protection": {
            **{"groups": [[0, 1]], "survives_now": 1, "survives_when_full": 1, "full": lost is None},
            **{"not_covered_yet": [first], "tolerated": "any 1 node"},
        },
        "refused": {"malformed": 0, "vaults": {}},
        "coordinator_pid": os.getpid(),
        "coordinator_host": os.uname().nodename,
    }


def events_of(total: int, lost: int | None = None) -> list[dict[str, Any]]:
    began = time.time() - 60
    spares = max(1, total // 128)
    names = [f"gpu-{n:04}" for n in range(total)]
    out: list[dict[str, Any]] = [
        {"t": began, "event": "started", "nodes": total, "spares": spares, "names": names},
        {"t": began, "event": "training"},
        {"t": began, "event": "straggler", "node": 2, "iteration": 9, "ratio": 1.7, "advice": "look at its clocks"},
    ]
    if lost is not None:
        ranks = list(range(SLOTS * lost, SLOTS * (lost + 1)))
        nodes = [n for n in range(total - spares + 1) if n != lost]
        out += [
            {
                "t": began + 50,
                "event": "detected",
                "node": lost,
                "cause": "its agent is gone or silent",
                "ranks": ranks,
            },
            {"t": began + 50.1, "event": "declared", "epoch": 1, "lost": [lost], "replaced": ranks, "nodes": nodes},
            {"t": began + 51, "event": "aborted", "epoch": 1},
            {"t": began + 51, "event": "agreed", "epoch": 1, "iteration": 41, "sources": {}},
        ]
    return out


def shown(run_dir: Path, size: tuple[int, int], status: dict[str, Any], events: list[dict[str, Any]]) -> list[str]:
    """The lines of the screen, without colour."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / STATUS).write_text(json.dumps(status))
    (run_dir / EVENTS).write_text("".join(json.dumps(e) + "\n" for e in events))
    console = Console(width=size[0], no_color=True, highlight=False)
    with console.capture() as out:
        console.print(JobView(run_dir).screen(*size))
    lines = out.get().rstrip("\n").split("\n")
    assert len(lines) <= size[1] and max(map(len, lines)) <= size[0], "it fits"
    return lines


def test_what_spares_cover_is_said_and_fits(tmp_path: Path) -> None:
    covered = "losses that spares of the same nvlink domain cover: " + ", ".join(f"rack{n:03} 2" for n in range(12))
    lines = shown(tmp_path, (80, 24), {**status_of(256), "covered": [covered]}, events_of(256))
    assert any(line.startswith("losses that spares of the same nvlink domain cover: rack000 2") for line in lines)


def test_for_how_many_workers_a_process_stands_by_is_said(tmp_path: Path) -> None:
    status = status_of(16)
    assert "stands by" not in "\n".join(shown(tmp_path, (200, 50), status, events_of(16)))
    for node in status["nodes"][:2]:
        node["standbys"] = {str(local): 4711 for local in range(SLOTS)}
    lines = shown(tmp_path, (200, 50), status, events_of(16))
    assert lines[2].endswith(f"; a process stands by for {2 * SLOTS} of {len(status['coordinates'])} workers")


def test_who_is_drained_what_is_to_be_rehearsed_and_who_has_failed_its_check_is_said(
    tmp_path: Path,
) -> None:
    status = status_of(256)
    status["drains"] = [{"node": n, "state": "waits for a spare that is starting"} for n in range(9)]
    first = status["spares"][0]
    first |= {"unfit": "worker 0: a product of matrices is wrong", "rehearses": [0, 1, 2], "rehearsed": [0]}
    first["unrehearsed"] = {"2": "it ended with 1; see spare.log"}
    lines = shown(tmp_path, (100, 40), status, events_of(256))
    assert "being drained: node 0: waits for a spare that is starting" in lines
    assert sum(line.startswith("being drained") for line in lines) == 3
    assert any("0 rehearsed, 1 to be rehearsed" in line for line in lines)
    assert f"could not be rehearsed: rank 2 by node {first['node']}: it ended with 1; see spare.log" in lines
    assert any(line.startswith("failed the last check, and taken last: node") and "a product" in line for line in lines)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("total", NODES)
def test_a_healthy_job_of_any_size_fits_and_says_that_it_trains_and_is_protected(
    total: int, size: tuple[int, int], tmp_path: Path
) -> None:
    lines = shown(tmp_path, size, status_of(total), events_of(total))
    text = "\n".join(lines)
    assert lines[0].startswith("training, epoch 0, last iteration 41")
    assert "any 1 node may be lost now" in lines[1]
    first = total - max(1, total // 128)
    assert lines[2].startswith("spares: ") and f"{first} (gpu-{first:04})" in lines[2] and "parked warm" in lines[2]
    assert "straggler" in text and "last events" in text
    assert f"{first} trains" in text, "the nodes are counted"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("total", NODES)
def test_a_recovery_shows_who_was_lost_who_is_waited_for_and_every_odd_node(
    total: int, size: tuple[int, int], tmp_path: Path
) -> None:
    status = status_of(total, lost=0, recovers=True, slow=1)
    lines = shown(tmp_path, size, status, events_of(total, lost=0))
    text = "\n".join(lines)
    assert lines[0].startswith("restoring, epoch 1")
    assert any("last recovery (of 1)" in line and "node 0 (gpu-0000) lost" in line for line in lines)
    assert any("on the way to prepared" in line and "waits for node 1 (gpu-0001)" in line for line in lines)
    assert any(line.startswith("lost: node 0 (gpu-0000)") for line in lines)
    assert "1 lost" in text and "last events" in text and any("agreed" in line for line in lines)


@pytest.mark.parametrize(("total", "size"), [(3, (80, 24)), (16, (200, 50))])
def test_few_nodes_have_a_line_each_with_machine_ranks_and_generation(
    total: int, size: tuple[int, int], tmp_path: Path
) -> None:
    lines = shown(tmp_path, size, status_of(total), events_of(total))
    assert any(line.split() == ["1", "gpu-0001", "trains", "ranks", "8-15", "generation", "41"] for line in lines)


def test_five_hundred_nodes_have_a_character_each_on_a_small_terminal(tmp_path: Path) -> None:
    lines = shown(tmp_path, (80, 24), status_of(512, lost=100), [])
    grid = [line for line in lines if line.lstrip()[:1].isdigit()]
    drawn = "".join("".join(line.split()[1:]) for line in grid)
    assert len(drawn) == 512 and drawn[100] == "X" and drawn[-3:] == "sss" and drawn.count("#") == 508


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_how_a_job_ended_and_what_to_do_is_not_cut(size: tuple[int, int], tmp_path: Path) -> None:
    why = "no spare is left for node 0 (its agent is gone or silent) and no checkpoint could be saved: nobody survives"
    ended = status_of(64, lost=0) | {"phase": "ended", "end": {"code": 76, "message": why}}
    text = " ".join(" ".join(shown(tmp_path, size, ended, [])).split())
    assert "ended, exit code 76" in text and why in text and what_to_do(76) in text
    assert "may be lost" not in text and "parked" not in text and "trains" not in text and "warm" not in text
    assert "nodes: 1 lost 0 gpu-0000 lost" in text


def test_machines_are_named_where_there_are_several(tmp_path: Path) -> None:
    status = status_of(3)
    assert nodes_of(status)[1].called == "1 gpu-0001"
    for node in status["nodes"]:
        node["name"] = "one"
    assert nodes_of(status)[1].called == "1"


@pytest.mark.parametrize("height", [8, 10, 12])
def test_what_is_wrong_has_a_line_on_the_lowest_terminal_too(height: int, tmp_path: Path) -> None:
    events = events_of(16)
    behind = status_of(16) | {"behind": {"iterations": 9, "seconds": 30.0, "cause": "a slow peer"}}
    lines = shown(tmp_path, (80, height), behind, events)
    assert any(line.startswith("1 of 2: protection is behind") for line in lines)
    assert height < 10 or any(line.startswith("nodes:") for line in lines)
    one = shown(tmp_path, (80, height), status_of(16), events)
    assert any("straggler" in line for line in one[3:4]), one


def test_more_alarms_than_there_is_room_for_are_counted_and_hide_neither_nodes_nor_events(tmp_path: Path) -> None:
    kinds = ("straggler", "damaged", "unlike", "no_room", "durable_failed", "durable_taken", "worker_error")
    events = [{"t": 1.0, "event": kind, "node": 1, "cause": "x"} for kind in kinds]
    status = status_of(64, lost=3) | {"behind": {"iterations": 9, "seconds": 30.0, "cause": "a slow peer"}}
    lines = shown(tmp_path, (80, 16), status, events)
    assert any("protection is behind" in line for line in lines) and any("more that are not" in line for line in lines)
    assert any(line.startswith("nodes:") for line in lines) and "last events" in lines
