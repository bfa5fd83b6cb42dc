"""What the benches print follows from what they measured."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from deadpool_bench.kills import Recovery, medians
from deadpool_bench.recovery import _draw, _plan, _show_kills, _show_restarts
from deadpool_bench.restarts import Restart, _moments, _stall, choose_interval, name_of
from deadpool_bench.scale import _show
from deadpool_megatron import cli

PHASES = {"detected": 0.02, "declared": 0.02, "aborted": 0.1, "agreed": 0.1, "prepared": 0.4, "reformed": 0.5,
          "restored": 0.55, "resumed": 0.6}  # fmt: skip


def _kill(first: float = 1.1, lost: int = 0) -> Recovery:
    return Recovery(1, 9, 9 - lost, PHASES, first, 0.5, 0.003, (1,), lost, 3 << 20)


def _restart(interval: int, first: float = 20.0, stall: float = 1.0, mode: str = "sync") -> Restart:
    return Restart(mode, interval, True, 2.0, first, 3, stall, 0.5)


def test_the_breakdown_adds_up_to_the_time_from_the_kill_to_the_first_iteration() -> None:
    rows = [_kill(1.1), _kill(1.2), _kill(1.9)]
    for row in rows:
        assert sum(row.breakdown().values()) == pytest.approx(row.first_iteration_s)
        assert row.disturbance_s == pytest.approx(row.first_iteration_s - 0.5)
    assert medians(rows)["redo"] == pytest.approx(0.6) and medians(rows)["prepared"] == pytest.approx(0.3)


def test_a_phase_the_events_do_not_have_takes_nothing_and_the_rest_still_adds_up() -> None:
    less = Recovery(1, 9, 9, {k: v for k, v in PHASES.items() if k != "detected"}, 1.1, 0.5, 0.0)
    assert sum(less.breakdown().values()) == pytest.approx(1.1)


def test_the_cheapest_interval_depends_on_how_often_nodes_fail() -> None:
    found = [_restart(2), _restart(20), _restart(200)]
    assert [choose_interval(found, h * 3600)[1] for h in (0.0005, 0.1, 10)] == [2, 20, 200]
    assert _restart(20).cost(3600) == pytest.approx(20 + 5 + 3600 / (20 * 0.5))


def test_the_stall_of_a_save_is_read_from_the_lines_of_megatron(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    lines = [f" [2026-11-21 10:00:{s:09.6f}] iteration {i:8d}/ 100 | x" for i, s in
             [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 7.5), (6, 8.5), (7, 9.5), (8, 10.5), (9, 13.5)]]  # fmt: skip
    (tmp_path / "logs" / "rank-1.log").write_text("\n".join(lines))
    stall, usual = _stall(_moments(tmp_path), interval=4)
    assert usual == pytest.approx(1.0) and stall == pytest.approx((2.5 + 2.0) / 2)


def test_tables_fit_80_columns_and_the_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kills = [_kill(), _kill(1.3, 1)]
    found = [_restart(2), _restart(20, 25.0), _restart(20, 18.0, 0.1, "async")]
    _show_kills(kills)
    _show_restarts(found, kills, 3600.0)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "best at 1 h between failures: async, every 20:" in out
    assert "restart / DeadPool: 16.7" in out
    pytest.importorskip("matplotlib")
    assert _draw(kills, found, str(tmp_path / "p.png")) == 0
    assert (tmp_path / "p.png").stat().st_size > 10000


def test_the_table_of_points_has_every_phase_that_matters(capsys: pytest.CaptureFixture[str]) -> None:
    _show({"2": [_kill()], "cold-spare": [_kill(9.0)]})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if "cold-spare" in line).split()[:3] == ["cold-spare", "1", "8.500"]


def test_what_was_lost_and_re_formed_stands_below_the_times(capsys: pytest.CaptureFixture[str]) -> None:
    far = dataclasses.replace(_kill(3.0, 7), groups=(48, 48), durable=True)
    _show({"deadpool": [dataclasses.replace(_kill(), groups=(34, 48))], "no-peer": [far, _kill(3.0, 4)]})
    near, back = capsys.readouterr().out.splitlines()[-2:]
    assert near.split() == ["deadpool", "0", "to", "0", "34", "of", "48", "memory"]
    assert back.split()[:4] == ["no-peer", "4", "to", "7"] and back.endswith("memory"), "one came from memory"
    _show({"no-peer": [far]})
    assert capsys.readouterr().out.splitlines()[-1].endswith("48 of 48  the durable generation")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["recovery", "--modes", "magic"], "--modes magic: of sync and async"),
        (["recovery", "--intervals", "0"], "--intervals 0: 1 or more"),
        (["scale", "--by", "ranks", "--points", "two"], "--points two: whole numbers above 0"),
        (["ablation", "--without", "luck"], "--without luck: of deadpool, cold-spare, timeout, no-peer, all-groups"),
        (["model", "--jobs", "1"], "--jobs must be 2 or more"),
    ],
)
def test_a_bad_option_is_one_clear_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *options, "nowhere.py"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err


def test_no_two_restarts_share_a_checkpoint_or_the_moment_of_the_kill() -> None:
    plan = _plan(argparse.Namespace(modes="sync,async", intervals="2,5", restarts=3, cold_restarts=2))
    assert len(plan) == 14 and len({name_of(*each) for each in plan}) == 14
