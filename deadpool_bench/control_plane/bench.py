"""`deadpool bench control`: what the control part of a recovery takes, against the number of agents.

The coordinator, the store and every socket are real; the agents are simulated (`swarm`), so what is measured is the
protocol alone. One node of many is killed, or many workers of some nodes end and are started again in place; a run is
timed from that moment::

    killed | detected | every agent has the new epoch | every agent has the agreement | every node says it trains
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec

from deadpool_bench.control_plane.decisions import Decisions, dealt
from deadpool_bench.control_plane.etcd import EtcdMembers, cpu_s
from deadpool_bench.control_plane.swarm import SwarmSettings
from deadpool_bench.paths import importing
from deadpool_bench.pictures import draw_control
from deadpool_bench.progress import progress, step
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.core.job import Deadlines, JobSpec, gather_s
from deadpool_megatron.cluster.link.link import Spoke
from deadpool_megatron.cluster.notices import INTERRUPT
from deadpool_megatron.cluster.store import EMBEDDED, StoreError, open_store
from deadpool_megatron.cluster.store.leadership import Leadership
from deadpool_megatron.config import DeadpoolConfig
from deadpool_megatron.launcher.processes import CoordinatorProcess, CoordinatorStart, Processes
from deadpool_megatron.observe import STATUS, EventTail
from deadpool_megatron.observe.figures import MissingPlots

_START_S: Final = 240.0
_RECOVER_S: Final = 120.0
_PROCESSES: Final = 2
_RESTARTS_A_NODE: Final = 4
_STORES: Final = ("embedded", "etcd")


class SimulatedCluster:
    """A coordinator and simulated agents on this machine, ended by `end`.

    Args:
        active: nodes that train; ``spares`` more are parked.
        processes: among which the agents are dealt out.
        abort: seconds, as --deadpool-abort-deadline; those of the later phases follow from it.
        more: other fields of `SwarmSettings`.
    """

    def __init__(
        self,
        directory: Path,
        active: int,
        spares: int = 1,
        slots: int = 8,
        lease: float = 5.0,
        store: str = EMBEDDED,
        processes: int = _PROCESSES,
        abort: float = 60.0,
        **more: Any,
    ) -> None:
        self.directory = directory
        self.active, self.spares, self.slots = active, spares, slots
        self._secret = secrets.token_hex(32)
        self._processes = Processes()
        self._swarms: list[subprocess.Popen[bytes]] = []
        self._where: dict[int, int] = {}
        self._killed: set[int] = set()
        self.run_dir = directory / "run"
        name = secrets.token_hex(4)
        self.store = open_store(store, self.run_dir, name)
        self.leadership = Leadership(self.store, lease)
        if self.leadership.take() is None:
            raise StoreError("somebody else leads this job")
        deadlines = Deadlines(lease, abort, 2 * abort, abort, _START_S)
        job = JobSpec(active + spares, spares, slots, True, deadlines, gather_s=gather_s(active + spares))
        secret = bytes.fromhex(self._secret)
        agent = AgentSettings(DeadpoolConfig(True), name, -1, slots, active, "127.0.0.1", "", secret)
        settings = CoordinatorStart(job, agent, str(self.run_dir), (store, name), "127.0.0.1")
        self.coordinator = CoordinatorProcess(self._processes, settings, self.leadership)
        if not self.coordinator.port:
            raise StoreError(f"the coordinator did not start: {self.coordinator.wait()[1]}")
        self.events = EventTail(self.run_dir)
        self._seen: list[dict[str, Any]] = []
        nodes = list(range(active + spares))
        for i in range(processes):
            mine = nodes[i::processes]
            self._where |= dict.fromkeys(mine, i)
            swarm = SwarmSettings(
                f"127.0.0.1:{self.coordinator.port}", self._secret, name, lease, mine, active, slots, seed=i, **more
            )
            self._swarms.append(self._spawn(swarm))

    def _spawn(self, settings: SwarmSettings) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "deadpool_bench.control_plane.swarm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=importing(os.environ),
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        process.stdin.flush()
        return process

    def tell(self, command: str, swarms: Sequence[int] | None = None, timeout_s: float = _START_S) -> list[Any]:
        """A command for some of the processes (all of them); their answers."""
        chosen = range(len(self._swarms)) if swarms is None else swarms
        self.post(command, chosen)
        return self.answers(chosen, timeout_s)

    def post(self, command: str, swarms: Sequence[int]) -> None:
        """A command for some of the processes; their `answers` follow."""
        for i in swarms:
            swarm = self._swarms[i]
            assert swarm.stdin is not None
            swarm.stdin.write(command.encode() + b"\n")
            swarm.stdin.flush()

    def answers(self, swarms: Sequence[int], timeout_s: float = _START_S) -> list[Any]:
        """What each of these answers to one command."""
        out = []
        for i in swarms:
            swarm = self._swarms[i]
            assert swarm.stdout is not None
            if not select.select([swarm.stdout], [], [], timeout_s)[0]:
                raise TimeoutError(f"simulated agents do not answer within {timeout_s:g} s")
            out.append(json.loads(swarm.stdout.readline()))
        return out

    def start(self) -> float:
        """All agents connect and the job begins to train; seconds that took."""
        begun = time.monotonic()
        self.tell("start")
        self.until("training", 1, _START_S)
        return time.monotonic() - begun

    def kill(self, node: int) -> float:
        """A node's connection ends, as by SIGKILL; when that was, in unix seconds."""
        self._killed.add(node)
        at: float = self.tell(f"kill {node}", [self._where[node]])[0]["t"]
        return at

    def restart(self, workers: int) -> float:
        """So many workers end at once, four a node, and new ones take their places; since when."""
        there = [node for node in range(self.active) if node not in self._killed]
        by_swarm: dict[int, list[str]] = {}
        for node, locals_ in dealt(workers, _RESTARTS_A_NODE, there).items():
            by_swarm.setdefault(self._where[node], []).append(f"{node}:{','.join(map(str, locals_))}")
        for swarm, words in by_swarm.items():
            self.post(f"restart {' '.join(words)}", [swarm])
        return float(min(answer["t"] for answer in self.answers([*by_swarm])))

    def until(self, event: str, count: int, timeout_s: float) -> dict[str, Any]:
        """The ``count``-th event of that name. Raises TimeoutError."""
        end = time.monotonic() + timeout_s
        while True:
            if self.coordinator.process.poll() is not None and not self.of("stopped"):
                self.coordinator.revive()
            self._seen += self.events.read()
            found = self.of(event)
            if len(found) >= count:
                return found[count - 1]
            if self.of("stopped"):
                raise TimeoutError(f"the job has stopped: {self.of('stopped')[0]['message']}")
            if time.monotonic() > end:
                raise TimeoutError(
                    f"no {event} within {timeout_s:g} s; there are {sorted({e['event'] for e in self._seen})}"
                )
            time.sleep(0.02)

    def of(self, event: str) -> list[dict[str, Any]]:
        """Events seen so far of one name."""
        return [e for e in self._seen if e["event"] == event]

    def inject(self, point: str) -> None:
        """The coordinator dies at this crash point, once."""
        spoke = Spoke(f"127.0.0.1:{self.coordinator.port}", "tool-0", bytes.fromhex(self._secret), 5.0)
        try:
            spoke.send(r.encode(r.Inject(r.Fault("kill-coordinator", -1, point=point))))
            if spoke.receive(10.0) is None:
                raise TimeoutError("the coordinator does not answer")
        finally:
            spoke.close()

    def seen(self) -> dict[str, tuple[float, float, int]]:
        """By what agents were told: when the first and the last of them were, in unix seconds, and how many."""
        out: dict[str, tuple[float, float, int]] = {}
        for report in self.tell("report"):
            for what, (first, last, count) in report["seen"].items():
                before = out.get(what, (first, last, 0))
                out[what] = (min(before[0], first), max(before[1], last), before[2] + count)
        return out

    def status(self) -> dict[str, Any]:
        """The coordinator's."""
        status: dict[str, Any] = json.loads((self.run_dir / STATUS).read_text())
        return status

    def totals(self) -> dict[str, float]:
        """Processor seconds, records and bytes so far."""
        reports = self.tell("report")
        control = self.status()["control"]
        return {
            "coordinator_cpu_s": cpu_s(self.coordinator.process.pid),
            "agents_cpu_s": sum(cpu_s(swarm.pid) for swarm in self._swarms),
            "records": sum(report["sent"] + report["received"] for report in reports),
            "wire_bytes": sum(sum(report["wire"]) for report in reports),
            "store_writes": control["store_writes"],
            "store_bytes": control["store_bytes"],
        }

    def end(self) -> None:
        """End every process."""
        if self.coordinator.process.poll() is None:
            self.coordinator.process.send_signal(INTERRUPT)
        for swarm in self._swarms:
            if swarm.poll() is None:
                swarm.kill()
                swarm.wait()
        self._processes.end(5.0)
        self.leadership.resign()
        self.store.close()


def _measure(directory: Path, agents: int, store: str, options: argparse.Namespace) -> dict[str, Any]:
    """One size with one store: all runs of it, and failure-free time."""
    kills: list[dict[str, float]] = []
    with ExitStack() as stack:
        url, etcd = EMBEDDED, None
        if store == "etcd":
            etcd = EtcdMembers(directory, options.etcd_members)
            stack.callback(etcd.end)
            etcd.until_up()
            url = etcd.url
        spares = options.runs + 1
        cluster = SimulatedCluster(
            directory, agents - spares, spares, options.slots, options.lease, url, iteration_s=options.iteration
        )
        stack.callback(cluster.end)
        started_s = cluster.start()
        steady = _steady(cluster, options.steady, etcd)
        for run in range(options.runs):
            victim = (run * 37 + 11) % cluster.active  # not the same protection group twice
            kills.append(_timed(cluster, etcd, lambda victim=victim: cluster.kill(victim)))  # type: ignore[misc]
            _say(agents, store, kills[-1])
        restarts = []
        for _ in range(options.runs if options.restarts else 0):
            restarts.append(_timed(cluster, etcd, lambda: cluster.restart(options.restarts)))
            _say(agents, f"{store}, {options.restarts} workers", restarts[-1])
    return {
        "agents": agents,
        "store": store,
        "start_s": started_s,
        "steady": steady,
        "kills": kills,
        "restarts": restarts,
    }


def _timed(cluster: SimulatedCluster, etcd: EtcdMembers | None, strike: Callable[[], float]) -> dict[str, float]:
    """One recovery, from the fault to the last node that trains, and what it cost. ``strike``: when the fault was."""
    before, store_before = cluster.totals(), etcd.cpu_s() if etcd else 0.0
    epochs, recoveries, known = len(cluster.of("declared")), len(cluster.of("resumed")), len(cluster.of("detected"))
    at = strike()
    resumed = cluster.until("resumed", recoveries + 1, _RECOVER_S)
    time.sleep(1.0)  # the last records, and a status
    cluster.until("declared", epochs + 1, 1.0)
    after, seen = cluster.totals(), cluster.seen()
    detected, epoch = cluster.of("detected")[known], resumed["epoch"]
    told, agreed = (seen[f"{what}-{epoch}"] for what in ("declare", "agree"))
    return {
        "detect_s": detected["t"] - at,
        "notify_s": told[1] - detected["t"],
        "agree_s": agreed[1] - told[1],
        "rest_s": resumed["t"] - agreed[1],
        "total_s": resumed["t"] - at,
        "epochs": len(cluster.of("declared")) - epochs,
        "told": told[2],
        "records": after["records"] - before["records"],
        "wire_bytes": after["wire_bytes"] - before["wire_bytes"],
        "coordinator_cpu_s": after["coordinator_cpu_s"] - before["coordinator_cpu_s"],
        "store_cpu_s": (etcd.cpu_s() if etcd else 0.0) - store_before,
        "store_bytes": after["store_bytes"] - before["store_bytes"],
    }


def _steady(cluster: SimulatedCluster, seconds: float, etcd: EtcdMembers | None) -> dict[str, float]:
    if seconds <= 0:
        return {}
    cluster.tell(f"iterate {seconds + 2}")
    time.sleep(2.0)
    before, begun, store_before = cluster.totals(), time.monotonic(), etcd.cpu_s() if etcd else 0.0
    time.sleep(seconds)
    after, took = cluster.totals(), time.monotonic() - begun
    out = {
        "seconds": took,
        "coordinator_cpu": (after["coordinator_cpu_s"] - before["coordinator_cpu_s"]) / took,
        "store_cpu": ((etcd.cpu_s() if etcd else 0.0) - store_before) / took,
        "bytes_a_node_s": (after["wire_bytes"] - before["wire_bytes"]) / took / (cluster.active + cluster.spares),
        "records_a_node_s": (after["records"] - before["records"]) / took / (cluster.active + cluster.spares),
        "store_bytes_s": (after["store_bytes"] - before["store_bytes"]) / took,
    }
    print(
        f"  failure-free: coordinator {100 * out['coordinator_cpu']:.1f} % of a core, store "
        f"{100 * out['store_cpu']:.1f} %; {out['bytes_a_node_s']:.0f} bytes a second a node, "
        f"{out['records_a_node_s']:.2f} records",
        flush=True,
    )
    return out


def _say(agents: int, store: str, kill: dict[str, float]) -> None:
    parts = ", ".join(f"{what} {1e3 * kill[what + '_s']:.0f}" for what in ("detect", "notify", "agree", "total"))
    print(
        f"  {agents} agents, {store}: {parts} ms; {kill['records'] / agents:.1f} records and "
        f"{kill['wire_bytes'] / agents:.0f} bytes an agent; coordinator {kill['coordinator_cpu_s']:.2f} CPU s; "
        f"epochs: {kill['epochs']:.0f}",
        flush=True,
    )


# ---- the command


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool bench control`."""
    add = parser.add_argument
    add("--agents", default="64,256,1024", metavar="N,...", help="sizes (default: %(default)s)")
    add("--stores", default="embedded", metavar="S,...", help="embedded, etcd or both (default: %(default)s)")
    add("--etcd-members", type=int, default=1, metavar="M", help="servers of the etcd store (default: 1)")
    add("--slots", type=int, default=8, metavar="P", help="ranks a node (default: 8)")
    add("--runs", type=int, default=5, metavar="K", help="nodes killed, one after the other, a size (default: 5)")
    add(
        "--restarts",
        type=int,
        default=0,
        metavar="W",
        help="workers that end at once, 4 a node, after that (default: 0)",
    )
    add("--decisions", action="store_true", help="what the coordinator alone takes of a processor, without sockets")
    add("--steady", type=float, default=20.0, metavar="S", help="seconds of failure-free time measured (default: 20)")
    add("--iteration", type=float, default=5.0, metavar="S", help="seconds an iteration takes then (default: 5)")
    add("--lease", type=float, default=5.0, metavar="S", help="as --deadpool-lease (default: 5)")
    add("--out", default="runs/bench-control", metavar="DIR", help="results and the picture")


def _sizes(text: str) -> Iterator[int]:
    for each in text.split(","):
        if not each.isdecimal() or int(each) < 16:
            raise ValueError(f"--agents {each}: expected whole numbers of 16 or more")
        yield int(each)


def run_control(options: argparse.Namespace) -> int:
    """`deadpool bench control` after parsing."""
    try:
        sizes = list(_sizes(options.agents))
        stores = options.stores.split(",")
        if unknown := [store for store in stores if store not in _STORES]:
            raise ValueError(f"--stores {unknown[0]}: there are {' and '.join(_STORES)}")
        out = Path(options.out).absolute()
        if options.decisions:
            return _decisions(out, sizes, options)
        results = []
        with progress("agents", sum(sizes) * len(stores)):
            for agents in sizes:
                for store in stores:
                    directory = out / f"{store}-{agents}-{os.getpid()}"
                    directory.mkdir(parents=True)
                    print(f"{agents} agents, {agents * options.slots} ranks, {store} store", flush=True)
                    results.append(_measure(directory, agents, store, options))
                    (out / "control.json").write_text(json.dumps(results, indent=1) + "\n")
                    step(agents)
    except (ValueError, StoreError, TimeoutError) as err:
        print(f"deadpool: bench control: {err}", file=sys.stderr)
        return 2
    print(table(results))
    try:
        print(draw_control(out, results))
    except MissingPlots as err:
        print(f"deadpool: {err}", file=sys.stderr)
    return 0


def _decisions(out: Path, sizes: Sequence[int], options: argparse.Namespace) -> int:
    rows = ["| agents | one node's commit | a node killed | workers ended at once |", "|---|---|---|---|"]
    for agents in sizes:
        directory = out / f"decisions-{agents}-{os.getpid()}"
        directory.mkdir(parents=True)
        job = Decisions(directory, agents - options.runs, options.runs, options.slots)
        commit_s = job.commits()
        victims = [(run * 37 + 11) % len(job.nodes) for run in range(options.runs)]
        kills = [job.kill(victim) for victim in victims]
        there = [node for node in job.nodes if node not in victims]
        ended = dealt(options.restarts, _RESTARTS_A_NODE, there) if options.restarts else {}
        restarts = [job.restart(ended) for _ in range(options.runs)] if ended else []
        job.close()
        cells = [f"{1e3 * statistics.median(each):.0f} ms" if each else "" for each in (kills, restarts)]
        rows.append(f"| {agents} | {1e6 * commit_s:.1f} us | {cells[0]} | {cells[1]} |")
    print("\n".join(rows))
    return 0


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown: medians, and in brackets the least and the most."""
    lines = ["| agents | store | detected | all notified | agreed | total | CPU of the coordinator | bytes an agent |"]
    lines.append("|" + "---|" * 8)
    for each in results:
        for what, runs in (("", each["kills"]), (" (workers)", each.get("restarts", ()))):
            if not runs:
                continue
            row = [str(each["agents"]) + what, each["store"]]
            for phase in ("detect_s", "notify_s", "agree_s", "total_s"):
                values = [1e3 * run[phase] for run in runs]
                row.append(f"{statistics.median(values):.0f} ms ({min(values):.0f} to {max(values):.0f})")
            row.append(f"{statistics.median(run['coordinator_cpu_s'] for run in runs):.2f} s")
            row.append(f"{statistics.median(run['wire_bytes'] for run in runs) / each['agents']:.0f}")
            lines.append("| " + " | ".join(row) + " |")
    if any(each["steady"] for each in results):
        lines += [
            "",
            "| agents | store | coordinator, failure-free | store | bytes a second a node |",
            "|---|---|---|---|---|",
        ]
        for each in results:
            if s := each["steady"]:
                lines.append(
                    f"| {each['agents']} | {each['store']} | {100 * s['coordinator_cpu']:.1f} % of a core | "
                    f"{100 * s['store_cpu']:.1f} % | {s['bytes_a_node_s']:.0f} |"
                )
    return "\n".join(lines)
