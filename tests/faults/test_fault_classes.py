"""Every class of failure, one after the other in one run that ends bitwise equal to the undisturbed one."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.jobs.descendants import has_ended
from flags import tiny_gpt
from jobs import PACED, Jobs, launch_flags, set_pace, undisturbed

FEW, MANY = 140, 260
WAITING_S = "0.2"  # that a forward pass sleeps: a second an iteration


def small(iterations: int) -> list[str]:
    """Four coordinates, PP2 x DP2, on four nodes of one slot."""
    flags = tiny_gpt("1f1b", iters=iterations)
    flags[flags.index("--tensor-model-parallel-size") + 1] = "1"
    return [*flags, "--deadpool-hang-floor", "4", "--deadpool-lease", "6"]


class Drama:
    """A job with parked spares, and the faults that are done to it.

    It is slow until `finished` is called: new spares take as long as the machine is busy, and the job has to be there.
    """

    def __init__(self, jobs: Jobs, name: str, nodes: int, spares: int, iterations: int) -> None:
        self._pace = jobs.directory / f"{name}.pace"
        set_pace(self._pace, WAITING_S)
        paced = {"PACE_FILE": str(self._pace)}
        self.job = jobs.start(name, launch_flags(nodes, spares, 1), small(iterations), PACED, extra=paced)
        self.joined: list[subprocess.Popen[bytes]] = []
        self.parked(spares)

    def command(self, *command: str) -> str:
        """Run a `deadpool` command on the job; its output."""
        done = self.job.command(*command)
        if done.returncode:
            self.job.failed(f"{command}: {done.stderr}")
        return done.stdout

    def join(self) -> None:
        """A new node, in the background."""
        self.joined.append(self.job.join())

    def parked(self, spares: int) -> None:
        """Until so many spares are parked."""
        self.job.until(f"{spares} parked spares", lambda: self._parked() >= spares)

    def _parked(self) -> int:
        if not self.job.events("training"):
            return 0
        return sum(s["state"] == "parked" for s in self.job.status()["spares"])

    def node_of(self, rank: int) -> int:
        """Where a coordinate is now."""
        node: int = self.job.status()["coordinates"][rank]["node"]
        return node

    def recovers(self, fault: Callable[[], Any]) -> dict[str, Any]:
        """A fault, and the event with which the job has come through it."""
        before = len(self.job.events("resumed"))
        fault()
        self.job.until("the recovery", lambda: len(self.job.events("resumed")) > before)
        resumed = self.job.events("resumed")[before]
        told = self.job.status()
        assert (told["t"], told["epoch"]) >= (resumed["t"], resumed["epoch"]), "status.json is older than the log"
        return resumed

    @contextlib.contextmanager
    def its_port_is_taken(self, seconds: float) -> Iterator[None]:
        """What ends the coordinator goes in here; it cannot listen where it did for so long, and is started again."""
        host, port = json.loads((self.job.run_dir / "job.json").read_text())["coordinator"].split(":")
        self.job.process.send_signal(signal.SIGSTOP)  # it would start it again at once
        try:
            coordinator = psutil.Process(self.job.status()["coordinator_pid"])
            yield
            self.job.until("its end", lambda: has_ended(coordinator))
            other = socket.create_server((host, int(port)))
        finally:
            self.job.process.send_signal(signal.SIGCONT)
        with other:
            time.sleep(seconds)

    def finished(self) -> None:
        """Wait for the end, at full pace, of the job and of the nodes that have joined: they leave with it."""
        set_pace(self._pace, "0")
        self.job.finished()
        for process in self.joined:
            process.wait()


@pytest.mark.timeout(400)
def test_a_run_comes_through_every_class_of_failure_and_ends_as_if_nothing_had_happened(
    jobs: Jobs,
) -> None:
    want = undisturbed(launch_flags(4, 0, 1), small(FEW))
    drama = Drama(jobs, "drama", 5, 1, FEW)
    job = drama.job
    drama.join()
    # A worker dies: a spare takes over, the healthy node becomes a spare.
    victim = drama.node_of(1)
    drama.recovers(lambda: drama.command("inject", "--node", str(victim), "--fault", "kill-worker"))
    assert drama.node_of(1) != victim and victim in {s["node"] for s in job.status()["spares"]}
    # The coordinator dies, and its port is taken for a moment: training does not notice.
    epoch, coordinator = job.status()["epoch"], job.status()["coordinator_pid"]
    with drama.its_port_is_taken(1.0):
        drama.command("inject", "--fault", "kill-coordinator")
    job.until("another coordinator", lambda: job.status()["coordinator_pid"] != coordinator)
    committed = job.status()["generation"]["committed"]
    job.until("commits", lambda: job.status()["generation"]["committed"] > committed)
    assert job.status()["epoch"] == epoch
    drama.parked(1)
    # A node is drained at a step boundary: no iteration is begun twice.
    leaving = drama.node_of(0)
    # Reports of iterations may have gone to the coordinator that died.
    begun = max(e["iteration"] for e in job.until("an iteration's report", lambda: job.events("iteration")))
    resumed = drama.recovers(lambda: drama.command("drain", "--node", str(leaving)))
    assert resumed["iteration"] > begun and drama.node_of(0) != leaving
    drama.parked(1)
    # A worker stops without a word: found by the lease, its stacks kept.
    stopped = drama.node_of(2)
    drama.recovers(lambda: drama.command("inject", "--node", str(stopped), "--fault", "stop"))
    assert [e["rank"] for e in job.events("stuck")] == [2]
    assert "Python stacks" in (job.run_dir / "logs" / f"stacks-node{stopped}-0.txt").read_text()
    # The agent dies, its worker lives: the node is lost and its worker ends at once.
    lost, orphan = drama.node_of(3), job.pids()[3]
    drama.parked(1)
    drama.recovers(lambda: drama.command("inject", "--node", str(lost), "--fault", "kill-agent"))
    assert not Path(f"/proc/{orphan}").exists() or "zombie" in Path(f"/proc/{orphan}/status").read_text()
    drama.finished()
    assert job.hashes() == want.hashes()
    expected = {iteration: exact for iteration, *exact in want.exact()}
    for iteration, *exact in job.exact():
        assert exact == expected[iteration], f"iteration {iteration} differs"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_hangs_damaged_copies_and_slow_nodes(jobs: Jobs) -> None:
    want = undisturbed(launch_flags(4, 0, 1), small(MANY))
    drama = Drama(jobs, "more-drama", 6, 2, MANY)
    job = drama.job
    # A deadlock in the worker's own code: the rank that waits for nobody.
    at = max((e["iteration"] for e in job.events("iteration")), default=0) + 10
    drama.recovers(lambda: job.inject(drama.node_of(3), at, 3, "--fault", "hang"))
    assert [e["rank"] for e in job.events("stuck")] == [3]
    # Bytes of a copy are damaged, then its owner's worker dies: the other copy is used.
    damaged = drama.node_of(0)
    drama.command("inject", "--node", str(damaged), "--fault", "corrupt")
    drama.recovers(lambda: drama.command("inject", "--node", str(damaged), "--fault", "kill-worker"))
    # A node that is slower than its peers is named.
    slow = drama.node_of(1)
    at = max(e["iteration"] for e in job.events("iteration")) + 10
    job.inject(slow, at, 1, "--fault", "slow", "--seconds", "0.3")
    # (Where processes outnumber the processors others may be slow as well, for a while.)
    named = job.until("the straggler", lambda: [e for e in job.events("straggler") if e["node"] == slow])[0]
    assert f"--node {slow}" in named["advice"]
    drama.parked(1)
    drama.command("drain", "--node", str(slow))
    drama.finished()
    assert job.hashes() == want.hashes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_bug_ends_the_job_with_its_traceback_and_spends_one_spare_on_it(jobs: Jobs) -> None:
    job = jobs.start("bug", launch_flags(4, 0, 1), small(200))
    job.until("the first iteration", lambda: job.events("iteration"))
    job.inject(3, 60, 2, "--fault", "raise")
    assert job.wait() == Exit.REPEATED_ERROR
    assert "raised the same error at iteration 60 again" in job.output and "InjectedError" in job.output
