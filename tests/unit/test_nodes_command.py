"""`deadpool nodes` lists the machines of a job with what has failed there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deadpool_megatron.cli import main


def _status(nodes: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    spares = [{"node": n["node"], "state": "parked", "pids": []} for n in nodes if n["role"] == "spare"]
    return {"phase": "training", "nodes": nodes, "coordinates": [], "spares": spares, **more}


def _write(run: Path, status: dict[str, Any]) -> None:
    (run / "status.json").write_text(json.dumps(status))


def test_a_line_for_each_node_with_its_failures_and_domains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failures = [[1e9, "worker", "rank 3 ended (signal 9)"], [1e9 + 60, "lost", "its agent is gone or silent"]]
    nodes = [
        {"node": 0, "name": "m0", "role": "active", "agent_pid": 1, "domains": {"rack": "r1", "nvlink": "n1"}},
        {"node": 1, "name": "m1", "role": "spare", "agent_pid": 2, "failures": failures, "lemon": True},
        {"node": 2, "name": "m2", "role": "lost", "agent_pid": 3, "failures": failures[:1], "lemon": True},
    ]
    _write(tmp_path, _status(nodes, covered=["losses that spares of the same rack domain cover: none of r1"]))
    assert main(["nodes", "--run-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = " ".join(" ".join(lines).split())  # as it is without line breaks
    assert any(line.split()[:3] == ["0", "m0", "active"] and "rack r1 nvlink n1" in line for line in lines)
    (lemon,) = (line for line in lines if "spare, lemon" in line)
    assert lemon.split()[:2] == ["1", "m1"] and "2 failures" in lemon
    assert shown.index("lost: its") < shown.index("worker: rank 3"), "the newest first"
    assert "none of r1" in lines[-1]
    assert main(["nodes", "--run-dir", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told[1]["lemon"] and told[1]["failures"][1] == {"t": 1e9 + 60, "kind": "lost", "cause": failures[1][2]}
    assert told[0]["domains"] == {"rack": "r1", "nvlink": "n1"} and not told[0]["failures"]


def test_no_job_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nodes", "--run-dir", str(tmp_path / "nowhere")]) == 2
    assert "name a job's directory with --run-dir" in capsys.readouterr().err
