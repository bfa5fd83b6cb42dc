"""What `deadpool bench overhead` says follows from the blocks its ranks have written, whole or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deadpool_bench.blocks import cpu_per_iteration, pairs, read_ranks, seconds, snapshot_report, timeline
from deadpool_megatron import cli

ACCOUNT = {"blocked_s": 0.01, "gate_s": 0.0, "device_stall_s": 0.0, "copied_bytes": 100, "copied_s": 0.1}
ACCOUNT |= {"bandwidth": 1e9, "skipped": 3}


def _line(block: int, on: bool, each_s: float, agent: int = 7, agent_s: float = 0.5) -> str:
    rows = [{"iteration": 2 * block + n, "seconds": each_s, "cpu": each_s / 2, "account": ACCOUNT} for n in range(2)]
    return json.dumps({"block": block, "on": on, "agent": agent, "agent_s": agent_s, "rows": rows}) + "\n"


def _write(directory: Path, rank: int, *lines: str) -> None:
    (directory / f"rank-{rank}.jsonl").write_text("".join(lines))


def test_what_a_killed_rank_was_writing_does_not_count(tmp_path: Path) -> None:
    blocks = [_line(-1, True, 9.0), _line(0, True, 1.2), _line(1, False, 1.0), _line(2, False, 1.1)]
    _write(tmp_path, 0, *blocks, _line(3, True, 1.3)[:-9])
    ranks = read_ranks(tmp_path)
    assert pairs(ranks) == [([1.2, 1.2], [1.0, 1.0])]  # the third block has no partner
    assert seconds(ranks) == [1.2, 1.2, 1.0, 1.0, 1.1, 1.1]
    assert timeline(ranks) is None
    _write(tmp_path, 0, *blocks, _line(3, True, 1.3), json.dumps({"agent": 7, "timeline": {"marks": []}}) + "\n")
    assert pairs(read_ranks(tmp_path))[1] == ([1.3, 1.3], [1.1, 1.1])
    assert timeline(read_ranks(tmp_path)) == {"marks": []}


def test_the_agent_of_several_workers_counts_once(tmp_path: Path) -> None:
    for rank, agent in ((0, 7), (1, 7), (2, 8)):
        _write(
            tmp_path, rank, _line(-1, True, 9.0, agent), _line(0, True, 1.0, agent), _line(1, False, 2.0, agent, 0.1)
        )
    found = cpu_per_iteration(read_ranks(tmp_path))
    assert found["workers_on"] == pytest.approx(3 * 0.5) and found["workers_off"] == pytest.approx(3 * 1.0)
    assert found["agents_on"] == pytest.approx(2 * 0.5 / 2) and found["agents_off"] == pytest.approx(2 * 0.1 / 2)


def test_the_report_is_of_measured_iterations_with_snapshots(tmp_path: Path) -> None:
    _write(tmp_path, 0, _line(-1, True, 0.001))
    assert snapshot_report(read_ranks(tmp_path), {}, []) is None
    _write(tmp_path, 0, _line(-1, True, 0.001), _line(0, True, 1.0), _line(1, False, 0.001))
    report = snapshot_report(read_ranks(tmp_path), {}, [{"iteration": 1, "seconds": 2.0, "commit_s": 1.0}])
    assert report is not None
    assert report["blocked_share"]["max"] == pytest.approx(0.01)
    assert (report["generations"], report["skipped"], report["commit_share"]) == (2, 3, 0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cores", "0"], "expected two lists of processors"),
        (["--cores", "0:0"], "processors of their own"),
        (["--cores", "0:"], "processors of their own"),
        (["--cores", "0:99999"], "may not use processor 99999"),
        (["--minutes", "0.5"], "--minutes must be at least 1"),
        (["--blocks", "5"], "even number"),
        (["--checkpoints", "never"], "'never' is not one of its choices"),
        ([], "script.py: there is no such script"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "overhead", *options, "script.py"]) == 2
    assert said in capsys.readouterr().err
