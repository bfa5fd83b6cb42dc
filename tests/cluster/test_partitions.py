"""Nodes as network namespaces: a pulled cable, a cable that carries one way only, a slow and lossy network.

Three nodes and a coordinator, each on a host of its own. Whatever is done to the network, the reachable majority goes
on, who is cut off fences itself, and the run ends as if nothing had happened. Needs root; skipped where namespaces are
not allowed::

    python -m pytest tests/cluster/test_partitions.py            # one cut, and a node that wakes up after one
    python -m pytest -m slow tests/cluster/test_partitions.py    # one-way cuts, delay and loss
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deadpool_megatron.cluster.records.exits import Exit
from flags import duo_gpt
from jobs import PACED, Job, Jobs, launch_flags, set_pace
from machines import Machines, MachinesJob
from namespaces import Network, why_not

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
ITERATIONS, LEASE_S = 100, 6.0
FLAGS = [*duo_gpt("pipeline", iters=ITERATIONS), "--deadpool-lease", str(LEASE_S)]


class Nodes:
    """A job on its hosts: the coordinator on host 0, node n on host n + 1."""

    def __init__(self, directory: Path, network: Network) -> None:
        self.network = network
        self.machines = Machines(directory)
        self._pace = directory / "pace"
        self._env = {"PACE_FILE": str(self._pace), "GLOO_SOCKET_IFNAME": "eth0"}
        self.pace(0.2)
        hash_file = f"{self.machines.run_dir}.hash.json"
        self._script = [str(PACED), *FLAGS, "--deadpool", "--deadpool-state-hash", hash_file]
        self._line = ["--nnodes", "3", "--spare-nodes", "1", "--nproc-per-node", "1", "--emulate-cpu", "--tee", "none"]
        self._line += ["--rdzv-endpoint", f"{network.address(0)}:29500", "--no-coordinator"]
        self._command: dict[int, int] = {}  # of a host: its newest command
        self._start(0, [], "coordinator")
        for node in range(3):
            self._start(node + 1, ["--node-rank", str(node)])
        self.job = MachinesJob(self.machines)
        self._host = {node: node + 1 for node in range(3)}

    def _start(self, host: int, options: list[str], command: str = "agent") -> None:
        line = [part for part in self._line if command == "agent" or part != "--no-coordinator"]
        if command == "agent":
            line += ["--local-addr", self.network.address(host)]
        self._command[host] = len(self.machines.started)
        self.machines.start([*line, *options], self._script, self._env, command, self.network.command(host))

    def pace(self, seconds: float) -> None:
        """What a forward pass sleeps."""
        set_pace(self._pace, seconds)

    def node_of(self, rank: int) -> int:
        node: int = self.job.status()["coordinates"][rank]["node"]
        return node

    def host_of(self, rank: int) -> int:
        return self._host[self.node_of(rank)]

    def parked(self) -> None:
        """Until there is a spare and the job trains."""

        def ready() -> bool:
            if not self.job.events("training"):
                return False
            status = self.job.status()
            return status["phase"] == "training" and any(s["state"] == "parked" for s in status["spares"])

        self.job.until("a parked spare", ready)
        self.commits()

    def commits(self) -> None:
        """Until generations of this epoch are committed."""
        epoch = self.job.status()["epoch"]
        self.job.until("a commit", lambda: [e for e in self.job.events("committed")[-1:] if e["epoch"] == epoch])

    def loses(self, rank: int, fault: Any) -> int:
        """A fault that costs the node of a coordinate; its host. Nothing ends, so that silence alone can tell."""
        node, host, before = self.node_of(rank), self.host_of(rank), len(self.job.events("resumed"))
        fault(host)
        self.job.until("the recovery", lambda: len(self.job.events("resumed")) > before)
        assert len([e for e in self.job.events("detected") if e["node"] == node]) == 1
        assert self.node_of(rank) != node
        return host

    def fenced(self, host: int) -> None:
        """The command of a host ends by itself, fenced, and leaves no process."""
        assert self.machines.code(self._command[host]) == Exit.FENCED
        job = self.network.names[host]
        with open(f"/run/netns/{job}") as f:
            there = os.fstat(f.fileno()).st_ino

        def empty() -> bool:
            return not [p for p in psutil.pids() if _namespace(p) == there]

        self.machines.until(f"no process on host {host}", empty)

    def comes_back(self, host: int) -> None:
        """The same command again: the node becomes a spare."""
        number = len(self.job.events("joined"))
        self._start(host, ["--node-rank", str(host - 1)])
        self.job.until("the node that comes back", lambda: len(self.job.events("joined")) > number)
        self._host[self.job.events("joined")[-1]["node"]] = host
        self.parked()

    def processes(self, host: int) -> list[psutil.Process]:
        """All of a node, its command included."""
        command = psutil.Process(self.machines.started[self._command[host]].pid)
        return [command, *command.children(recursive=True)]

    def finish(self, want: Job) -> None:
        """Train to the end; compare with the undisturbed run."""
        self.pace(0)
        assert self.machines.code(0) == 0, self.machines.outputs()
        expected = {iteration: exact for iteration, *exact in want.exact()}
        assert [i for i, *exact in self.job.exact() if exact != expected[i]] == []
        assert self.job.hashes() == want.hashes()


def _namespace(pid: int) -> int:
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    return -1


@pytest.fixture(scope="module")
def undisturbed(module_jobs: Jobs) -> Job:
    pace = module_jobs.directory / "pace"
    pace.write_text("0")
    job = module_jobs.start("calm", launch_flags(2, 0, 1), FLAGS, PACED, extra={"PACE_FILE": str(pace)})
    return job.finished()


@pytest.fixture
def nodes(tmp_path: Path, undisturbed: Job) -> Iterator[Nodes]:
    with Network(4) as network:
        nodes = Nodes(tmp_path, network)
        try:
            yield nodes
        finally:
            nodes.machines.end()


@pytest.mark.timeout(300)
def test_a_node_that_is_cut_off_fences_itself_and_what_wakes_up_after_a_cut_is_sent_away(
    nodes: Nodes, undisturbed: Job
) -> None:
    nodes.parked()
    # The cable is pulled: no FIN, no RST. The node ends its worker although nobody can tell it to.
    host = nodes.loses(0, nodes.network.cut)
    nodes.fenced(host)
    nodes.network.heal()
    nodes.comes_back(host)
    # A node is frozen, declared lost, and wakes up in a network that is whole: it can reach everybody again.
    frozen: list[psutil.Process] = []

    def freeze(host: int) -> None:
        frozen.extend(nodes.processes(host))
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        nodes.network.cut(host)

    host = nodes.loses(1, freeze)
    epoch = nodes.job.status()["epoch"]
    nodes.network.heal()
    for process in frozen:
        process.send_signal(signal.SIGCONT)
    nodes.fenced(host)
    nodes.commits()
    assert nodes.job.status()["epoch"] == epoch
    nodes.finish(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_way_cuts_delay_and_loss(nodes: Nodes, undisturbed: Job) -> None:
    nodes.parked()
    # Slow and lossy for three leases: nobody is lost, training goes on.
    done = nodes.job.status()["iteration"]
    nodes.network.worsen(0.02, 0.01)
    time.sleep(3 * LEASE_S)
    nodes.job.until("progress", lambda: nodes.job.status()["iteration"] > done + 1)
    nodes.network.heal()
    assert nodes.job.status()["epoch"] == 0 and nodes.network.lost > 0
    # What it sends does not arrive; it hears the others.
    host = nodes.loses(0, lambda host: nodes.network.cut(host, into=False))
    nodes.fenced(host)
    nodes.network.heal()
    nodes.comes_back(host)
    # It hears nobody; the others hear it.
    host = nodes.loses(1, lambda host: nodes.network.cut(host, out=False))
    nodes.fenced(host)
    nodes.network.heal()
    nodes.comes_back(host)
    nodes.finish(undisturbed)


def test_nothing_of_a_network_is_left() -> None:
    with Network(2) as network:
        assert set(network.names) <= set(os.listdir("/run/netns"))
    assert not set(network.names) & set(os.listdir("/run/netns"))
