"""A job whose coordinator, or whole machine, stands still for a while goes on as if nothing had happened."""

from __future__ import annotations

import signal
import time

import pytest

from flags import duo_gpt
from jobs import Job, Jobs, launch_flags, undisturbed

ITERATIONS = 8
LEASE_S = 4.0
FLAGS = [*duo_gpt("data", iters=ITERATIONS), "--deadpool-lease", str(LEASE_S)]


def _stand_still(job: Job, leases: float, everybody: bool) -> None:
    pids = [p.pid for p in job.processes()] if everybody else [job.status()["coordinator_pid"]]
    for pid in pids:
        job.signal_process(pid, signal.SIGSTOP)
    time.sleep(leases * LEASE_S)
    for pid in pids:
        job.signal_process(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("leases", "everybody"),
    [
        pytest.param(2, False, id="the coordinator for two leases"),
        pytest.param(0.5, False, id="the coordinator for half a lease", marks=pytest.mark.slow),
        pytest.param(10, False, id="the coordinator for ten leases", marks=pytest.mark.slow),
        pytest.param(2, True, id="all processes for two leases", marks=pytest.mark.slow),
        pytest.param(10, True, id="all processes for ten leases", marks=pytest.mark.slow),
    ],
)
def test_a_standstill_costs_no_node_and_no_iteration(leases: float, everybody: bool, jobs: Jobs) -> None:
    calm = undisturbed(launch_flags(2, 0, 1), FLAGS)
    job = jobs.start("frozen", launch_flags(3, 1, 1), FLAGS, held=True)
    job.until_event("started")
    job.hold(4)
    job.until_event("committed")
    _stand_still(job, leases, everybody)
    if leases > 3 and not everybody:
        job.until_event("coordinator_back")  # its launcher has started another one
    elif leases > 1:
        job.until_event("stood_still")
    job.hold(None)
    job.finished()
    assert not job.events("detected") and not job.events("declared")
    assert job.hashes() == calm.hashes() and job.printed(1) == calm.printed(1) != {}


@pytest.mark.slow
def test_a_node_that_is_lost_while_the_coordinator_stands_still_is_replaced(jobs: Jobs) -> None:
    calm = undisturbed(launch_flags(2, 0, 1), FLAGS)
    job = jobs.start("frozen", launch_flags(3, 1, 1), FLAGS, held=True)
    job.until_event("started")
    job.hold(4)
    job.until_event("committed")
    coordinator = job.status()["coordinator_pid"]
    job.signal_process(coordinator, signal.SIGSTOP)
    job.kill_node(0)
    time.sleep(2 * LEASE_S)
    job.signal_process(coordinator, signal.SIGCONT)
    job.until_event("declared")
    job.hold(None)
    job.finished()
    assert [e["node"] for e in job.events("detected")] == [0]
    assert job.hashes() == calm.hashes()


def test_a_coordinator_that_never_wakes_is_started_again_and_the_recovery_goes_through(jobs: Jobs) -> None:
    """With it stands the store over which process groups are formed."""
    calm = undisturbed(launch_flags(2, 0, 1), FLAGS)
    flags = [*FLAGS[:-1], "2"]  # the lease
    job = jobs.start("hangs", launch_flags(3, 1, 1), flags, held=True)
    job.until_event("started")
    job.hold(4)
    job.until_event("committed")
    job.signal_process(job.status()["coordinator_pid"], signal.SIGSTOP)
    job.kill_node(0)
    job.hold(None)
    job.finished()
    assert len(job.events("coordinator_back")) == 1
    assert "the rendezvous store in it, has not answered for" in job.output
    assert [e["node"] for e in job.events("detected")] == [0]
    assert job.hashes() == calm.hashes()
