"""A connection to the coordinator that ends is not a node that is lost: real sockets, real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.coordinator.absences import Absences
from deadpool_megatron.cluster.link.reach import until_refused
from flags import tiny_gpt
from jobs import PACED, assert_same_training, launch_flags, set_pace, undisturbed
from machines import Machines, MachinesJob
from middleman import Middleman
from waiting import until

_LISTENS = """
import socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    held = []
    while True:
        held.append(listener.accept()[0])
        held[-1].sendall(b"hello")
"""


@pytest.fixture
def listener() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", _LISTENS], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def _port(listener: subprocess.Popen[str]) -> int:
    assert listener.stdout is not None
    return int(listener.stdout.readline())


def _everybody(node: int) -> bool:
    return True


def test_a_port_tells_who_lives_and_who_is_dead_and_of_who_is_stopped_nothing(listener: subprocess.Popen[str]) -> None:
    vault = r.Address("127.0.0.1", _port(listener))
    absences = Absences()
    absences.began(3, vault)
    assert until(lambda: absences.answers(_everybody), "a word", 0.01) == [(3, False)]
    listener.send_signal(signal.SIGSTOP)
    absences.over(3)
    absences.began(3, vault)
    assert absences.asks and not absences.answers(_everybody)
    listener.kill()
    assert until(lambda: absences.answers(_everybody), "the refusal", 0.01) == [(3, True)]
    assert not absences.asks and not absences.answers(_everybody)


def test_who_is_not_awaited_any_more_and_who_has_no_port_is_not_asked(listener: subprocess.Popen[str]) -> None:
    vault = r.Address("127.0.0.1", _port(listener))
    absences = Absences()
    absences.began(1, r.Address("127.0.0.1", 0))
    assert not absences.asks
    absences.began(2, vault)
    assert not absences.answers(lambda node: False) and not absences.asks


def test_asking_ends_when_it_is_stopped(listener: subprocess.Popen[str]) -> None:
    port, stopped, heard, said = _port(listener), threading.Event(), threading.Event(), list[bool]()
    asking = threading.Thread(target=lambda: said.append(until_refused(("127.0.0.1", port), stopped, heard.set)))
    asking.start()
    heard.wait()
    stopped.set()
    asking.join()
    assert said == [False]


# ---- a job


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    all_machines = Machines(tmp_path)
    yield all_machines
    all_machines.end()


@pytest.mark.timeout(300)
def test_control_connections_that_are_reset_garbled_or_dropped_cost_no_node(machines: Machines) -> None:
    """There is no spare: whoever is taken for lost ends the job."""
    iterations = 30
    flags = [*tiny_gpt("none", iters=iterations), "--tensor-model-parallel-size", "1"]
    want = undisturbed(launch_flags(2, slots=1), flags)
    hash_file = Path(f"{machines.run_dir}.hash.json")
    script = [str(PACED), *flags, "--deadpool", "--deadpool-state-hash", str(hash_file)]
    line = ["--nnodes", "2", "--emulate-cpu", "--tee", "none"]
    set_pace(machines.pace, "hold 2")
    machines.start([*line, "--node-rank", "0", "--rdzv-endpoint", f"127.0.0.1:{machines.port}"], script)
    machines.until("the coordinator", lambda: (machines.run_dir / "job.json").exists())
    between = Middleman(machines.port, spared=1)  # that of the command itself
    endpoint = ["--rdzv-endpoint", f"127.0.0.1:{between.port}"]
    machines.start([*line, "--node-rank", "1", "--no-coordinator", *endpoint], script)
    job = MachinesJob(machines)
    try:
        job.until_event("training")
        meddled = [(way, how) for how in ("changed", "of another length") for way in ("to hub", "to agent")]
        for number, fault in enumerate(["reset", "reset", "reset for the agent", "drop", *meddled]):
            job.hold(3 * number + 2)
            match fault:
                case "drop":
                    between.drop()
                case str():
                    between.reset(hub_hears=fault == "reset")
                case _:
                    between.meddle(*fault)
            again = number + 1
            machines.until(
                f"{fault}",
                lambda again=again: len(job.events("reconnected")) >= again or job.process.poll() is not None,
            )
        job.hold(None)
        assert machines.codes() == [0, 0], machines.outputs()
    finally:
        between.close()
    assert {event["node"] for event in job.events("reconnected")} == {1}
    assert not job.events("detected") and not any(event["lost"] for event in job.events("declared"))
    assert_same_training(job, want, iterations, rank=1)
