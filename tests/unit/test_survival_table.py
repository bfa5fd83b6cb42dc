"""The table of what it survives is made of results, names every crash point, and is the one in the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deadpool_bench.survival import BEGIN, END, merge, table
from deadpool_megatron import points
from deadpool_megatron.cli import main
from jobs import ROOT

DOCS = ROOT / "docs" / "fault-tolerance.md"
RESULTS = ROOT / "docs" / "measurements" / "faults.json"


def row(point: str, role: str = "survivor", outcome: str = "recovered", **other: Any) -> dict[str, Any]:
    base = {"trigger": "", "detected_s": 0.01, "recovered_s": 1.0, "lost_iterations": 0, "bitwise_equal": True}
    base["nodes"] = 4
    return {"point": point, "role": role, "outcome": outcome, **base, **other}


def test_the_documented_table_names_every_point_of_the_registry_and_is_made_of_the_results() -> None:
    text = DOCS.read_text()
    written = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert [name for name in points.POINTS if f"| `{name}` |" not in written] == []
    assert written == table(json.loads(RESULTS.read_text())), (
        "out of date: deadpool bench faults --write docs/fault-tolerance.md"
    )


def test_a_newer_result_takes_the_place_of_an_older_one_of_the_same_case() -> None:
    old = [row("slice.after"), row("slice.after", "spare"), row("small-state.before")]
    rows = merge(old, [row("slice.after", lost_iterations=1), row("no.such.point")])
    assert [(r["point"], r["role"], r["lost_iterations"]) for r in rows] == [
        ("small-state.before", "survivor", 0),
        ("slice.after", "spare", 0),
        ("slice.after", "survivor", 1),
    ]


def test_what_was_not_run_or_did_not_end_equal_is_said() -> None:
    text = table([row("slice.after", bitwise_equal=False)])
    assert (
        "| `slice.after` | survivor | training | recovered, **not bitwise equal** | 0.01 s | 1.00 s | 0 | 4 |" in text
    )
    assert "| `slice.before` | | | not run yet | | | | |" in text


def test_the_command_puts_results_together_and_writes_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, out = tmp_path / "doc.md", tmp_path / "faults.json"
    document.write_text(f"before\n{BEGIN}outdated\n{END}after\n")
    (tmp_path / "results").mkdir()
    command = ["bench", "faults", "--results", str(tmp_path / "results"), "--out", str(out), "--write", str(document)]
    assert main(command) == 2 and "no results in" in capsys.readouterr().err
    (tmp_path / "results" / "a.json").write_text(json.dumps([row("slice.after")]))
    assert main(command) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith(f"{END}after\n") and "outdated" not in text
    assert "`slice.after` | survivor" in text
    document.write_text("no marks")
    assert main(command) == 2 and "has no marks" in capsys.readouterr().err
