"""What is said of torchft follows from the rows its replicas wrote, and what it cannot do here is one clear line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from deadpool_bench.baselines.torchft_kills import (
    SETTINGS,
    Outage,
    measured,
    regroupings,
    show_outages,
    usual_seconds,
)
from deadpool_bench.baselines.torchft_pretrain import replica_arguments, without_sharding
from deadpool_bench.changes import Change, show_changes
from deadpool_bench.kills import Recovery
from deadpool_bench.recovery import _draw, _show_ratios
from deadpool_megatron import cli

# Written by a run with torchft's defaults on a busy machine, seconds after _START: (replica, step, place, committed,
# begun, quorum, end). Replica 1 was killed while it computed step 5, whose work the others then threw away.
_START = 1795299588.0
_KILL = 3.4374816
_ROWS = [
    (0, 1, 0, True, 1.2706790, 1.2805688, 1.7484540),
    (1, 1, 1, True, 1.2727044, 1.2806740, 1.7570667),
    (2, 1, None, True, 1.2698488, 1.3196440, 1.7476000),
    (0, 2, 0, True, 1.7508953, 1.7784927, 2.2399150),
    (1, 2, 1, True, 1.7737262, 1.7756753, 2.2571805),
    (2, 2, None, True, 1.7522845, 1.7759511, 2.2329830),
    (0, 3, 0, True, 2.2427840, 2.2707990, 2.6627195),
    (1, 3, 1, True, 2.2674477, 2.2692072, 2.7011337),
    (2, 3, None, True, 2.2337000, 2.2692703, 2.6551547),
    (0, 4, 0, True, 2.6640322, 2.7161822, 3.1006494),
    (1, 4, 1, True, 2.7118094, 2.7144180, 3.1051674),
    (2, 4, None, True, 2.6593020, 2.7139008, 3.0929189),
    (0, 5, 0, False, 3.1033225, 3.1252785, 3.7054927),
    (2, 5, None, False, 3.0936592, 3.1392207, 3.7038915),
    (0, 5, 0, True, 3.7055395, 8.4768503, 9.2672565),
    (2, 5, 1, True, 3.7039459, 8.4759850, 9.2524460),
]


def _rows(count: int = len(_ROWS)) -> list[dict[str, Any]]:
    out = []
    for replica, step, place, committed, begun, quorum, end in _ROWS[:count]:
        times = {"begun": _START + begun, "quorum": _START + quorum, "t": _START + end}
        size = {"participants": 2, "replicas": 2 if quorum > _KILL else 3}
        out.append({"replica": replica, "step": step, "place": place, "committed": committed, **times, **size})
    return sorted(out, key=lambda row: float(row["t"]))


def _measured(rows: list[dict[str, Any]]) -> Outage | None:
    return measured(rows, _START + _KILL, 1, "defaults", "0.2.0")


def test_a_kill_is_measured_to_the_end_of_the_first_iteration_in_the_new_quorum() -> None:
    found = _measured(_rows())
    assert found is not None
    assert found.iteration == 5 and found.lost_iterations == 1 and found.participants == 2
    assert found.quorum_s == pytest.approx(8.4768503 - _KILL)
    assert found.first_iteration_s == pytest.approx(9.2672565 - _KILL), "of the later of the two that train"
    assert found.iteration_s == pytest.approx(0.4439533)
    assert found.disturbance_s == pytest.approx(found.first_iteration_s - found.iteration_s)
    assert sum(found.breakdown().values()) == pytest.approx(found.first_iteration_s)


@pytest.mark.parametrize("count", [12, 14, 15])
def test_nothing_is_measured_before_all_that_train_have_completed_it(count: int) -> None:
    assert _measured(_rows(count)) is None


def test_an_iteration_that_one_survivor_could_keep_is_not_lost_but_the_one_that_brings_the_other_up_to_it_is() -> None:
    # Another run: the spare, 2, committed step 5 with the dead one's gradients, 0 did not and had to be healed.
    kill = 3.42
    real = [
        (2, 5, None, True, 3.344, 3.359, 3.468, 3, 2),
        (0, 5, 0, False, 3.351, 3.363, 3.610, 3, 2),
        (2, 6, 0, False, 3.469, 8.440, 8.652, 2, 1),
        (0, 6, None, False, 3.610, 8.646, 8.663, 2, 1),
        (2, 6, 1, True, 8.652, 8.702, 8.904, 2, 2),
        (0, 6, 0, True, 8.663, 8.702, 8.911, 2, 2),
    ]
    rows = _rows(12)
    for replica, step, place, committed, begun, quorum, end, replicas, participants in real:
        times = {"begun": _START + begun, "quorum": _START + quorum, "t": _START + end}
        size = {"participants": participants, "replicas": replicas}
        rows.append({"replica": replica, "step": step, "place": place, "committed": committed, **times, **size})
    found = measured(rows, _START + kill, 1, "defaults", "0.2.0")
    assert found is not None and found.lost_iterations == 1 and found.participants == 2
    assert found.quorum_s == pytest.approx(8.646 - kill) and found.first_iteration_s == pytest.approx(8.911 - kill)


def test_an_iteration_that_the_others_could_complete_without_the_dead_one_is_neither_lost_nor_the_first() -> None:
    rows = _rows()
    for row in rows:
        if row["step"] == 5:  # the dead one had sent its gradients: what was thrown away is kept, the next is step 6
            row["step"] += row["committed"]
            row["committed"] = True
    found = _measured(rows)
    assert found is not None and found.lost_iterations == 0
    assert found.first_iteration_s == pytest.approx(9.2672565 - _KILL)


def test_without_a_spare_the_others_go_on_and_one_that_comes_back_costs_what_it_holds_up() -> None:
    """Of a run on a busy machine: replica 0 is killed in step 4, 2 comes in step 67, whose gradients are 1's alone."""
    early = [
        *[(0, 1, 0, 0.555, 0.566, 1.711, 2, 2), (1, 1, 1, 0.563, 0.579, 1.840, 2, 2)],
        *[(0, 2, 0, 1.713, 1.849, 2.590, 2, 2), (1, 2, 1, 1.847, 1.863, 2.609, 2, 2)],
        *[(0, 3, 0, 2.592, 2.615, 3.150, 2, 2), (1, 3, 1, 2.610, 2.615, 3.180, 2, 2)],
        *[(1, 4, 1, 3.181, 3.187, 3.898, 2, 2), (1, 4, 0, 3.898, 8.295, 9.183, 1, 1)],
        *[(1, 5, 0, 9.184, 9.186, 9.629, 1, 1), (1, 65, 0, 43.220, 43.222, 43.602, 1, 1)],
        *[(1, 66, 0, 43.603, 43.605, 44.041, 1, 1), (2, 67, None, 43.752, 44.670, 45.598, 2, 1)],
        *[(1, 67, 0, 44.042, 44.055, 45.619, 2, 1), (1, 68, 0, 45.627, 45.630, 46.868, 2, 2)],
        *[(2, 68, 1, 45.603, 45.634, 46.876, 2, 2), (1, 69, 0, 46.869, 46.881, 48.159, 2, 2)],
        *[(2, 69, 1, 46.879, 46.882, 48.179, 2, 2), (2, 70, 1, 48.191, 48.200, 49.397, 2, 2)],
        (1, 70, 0, 48.162, 48.207, 49.432, 2, 2),
    ]
    names = "replica", "step", "place", "begun", "quorum", "t", "replicas", "participants"
    rows = [dict(zip(names, row, strict=True), committed=row[5] != 3.898) for row in early]
    shrunk, grown = regroupings(rows, 3.5, 0)
    assert (shrunk.event, shrunk.width, shrunk.was, shrunk.lost_iterations) == ("shrunk", 1, 2, 1)
    assert shrunk.first_iteration_s == pytest.approx(9.183 - 3.5) and shrunk.iteration_s == pytest.approx(0.446)
    assert (grown.event, grown.width, grown.was, grown.lost_iterations) == ("grown", 2, 1, 0)
    assert grown.first_iteration_s == pytest.approx(46.876 - 44.041 - 0.446), "without the iteration done meanwhile"
    assert grown.iteration_s == pytest.approx((49.432 - 46.876) / 2)


def test_the_normal_time_of_an_iteration_needs_four_of_them() -> None:
    with pytest.raises(ValueError, match="fewer than four"):
        usual_seconds(_rows(9))


def test_a_replica_runs_the_same_arguments_without_what_one_process_cannot_shard() -> None:
    common = ["--replica", "1", "--replicas", "3", "--active", "2", "--lighthouse", "http://x:1", "--directory", "d"]
    common += ["--gloo-timeout", "60"]
    said = replica_arguments([*common, "script.py", "--bf16", "--use-distributed-optimizer", "--lr", "1e-3"])
    assert (said.replica, said.replicas, said.active, said.script) == (1, 3, 2, "script.py")
    assert without_sharding(said.arguments) == ["--bf16", "--lr", "1e-3"]


def test_the_two_settings_differ_in_what_the_name_says() -> None:
    defaults, tuned = (settings.flags() for settings in SETTINGS)
    assert [(a, b) for a, b in zip(defaults, tuned, strict=True) if a != b] == [("5000", "1000")]
    assert [settings.gloo_s for settings in SETTINGS] == [60, 2]


def test_the_table_of_torchft_fits_80_columns_and_its_bars_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _measured(_rows())
    assert found is not None
    kill = Recovery(1, 9, 9, {"detected": 0.02, "resumed": 0.6}, 1.1, 0.5, 0.003)
    show_changes({"torchft, heartbeat 1 s, gloo 2 s": [Change("shrunk", 1, 2, 1.427, 0.337, 1)]})
    show_outages([found])
    _show_ratios([found], [kill])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-3].split() == ["defaults", "5.386", "5.386", "5.830", "5.039", "0.444", "1.00", "2", "1"]
    assert lines[-1].endswith("defaults: 5.386 / 0.600 = 9.0")
    pytest.importorskip("matplotlib")
    assert _draw([kill], [], str(tmp_path / "p.png"), [found]) == 0
    assert (tmp_path / "p.png").stat().st_size > 10000


_ONE = ["--nproc-per-node", "1", "--active-nodes", "2", "--emulate-cpu"]


@pytest.mark.parametrize(
    ("options", "arguments", "says"),
    [
        (["--torchft", "-1"], [], "--torchft -1: 0 or more kills"),
        (["--torchft", "1"], [], "--nproc-per-node must be 1"),
        (["--torchft", "1", "--nproc-per-node", "1"], [], "--emulate-cpu is needed"),
        (["--torchft", "1", *_ONE, "--active-nodes", "1"], [], "--active-nodes 1: 2 or more"),
        (["--torchft", "1", *_ONE], ["--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size must be 1"),
        (["--torchft", "1", *_ONE], ["--pipeline-model-parallel-size=2"], "--pipeline-model-parallel-size must be 1"),
    ],
)
def test_what_torchft_cannot_do_here_is_one_clear_line(
    options: list[str], arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "recovery", *options, "nowhere.py", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err


@pytest.mark.skipif(importlib.util.find_spec("torchft") is not None, reason="torchft is installed here")
def test_that_torchft_is_not_installed_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tensor-model-parallel-size", "2", "--tensor-model-parallel-size", "1"]  # the last one counts
    assert cli.main(["bench", "recovery", "--torchft", "1", *_ONE, "nowhere.py", *sizes]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'torchft>=0.2'" in err
