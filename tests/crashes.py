"""Crash points in a running job, one after the other: arm, trigger, strike, recover, and what that took.

`Gauntlet` is one job with spares that are made good by `deadpool join`, so that one run passes many points. Which
points there are, and whom they befall, is in `crash_cases`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from crash_cases import Case
from deadpool_bench.harness.jobs import fork_cli
from deadpool_megatron.jobs.descendants import Descendants
from deadpool_megatron.observe import LOGS, EventTail
from deadpool_megatron.vault import PREFIX, Arena
from flags import duo_gpt, tiny_gpt, with_value
from jobs import PACED, Job, Jobs, environment, launch_flags, set_pace

__all__ = ["Gauntlet", "Result", "differences", "gauntlet_flags", "results", "write_results"]

CALM_S, WAITING_S = "0", "0.5"  # seconds that a forward pass sleeps
STRIKE_S = 120.0
RECOVERY_S = 150.0
# 2 takes half the processors and shows the same, but for what loses a node and its peer's.
COORDINATES = int(os.environ.get("DEADPOOL_TEST_COORDINATES", "4"))
_STRIKES = re.compile(r"deadpool: fault \S+ strikes (.+?) at ([\d.]+)")


@dataclass(frozen=True)
class Result:
    """What became of one case. Times are seconds from the strike; None where they do not apply."""

    point: str
    role: str
    fault: str
    trigger: str
    outcome: str
    detected_s: float | None
    recovered_s: float | None
    lost_iterations: int
    epochs: int
    nodes: int = COORDINATES
    bitwise_equal: bool = False


def gauntlet_flags(iterations: int) -> list[str]:
    """PP2 x DP2 (or DP2) on nodes of one slot; every deadline short enough for a test to see it."""
    flags = with_value(tiny_gpt("1f1b", iters=iterations), "--tensor-model-parallel-size", 1)
    if COORDINATES == 2:
        flags = duo_gpt("data", iters=iterations)
    deadlines = ["--deadpool-lease", "3", "--deadpool-abort-deadline", "20", "--deadpool-build-deadline", "120"]
    # A spare that has just taken over has no pace of its own yet: what counts for it is the limit outside of steps.
    hangs = ["--deadpool-hang-floor", "6", "--deadpool-hang-outside", "60"]
    return [*flags, *hangs, "--deadpool-form-deadline", "10", *deadlines]


class Gauntlet:
    """A job that has to come through every case it is shown.

    Args:
        spares: parked spares there are at every case.
        paced: its training script sleeps while a case is prepared.
    """

    def __init__(
        self, jobs: Jobs, name: str, iterations: int, spares: int = COORDINATES // 2, more: Sequence[str] = ()
    ) -> None:
        self._pace = jobs.directory / f"{name}.pace"
        self.pace(CALM_S)
        self.job: Job = jobs.start(
            name,
            launch_flags(COORDINATES + spares, spares, 1),
            [*gauntlet_flags(iterations), *more],
            PACED,
            extra={"PACE_FILE": str(self._pace)},
        )
        self.results: list[Result] = []
        self._spares = spares
        self._joined: list[subprocess.Popen[Any]] = []
        self._family = Descendants()
        self._errors = open(jobs.directory / f"{name}.joined.out", "wb")  # noqa: SIM115 - closed in `end`
        self._tail = EventTail(self.job.run_dir)
        self._events: list[dict[str, Any]] = []

    # ---- what can be seen

    def events(self, name: str, since: float = 0.0) -> list[dict[str, Any]]:
        """Events of a name from a moment on (wall clock, seconds)."""
        self._events += self._tail.read()
        return [e for e in self._events if e["event"] == name and e["t"] >= since]

    def status(self) -> dict[str, Any]:
        """The job's; empty before there is one."""
        with contextlib.suppress(FileNotFoundError):
            return self.job.status()
        return {}

    def parked(self) -> list[int]:
        """Spare nodes that are ready, lowest number first: the first one is taken first."""
        return [s["node"] for s in self.status().get("spares", ()) if s["state"] == "parked"]

    def node_of(self, rank: int) -> int:
        """Where a coordinate is."""
        node: int = self.job.status()["coordinates"][rank % COORDINATES]["node"]
        return node

    def strikes(self, victim: str) -> list[float]:
        """When a fault struck: ``node 3`` or ``the coordinator``."""
        logs = [p for p in (self.job.run_dir / LOGS).glob("*.log") if not p.is_symlink()]
        texts = [p.read_text(errors="replace") for p in (*logs, Path(self._errors.name))] + [self.job.output]
        return sorted(float(t) for text in texts for who, t in _STRIKES.findall(text) if who == victim)

    # ---- what can be done

    def pace(self, seconds: str) -> None:
        """What a forward pass sleeps from now on. The file is there and whole at any time."""
        set_pace(self._pace, seconds)

    def command(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a `deadpool` command on the job."""
        done = self.job.command(*command)
        if check and done.returncode:
            self.job.failed(f"{command}: {done.stderr}")
        return done

    def background(self, *command: str) -> subprocess.Popen[Any]:
        """The same without waiting."""
        line = [command[0], "--run-dir", str(self.job.run_dir), *command[1:]]
        process = fork_cli(
            line, environment(self._family.environment, forked=True), stdout=subprocess.DEVNULL, stderr=self._errors
        )
        self._joined.append(process)
        return process

    def settle(self) -> None:
        """Until everybody trains, the newest generation is committed and enough spares are parked."""
        self.pace(WAITING_S)
        asked = 0.0

        def ready() -> bool:
            nonlocal asked
            status = self.status()
            if status.get("phase") != "training" or len(self.parked()) < self._spares:
                coming = len(status.get("spares", ())) >= self._spares
                if status.get("phase") == "training" and not coming and time.monotonic() - asked > 8.0:
                    asked = time.monotonic()
                    for _ in range(self._spares - len(status["spares"])):
                        self.background("join")
                return False
            epoch = status["epoch"]
            gone = {n["node"] for n in status["nodes"] if n["role"] in ("lost", "left")}
            if gone & {c["node"] for c in status["coordinates"]}:
                return False
            newest = self.events("committed")[-1:]
            return any(e["epoch"] == epoch and e["iteration"] >= status["iteration"] for e in newest)

        self.job.until("a settled job", ready)

    def face(self, case: Case) -> Result:
        """Let one case happen and wait until the job has come through it."""
        self.settle()
        begun = time.time()
        before = self.job.status()
        victim, strikes = self._arm(case)
        self._trigger(case, before)
        self.pace("0.02")
        struck = self.job.until(f"strike at {case}", lambda: self.strikes(victim)[strikes:], STRIKE_S)[0]
        node = int(victim.split()[1]) if victim.startswith("node") else None
        if node is None:
            pid = before["coordinator_pid"]
            self.job.until("another coordinator", lambda: self.status()["coordinator_pid"] != pid, RECOVERY_S)
        else:
            self.job.until(
                f"detection at {case}",
                lambda: [e for e in self.events("detected", begun) if e["node"] == node],
                RECOVERY_S,
            )
        self.job.until(f"recovery at {case}", lambda: self._trains(struck), RECOVERY_S)
        result = self._result(case, node, begun, struck, before["epoch"])
        self.results.append(result)
        print(f"{case}: {result.outcome}, detected {result.detected_s}, recovered {result.recovered_s}, "
              f"lost {result.lost_iterations}", flush=True)  # fmt: skip
        return result

    def suffer(self, fault: Sequence[str], event: str, rank: int) -> dict[str, Any]:
        """One fault of those that strike at once: what it took until ``event`` told of it and the job trained again."""
        self.settle()
        begun, node = time.time(), self.node_of(rank)
        pid = self.job.status()["coordinator_pid"]
        victim = "the coordinator" if fault[0] == "kill-coordinator" else f"node {node}"
        strikes = len(self.strikes(victim))
        self.command("inject", *([] if victim == "the coordinator" else ["--node", str(node)]), "--fault", *fault)
        struck = self.job.until(f"strike of {fault}", lambda: self.strikes(victim)[strikes:], STRIKE_S)[0]

        def seen() -> list[dict[str, Any]]:
            events = self.events(event, begun)
            return events if event == "coordinator_back" else [e for e in events if e["node"] == node]

        first = self.job.until(f"{event} of {fault}", seen, STRIKE_S)[0]
        resumed: list[dict[str, Any]] = []
        if event == "coordinator_back":
            self.job.until("another coordinator", lambda: self.status()["coordinator_pid"] != pid, RECOVERY_S)
        else:
            resumed = self.job.until(f"recovery from {fault}", lambda: self.events("resumed", first["t"]), RECOVERY_S)
        agreed = [e["iteration"] for e in self.events("agreed", begun)]
        done = [e["iteration"] for e in self.events("iteration") if e["t"] < first["t"]]
        return {
            "detected_s": round(max(0.0, first["t"] - struck), 3),
            "recovered_s": round(resumed[0]["t"] - struck, 3) if resumed else None,
            "lost_iterations": max([0, *(max(done) + 1 - g for g in agreed)]) if done else 0,
        }

    def recovers(self, fault: Callable[[], Any]) -> None:
        """Something that makes the job form its groups anew, and that it has come through that."""
        self.settle()
        before = len(self.events("resumed"))
        fault()
        self.job.until("the recovery", lambda: len(self.events("resumed")) > before, RECOVERY_S)

    def _trains(self, since: float) -> bool:
        status = self.status()
        if status.get("phase") != "training" or status["t"] <= since:
            return False
        gone = {n["node"] for n in status["nodes"] if n["role"] in ("lost", "left")}
        if gone & {c["node"] for c in status["coordinates"]}:
            return False
        # An iteration that began and ended after it, in the epoch of now.
        return any(e["epoch"] == status["epoch"] for e in self.events("committed", since))

    def _result(self, case: Case, node: int | None, begun: float, struck: float, epoch: int) -> Result:
        declared = self.events("declared", begun)
        resumed = [e for e in self.events("resumed", struck) if not declared or e["epoch"] == declared[-1]["epoch"]]
        if node is None:
            seen = [e["t"] for e in self.events("coordinator_back", struck)]
        else:
            seen = [e["t"] for e in self.events("detected", begun) if e["node"] == node]
        lost = 0
        for agreed in self.events("agreed", begun):
            done = [e["iteration"] for e in self.events("iteration") if e["t"] < agreed["t"]]
            lost = max(lost, max(done, default=-1) + 1 - agreed["iteration"])
        return Result(
            case.point,
            case.role,
            case.fault,
            case.trigger,
            "recovered" if declared else "training did not notice",
            round(max(0.0, seen[0] - struck), 3) if seen else None,
            round(resumed[-1]["t"] - struck, 3) if declared and resumed else None,
            lost,
            len(declared),
        )

    # ---- arming and triggering

    def _victim(self, case: Case) -> str:
        if case.role == "coordinator":
            return "the coordinator"
        if case.role == "spare":
            return f"node {self.parked()[0]}"
        return f"node {self.node_of(case.rank)}"

    def _arm(self, case: Case) -> tuple[str, int]:
        victim = self._victim(case)
        strikes = len(self.strikes(victim))
        if case.trigger == "starting-worker":
            self.command("inject", "--node", victim.split()[1], "--fault", "kill-worker")
        place = [] if case.role == "coordinator" else ["--node", victim.split()[1]]
        self.command("inject", *place, "--fault", case.fault, "--at", case.point)
        return victim, strikes

    def _trigger(self, case: Case, before: dict[str, Any]) -> None:
        nodes = [str(coordinate["node"]) for coordinate in before["coordinates"]]
        mine = nodes[case.rank % COORDINATES]
        other = nodes[(case.rank + 1) % COORDINATES]
        across = nodes[(case.rank + COORDINATES // 2) % COORDINATES]
        match case.trigger:
            case "":
                pass
            case "abort":
                self.command("inject", "--fault", "abort", check=case.role != "coordinator")  # it may die of it
            case "swap":
                self.command("inject", "--node", across, "--fault", "kill-worker")
            case "loss":
                self.command("inject", "--node", across, "--fault", "kill")
            case "own-worker":
                self.command("inject", "--node", mine, "--fault", "kill-worker")
            case "spare-worker":
                spare = self.parked()[-1] if case.role != "spare" else self.parked()[0]
                self.command("inject", "--node", str(spare), "--fault", "kill-worker")
            case "drain":
                self.background("drain", "--node", other)
            case "join":
                self.background("join")
            case "coordinator":
                self.command("inject", "--fault", "kill-coordinator")
            case "corrupt":
                self.command("inject", "--node", mine, "--fault", "corrupt")
            case "sign":
                self.command("inject", "--node", mine, "--sign", "xid:63")
            case "starting-worker":
                pass  # done before it was armed
            case "damaged-source":
                self._damaged_source(case.rank)
            case "damaged-own":
                self.command("inject", "--node", mine, "--fault", "corrupt", "--at", "agent.offer")
                self.command("inject", "--node", across, "--fault", "kill-worker", "--at", "optimizer-step.after")
            case "command":
                self.command("inject", "--node", other, "--at", "step.finished", check=False)
            case "hang":
                self.command("inject", "--node", across, "--fault", "hang", "--at", "slice.before")
            case "bug":
                at = str(before["iteration"] + 30)
                self.command("inject", "--node", mine, "--fault", "raise", "--at-iteration", at)
            case "garbage":
                self._garbage(self.node_of(case.rank))
            case "silent-agent":
                self._silent(int(across))
            case _:
                raise ValueError(f"no such trigger: {case.trigger}")

    def _garbage(self, node: int) -> None:
        """Bytes that are no message, to every port a node listens at."""
        for connection in psutil.Process(self._agent(node)).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                with socket.create_connection((connection.laddr.ip, connection.laddr.port), 5) as s:
                    s.sendall(os.urandom(4096))

    def _damaged_source(self, rank: int) -> None:
        """Every copy of a shard's newest generation is damaged just before a spare fetches it; of the one before, one.

        (Of several copies the next one is taken, and nobody hears of it. The job must not scrub, or it would find it.)
        """
        node = self.node_of(rank)
        worker = self._worker(node)
        (own,) = Path("/dev/shm").glob(f"{PREFIX}{self.job.process.pid}-*-{node}-{rank}-own")
        arena = Arena.attach(str(own))
        self.job.until("two generations", lambda: all(slot.complete for slot in arena.slots))
        newest = max(arena.slots, key=lambda slot: slot.begin)
        assert self.job.spoil_copies(rank) >= 2, "both slots of the copy (nodes that are gone may have left theirs)"
        newest.unique[:64] = bytes(255 - byte for byte in newest.unique[:64])
        arena.close()
        self.job.signal_process(worker, signal.SIGKILL)

    def _worker(self, node: int) -> int:
        return int(next(c["pid"] for c in self.job.status()["coordinates"] if c["node"] == node))

    def _agent(self, node: int) -> int:
        return int(next(n["agent_pid"] for n in self.job.status()["nodes"] if n["node"] == node))

    def _silent(self, node: int) -> None:
        """A worker dies whose agent cannot tell: its peers see the error first."""
        worker = self._worker(node)
        self.job.signal_process(self._agent(node), signal.SIGSTOP)
        self.job.signal_process(worker, signal.SIGKILL)

    # ---- the end

    def finish(self) -> Job:
        """Train to the end."""
        self.settle()
        self.pace(CALM_S)
        self.job.finished(300)
        return self.job

    def end(self) -> None:
        """Nodes that joined leave with the job; none is left behind."""
        for process in self._joined:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a node that was stopped does not end by itself
                process.wait(20)
        self._family.kill(20)
        self._errors.close()


def differences(got: Job, want: Job) -> list[str]:
    """In losses, grad norms and final state, bit for bit; a repeated iteration counts each time."""
    expected = {iteration: exact for iteration, *exact in want.exact()}
    wrong = [f"iteration {i}" for i, *exact in got.exact() if exact != expected[i]]
    hashes, wanted = got.hashes(), want.hashes()
    wrong += [f"{part} of rank {rank}" for rank in wanted for part in wanted[rank] if hashes[rank] != wanted[rank]]
    return wrong


def results(gauntlet: Gauntlet, equal: bool) -> list[dict[str, Any]]:
    """What a gauntlet has shown, as JSON types; ``equal``: it ended as the undisturbed run did."""
    return [asdict(result) | {"bitwise_equal": equal} for result in gauntlet.results]


def write_results(name: str, cases: Sequence[dict[str, Any]]) -> None:
    """Into the directory DEADPOOL_TEST_RESULTS names, for `deadpool bench faults`; nothing without it."""
    directory = os.environ.get("DEADPOOL_TEST_RESULTS")
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / f"{name}.json").write_text(json.dumps(list(cases), indent=1) + "\n")
