"""Faults of the control plane: a real coordinator, store and sockets, simulated agents."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deadpool_bench.control_plane.bench import SimulatedCluster
from deadpool_bench.control_plane.etcd import EtcdMembers
from deadpool_megatron.cluster.store import Deposed, Guard
from etcds import need_etcd
from waiting import until

Build = Callable[..., SimulatedCluster]
LEASE_S = 6.0
PATIENT_S = 600.0


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Makes clusters that train, and ends them."""
    made: list[SimulatedCluster] = []

    def one(active: int = 12, spares: int = 2, **more: Any) -> SimulatedCluster:
        cluster = SimulatedCluster(tmp_path / f"c{len(made)}", active, spares, 2, **{"processes": 1, **more})
        made.append(cluster)
        cluster.start()
        return cluster

    yield one
    for cluster in made:
        cluster.end()


def _recovered(cluster: SimulatedCluster, victims: list[int], times: int = 1) -> dict[str, Any]:
    """The last ``resumed``: nobody but the victims was lost, and every coordinate has a living node."""
    resumed = cluster.until("resumed", times, PATIENT_S)
    until(lambda: cluster.status()["phase"] == "training", "training", 0.1)
    status = cluster.status()
    assert [n["node"] for n in status["nodes"] if n["role"] == "lost"] == victims
    assert all(c["state"] == "training" for c in status["coordinates"])
    return resumed


def test_a_node_lost_in_the_first_iterations_is_made_good(build: Build) -> None:
    cluster = build(iteration_s=1.0)
    cluster.tell("iterate 0.1")
    cluster.until("committed", 1, PATIENT_S)
    cluster.kill(3)
    assert _recovered(cluster, [3])["iteration"] == 0


# Before a message and after it is decided, in every phase of a recovery; `persisted` is between decision and telling.
POINTS = ["persisted", *(pytest.param(point, marks=pytest.mark.slow) for point in ("declare", "agree", "form"))]


@pytest.mark.parametrize("point", POINTS)
def test_a_coordinator_killed_in_the_middle_of_a_recovery_loses_nothing(build: Build, point: str) -> None:
    cluster = build(lease=LEASE_S)
    cluster.inject(f"coordinator.{point}")
    cluster.kill(3)
    _recovered(cluster, [3])
    assert len(cluster.of("coordinator_back")) == 1, "it was killed, once"


def test_a_deposed_coordinators_decision_reaches_nobody(build: Build) -> None:
    cluster = build(lease=LEASE_S)
    cluster.store.put({"leader": b"somebody else"})  # as if its leadership had ended while it was looking elsewhere
    cluster.kill(3)
    cluster.coordinator.process.wait()
    assert not [what for what in cluster.seen() if what.startswith("declare")]
    guard = cluster.leadership.guard
    assert guard is not None
    with pytest.raises(Deposed):
        cluster.store.put({"core/now": b"too late"}, guard=Guard(*guard))


@pytest.mark.slow
def test_a_slow_agent_is_waited_for_and_not_taken_for_dead(build: Build) -> None:
    cluster = build(lease=LEASE_S, step_s={5: LEASE_S + 2.0})
    cluster.kill(3)
    _recovered(cluster, [3])


@pytest.mark.slow
def test_a_node_whose_records_are_lost_on_the_way_counts_as_lost_at_the_deadline(build: Build) -> None:
    cluster = build(12, 4, lease=60.0, abort=5.0, processes=4)
    cluster.tell("lose 1.0", [2])  # nodes 2, 6, 10 (and spare 14) go on hearing and are heard no more
    cluster.kill(3)
    declared = cluster.until("declared", 2, PATIENT_S)
    assert {2, 6, 10} <= set(declared["lost"])


# The time of day jumps by days, forth and back, in every process, many times a second.
_JUMPS = """
import random, time
_real = time.time
time.time = lambda: _real() + random.choice((-86400.0, 0.0, 3600.0, 86400.0))
"""


def test_jumps_of_the_clock_cost_nobody_the_lease(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jumps").mkdir()
    (tmp_path / "jumps" / "sitecustomize.py").write_text(_JUMPS)
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "jumps"), str(root)]))
    cluster = build(lease=LEASE_S)
    time.sleep(4.0)
    assert not cluster.of("detected")
    cluster.kill(3)
    _recovered(cluster, [3])


# ---- etcd under it


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdMembers]:
    need_etcd()
    members = EtcdMembers(tmp_path, 3)
    try:
        members.until_up()
        yield members
    finally:
        members.end()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_recovery_goes_through_while_an_etcd_member_is_gone_or_hangs(
    build: Build, etcd: EtcdMembers, signum: signal.Signals
) -> None:
    cluster = build(12, 4, store=etcd.url)
    for i, member in enumerate((0, 2)):
        etcd.kill(member, signum)
        cluster.kill(3 + i)
        _recovered(cluster, [3 + each for each in range(i + 1)], i + 1)
        if signum == signal.SIGSTOP:
            etcd.kill(member, signal.SIGCONT)
        else:
            etcd.start(member)
        etcd.until_up(f"etcd://{etcd.endpoints[member]}")


@pytest.mark.slow
def test_a_recovery_waits_for_etcd_when_all_its_members_restart_and_decides_nothing_meanwhile(
    build: Build, etcd: EtcdMembers
) -> None:
    cluster = build(store=etcd.url, lease=10.0)
    for member in range(3):
        etcd.kill(member)
    cluster.kill(3)
    time.sleep(3.0)
    assert not [what for what in cluster.seen() if what.startswith("declare")]
    for member in range(3):
        etcd.start(member)
    _recovered(cluster, [3])
