"""The benches measure real jobs: kills, restarts with a warm standby, frozen nodes; and end them when interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deadpool_bench.control_plane.decisions import Decisions, dealt
from flags import tiny_gpt
from jobs import EXAMPLE, ROOT
from waiting import until

BENCH = [sys.executable, "-m", "deadpool_megatron.cli", "bench"]
ONE = ["--active-nodes", "2", "--nproc-per-node", "1", "--emulate-cpu"]
SCRIPT = [str(EXAMPLE), *tiny_gpt("none", iters=4000), "--tensor-model-parallel-size", "1"]


def _run(*options: str, out: Path, codes: tuple[int, ...] = (0,)) -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*BENCH, *options, "--out", str(out), *SCRIPT], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode in codes, done.stdout + done.stderr
    said: dict[str, object] = json.loads(out.read_text())
    return said


def test_a_bench_and_the_processes_it_starts_are_found_where_the_package_alone_is_installed(tmp_path: Path) -> None:
    """As with `pip install -e .`, which puts nothing else of the repository on Python's path."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "deadpool_megatron").symlink_to(ROOT / "deadpool_megatron")
    small = ["--agents", "16", "--stores", "embedded", "--runs", "1", "--restarts", "6", "--steady", "0"]
    done = subprocess.run(
        [*BENCH, "control", *small, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "out" / "control.json").read_text())
    assert found["agents"] == 16 and len(found["kills"]) == len(found["restarts"]) == 1


def test_workers_of_many_nodes_that_end_at_once_are_one_recovery(tmp_path: Path) -> None:
    """The real coordinator without sockets, as `bench control --decisions` times it."""
    job = Decisions(tmp_path, active=15, spares=1, slots=4)
    assert job.commits() > 0
    assert job.restart(dealt(60, 4, [*job.nodes])) > 0
    assert job.core.epoch == 1 and job.core.nodes[15].role == "spare", "in place: no spare is spent"
    assert job.kill(3) > 0
    assert job.core.epoch == 2 and job.core.nodes[15].role == "active"
    job.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_and_a_restart_with_a_warm_standby_are_measured_in_one_run(tmp_path: Path) -> None:
    said = _run(
        *["recovery", "--kills", "1", "--restarts", "1", "--modes", "sync", "--intervals", "3", "--cold-restarts", "0"],
        *ONE,
        out=tmp_path / "out.json",
    )
    (kill,), (restart,) = said["kills"], said["restarts"]  # type: ignore[misc]
    assert kill["phases"]["detected"] < kill["phases"]["resumed"] < kill["first_iteration_s"]
    assert restart["warm"] and 0 < restart["ended_s"] < restart["first_iteration_s"]
    assert 0 <= restart["lost_iterations"] <= 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_frozen_node_is_seen_by_the_lease_and_a_cold_spare_takes_longer_than_a_warm_one(tmp_path: Path) -> None:
    said = _run("ablation", "--without", "deadpool,cold-spare,timeout", "--kills", "1", *ONE, out=tmp_path / "out.json")
    found = {name: rows[0] for name, rows in said["recoveries"].items()}  # type: ignore[attr-defined]
    assert found["timeout"]["phases"]["detected"] > found["deadpool"]["phases"]["detected"]
    assert found["cold-spare"]["phases"]["prepared"] > found["deadpool"]["phases"]["prepared"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_a_peers_copy_a_loss_goes_back_to_the_disk_and_without_keeping_all_groups_are_re_formed(
    tmp_path: Path,
) -> None:
    names = "deadpool,no-peer,all-groups"
    said = _run("ablation", "--without", names, "--kills", "1", *ONE, out=tmp_path / "out.json")
    found = {name: rows[0] for name, rows in said["recoveries"].items()}  # type: ignore[attr-defined]
    assert not found["deadpool"]["durable"] and found["no-peer"]["durable"]
    assert found["no-peer"]["lost_iterations"] > 0
    assert found["deadpool"]["lost_iterations"] <= 1 and found["all-groups"]["lost_iterations"] <= 1
    kept, all_of_them = found["deadpool"]["groups"], found["all-groups"]["groups"]
    assert 0 < kept[0] < kept[1] == all_of_them[0] == all_of_them[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_loss_without_a_spare_and_the_growth_after_it_are_measured_in_the_run_of_the_kills(tmp_path: Path) -> None:
    said = _run("recovery", "--kills", "0", "--shrinks", "1", "--modes", "", *ONE, out=tmp_path / "out.json")
    shrunk, grown = said["shrinks"]["DeadPool"]  # type: ignore[index]
    assert (shrunk["event"], shrunk["width"], grown["event"], grown["width"]) == ("shrunk", 1, "grown", 2)
    for each in (shrunk, grown):
        assert 0 < each["iteration_s"] < each["first_iteration_s"] and each["lost_iterations"] >= 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_widths_of_a_job_that_shrinks_and_grows_are_measured_in_turn(tmp_path: Path) -> None:
    blocks = ["--cycles", "2", "--block", "3", "--warmup", "1", "--cores", "0:0"]
    said = _run("widths", *blocks, "--forked", *ONE, out=tmp_path / "out.json")
    assert said["widths"] == [2, 1, 2, 1]
    assert [len(block) for name in ("full", "narrow") for block in said[name]] == [3] * 4  # type: ignore[attr-defined]
    assert said["ratio"]["ideal"] == 2 and said["ratio"]["low"] <= said["ratio"]["high"]  # type: ignore[index]
    changes = said["changes"]
    assert [(c["event"], c["width"]) for c in changes] == [("shrunk", 1), ("grown", 2), ("shrunk", 1)]  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_shrinks_and_grows_is_held_against_the_model(tmp_path: Path) -> None:
    few = ["--strategy", "shrink", "--faults", "1", "--gap", "1", "--repair", "0", "--forked"]
    said = _run("model", *few, *ONE, out=tmp_path / "out.json", codes=(0, 1))  # how near the model is, is not tested
    for row in said["jobs"]:  # type: ignore[attr-defined]
        costs = {name: len(seconds) for name, seconds in row["job"]["costs_s"].items()}
        assert costs == {"recovery": 0, "shrink": 1, "growth": 1} and len(row["job"]["repairs_s"]) == 1
        assert 0 < row["model"] < 1


@pytest.mark.slow
def test_an_interrupted_bench_leaves_no_process(tmp_path: Path) -> None:
    bench = subprocess.Popen(
        [*BENCH, "scale", "--by", "ranks", "--points", "2", *ONE, *SCRIPT],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    under = psutil.Process(bench.pid)
    until(lambda: len(under.children(recursive=True)) >= 5, "the processes of the measurement")
    children = under.children(recursive=True)
    bench.send_signal(signal.SIGTERM)
    _, err = bench.communicate()
    assert bench.returncode == 130 and "every process of the measurement is ended" in err
    psutil.wait_procs(children)
