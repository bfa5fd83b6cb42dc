"""Simulated agents: the real protocol over real sockets to the real coordinator, hundreds or thousands in one process.

Each has its own connection (`cluster.link.link.Spoke`), introduces itself, takes its rank's part in every recovery
and tells its pace and its commits, as an agent of healthy workers would, but starts none and keeps no shards. What
goes wrong is scripted: a node's connection ends, its steps take longer, its records are lost on the way.

A process is told what to do by JSON lines on stdin and answers with JSON lines on stdout (see `Swarm.command`).
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec
import zmq

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.lookout import pace_every_s
from deadpool_megatron.cluster.link.link import Spoke, agent_identity
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.redundancy import Scheme, holders
from deadpool_megatron.cluster.records.tables import Tables, apply

_MOST_PIDS: Final = 1 << 22
_MOST_VERSIONS: Final = 64
_LINK_XID: Final = 145  # of a link: whose end it is told at is not to blame (`cluster.core.signs`)
_TCP_INFO_BYTES: Final = 136  # up to tcpi_bytes_received


class SwarmSettings(msgspec.Struct, frozen=True):
    """``nodes`` are simulated here, of ``active`` and spare ones numbered after them.

    ``step_s``: by node, what each of its steps in a recovery takes; ``loss``: the share of its records that never
    leave. ``iteration_s``: seconds an iteration takes; 0: none ends.
    """

    endpoint: str
    secret: str
    job_id: str
    lease: float
    nodes: list[int]
    active: int
    slots: int
    iteration_s: float = 0.0
    step_s: dict[int, float] = {}
    loss: float = 0.0
    seed: int = 0


@lru_cache(maxsize=16)
def _decode(packet: bytes) -> r.CoordinatorRecord:
    """Once for all agents of this process that are told the same."""
    return r.decode_from_coordinator(packet)


class _Placed(NamedTuple):
    """One version of what all know, and what of it is each node's: its ranks, and those whose copies it keeps."""

    tables: Tables
    ranks: dict[int, list[int]]
    keeps: dict[int, list[int]]


class Agent:
    """One simulated node. Its ranks follow from the assignment, as a real agent's do."""

    __slots__ = (
        "alive", "ended", "epoch", "forming", "generation", "held", "introduced", "keeps", "node", "ranks", "ready",
        "restarts", "settled", "spoke", "version",
    )  # fmt: skip

    def __init__(self, node: int, ranks: list[int], spoke: Spoke) -> None:
        self.node = node
        self.ranks = ranks
        self.spoke = spoke
        self.epoch = 0
        self.version = 0
        self.generation = 5
        self.introduced = 0
        self.restarts = 0
        self.ended: set[int] = set()  # workers, by local index, that are to be started again
        self.held: list[int] = []  # ranks whose shards it has, own and kept for others
        self.keeps: list[int] = []
        self.settled = True
        self.ready = self.forming = 0  # the newest epochs in which it holds its shards, and forms its groups
        self.alive = True


class Swarm:
    """The agents of one process, on one thread."""

    def __init__(self, settings: SwarmSettings) -> None:
        self._s = settings
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 4 * len(settings.nodes) + 16)
        self._epoll = select.epoll()
        self._by_fd: dict[int, Agent] = {}
        self.agents: dict[int, Agent] = {}
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self.loss = settings.loss
        self._touched: set[int] = set()
        self._random = random.Random(settings.seed)
        self._tables = Tables()
        self._placed: dict[int, _Placed] = {}  # by version: where epochs follow soon, not all agents are in the newest
        self._scheme = Scheme.parse("1")
        self._seen: dict[str, list[float]] = {}  # by record and epoch: first and last time, and how many
        self.sent = self.received = self.dropped = 0
        self._iteration = -1

    # ---- the loop

    def step(self, timeout_s: float) -> list[int]:
        """Handle what arrives within ``timeout_s``; returns other descriptors that are readable."""
        now = time.monotonic()
        if self._later:
            timeout_s = max(0.0, min(timeout_s, self._later[0][0] - now))
        others: list[int] = []
        for fd, _ in self._epoll.poll(timeout_s, 1024):
            agent = self._by_fd.get(fd)
            if agent is None:
                others.append(fd)
            elif agent.alive:
                self.serve(agent)
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()
        touched, self._touched = self._touched, set()
        for node in touched:
            if (agent := self.agents.get(node)) is not None:
                self.serve(agent)  # sending takes what the descriptor has to tell
        return others

    def also(self, fd: int) -> None:
        """Wake for this descriptor, too."""
        self._epoll.register(fd, select.EPOLLIN)

    def start(self, nodes: list[int]) -> None:
        """Agents connect."""
        for node in nodes:
            spoke = Spoke(
                self._s.endpoint,
                agent_identity(self._s.job_id, node),
                bytes.fromhex(self._s.secret),
                self._s.lease,
                self._context,
            )
            agent = self.add(node, spoke)
            for each in (spoke.socket, spoke.monitor):
                fd = each.getsockopt(zmq.FD)
                assert isinstance(fd, int)
                self._by_fd[fd] = agent
                self._epoll.register(fd, select.EPOLLIN)
            self.serve(agent)

    def add(self, node: int, spoke: Spoke) -> Agent:
        """An agent, with its end of a connection."""
        slots, active = self._s.slots, node < self._s.active
        agent = Agent(node, list(range(node * slots, (node + 1) * slots)) if active else [], spoke)
        self.agents[node] = agent
        return agent

    def kill(self, node: int) -> float:
        """The node is gone, as by SIGKILL: its connection ends. Returns the time."""
        agent = self.agents.pop(node)
        agent.alive = False
        for each in (agent.spoke.socket, agent.spoke.monitor):
            fd = each.getsockopt(zmq.FD)
            assert isinstance(fd, int)
            self._by_fd.pop(fd, None)
            self._epoll.unregister(fd)
        at = time.time()
        agent.spoke.close(linger_ms=0)
        return at

    def restart(self, node: int, locals_: list[int]) -> None:
        """Workers of a node end, as where a link of its machine fails: new ones take their place."""
        agent = self.agents[node]
        agent.ended |= {*locals_}
        agent.restarts += 1  # the processes that begin now have other numbers than those that end
        self._send(agent, r.MachineSign(node, _LINK_XID))
        for local in locals_:
            pid = 1 + node * self._s.slots + local + agent.restarts * _MOST_PIDS
            self._send(agent, r.WorkerExited(node, local, agent.ranks[local], pid, -9, agent.epoch))
        self.serve(agent)

    def serve(self, agent: Agent) -> None:
        """Until nothing is left: a ZeroMQ descriptor tells of news once."""
        spoke = agent.spoke
        while agent.alive:
            busy = spoke.changed()
            if busy and spoke.connected:
                self._introduce(agent)
            while agent.alive and (packet := spoke.receive()) is not None:
                busy = True
                self.received += 1
                self._told(agent, _decode(packet))
            if not busy:
                return

    def _after(self, seconds: float, do: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._later, (time.monotonic() + seconds, self._order, do))

    def _send(self, agent: Agent, record: r.AgentRecord) -> None:
        if not agent.alive or (self.loss and self._random.random() < self.loss):
            return
        self.sent += 1
        self._touched.add(agent.node)
        if not agent.spoke.post(r.encode(record)):
            self.dropped += 1  # there was no connection

    def _note(self, what: str) -> None:
        now = time.time()
        seen = self._seen.setdefault(what, [now, now, 0])
        seen[1], seen[2] = now, seen[2] + 1

    # ---- an agent's part

    def _introduce(self, agent: Agent) -> None:
        pids = [1 + agent.node * self._s.slots + i for i in range(self._s.slots)]
        # Their vaults have one address each, of this machine: nothing listens there, as at a node that has ended.
        host = f"127.{64 + (agent.node >> 16 & 63)}.{agent.node >> 8 & 255}.{agent.node & 255}"
        port = 40000 + agent.node % 20000
        self._send(agent, r.Join(agent.node, 1 + agent.node, host, port, pids, {}, agent.epoch, agent.settled))
        agent.introduced += 1
        if not agent.ranks:
            for local, pid in enumerate(pids):
                self._send(agent, r.WorkerReady(agent.node, local, pid))

    def _register(self, agent: Agent) -> None:
        world = self._s.active * self._s.slots
        for local, rank in enumerate(agent.ranks):
            # TP 8, PP 8, the rest DP, as Megatron numbers ranks
            tp = min(8, world)
            pp = min(8, world // tp)
            dp = world // tp // pp
            info = r.CoordinateInfo(rank, rank % tp, rank // (tp * dp) if dp else 0, rank // tp % max(1, dp))
            size = (3 << 30) + (info.pp << 20)
            self._send(agent, r.Registered(agent.node, local, info, size, 40000, "groups", False))

    def _told(self, agent: Agent, record: r.CoordinatorRecord) -> None:
        match record:
            case r.Roster():
                agent.version = record.version
                if self._tables.version != record.version:
                    first = placing.initial(self._s.active, self._s.slots)
                    self._tables = Tables(record.version, record.assignment or first, record.vaults)
                self._note("roster")
                self._register(agent)
            case r.Placement():
                agent.version = record.version
                if self._tables.version != record.version:
                    old = self._tables
                    self._place(
                        Tables(
                            record.version,
                            old.assignment,
                            old.vaults,
                            record.groups,
                            record.unique_bytes,
                            record.small_capacity,
                        )
                    )
                self._note("placement")
                self._has_shards(agent)
                self._live(agent)
            case r.Declare() | r.Changed():
                self._declared(agent, record)
            case r.Agree():
                self._note(f"agree-{record.epoch}")
                self._does(agent, lambda: self._prepare(agent, record.epoch), record.epoch)
            case r.Form():
                self._note(f"form-{record.epoch}")
                self._does(agent, lambda: self._form(agent, record.epoch), record.epoch)
            case r.Stop():
                self._note("stop")
            case r.CommittedTo():
                self._note("committed-to")

    def _does(self, agent: Agent, step: Callable[[], None], epoch: int) -> None:
        """A step of a recovery, by an agent that holds a coordinate."""
        if not agent.ranks or epoch != agent.epoch:
            return
        seconds = self._s.step_s.get(agent.node, 0.0)
        self._after(seconds, step) if seconds else step()

    def _place(self, tables: Tables) -> None:
        self._tables = tables
        of_node: dict[int, list[int]] = {}
        for rank, slot in enumerate(tables.assignment):
            of_node.setdefault(slot.node, []).append(rank)
        keeps: dict[int, list[int]] = {}
        for ward, keepers in holders(tables.groups, self._scheme).items():
            for keeper in keepers:
                keeps.setdefault(keeper, []).extend(of_node.get(ward, ()))
        self._placed[tables.version] = _Placed(tables, of_node, keeps)
        while len(self._placed) > _MOST_VERSIONS:
            del self._placed[next(iter(self._placed))]

    def _declared(self, agent: Agent, record: r.Declare | r.Changed) -> None:
        if record.epoch <= agent.epoch:
            return
        if isinstance(record, r.Changed) and record.base != agent.version:
            self._send(agent, r.Behind(record.epoch, agent.node))
            return
        if record.version not in self._placed:
            whole = apply(record, self._placed[record.base].tables) if isinstance(record, r.Changed) else record
            assert whole is not None
            self._place(
                Tables(
                    record.version,
                    whole.assignment,
                    whole.vaults,
                    whole.groups,
                    whole.unique_bytes,
                    whole.small_capacity,
                )
            )
        self._note(f"declare-{record.epoch}")
        agent.epoch, agent.version = record.epoch, record.version
        held = agent.held
        agent.ranks = self._placed[record.version].ranks.get(agent.node, [])
        agent.settled = not agent.ranks
        # (a vault has two slots: others may not have committed this node's newest generation yet)
        version = [(0, g) for g in (agent.generation - 1, agent.generation) if g >= 0]
        offer = r.Offer(
            record.epoch,
            agent.node,
            {
                rank: agent.generation if rank in held and local not in agent.ended else None
                for local, rank in enumerate(agent.ranks)
            },
            dict.fromkeys(held, version),
            dict.fromkeys(agent.keeps, version),
        )
        if agent.ranks or held:
            self._does(agent, lambda: self._send(agent, offer), record.epoch)

    def _prepare(self, agent: Agent, epoch: int) -> None:
        agent.ready = epoch
        self._send(agent, r.NodeReady(epoch, agent.node))
        self._resume(agent, epoch)

    def _form(self, agent: Agent, epoch: int) -> None:
        agent.forming = epoch
        self._resume(agent, epoch)

    def _resume(self, agent: Agent, epoch: int) -> None:
        """Once it has both its shards and its groups."""
        if agent.ready != epoch or agent.forming != epoch:
            return
        world = self._s.active
        self._send(agent, r.NodeFormed(epoch, agent.node, 24, 24 if agent.node < world // 8 else 2, 24))
        self._send(agent, r.NodeRestored(epoch, agent.node))
        self._send(agent, r.NodeResumed(epoch, agent.node, agent.generation))
        self._has_shards(agent)
        agent.settled = True
        agent.ended.clear()
        self._note(f"resumed-{epoch}")

    def _has_shards(self, agent: Agent) -> None:
        """It has what this placement gives it."""
        placed = self._placed[agent.version]
        agent.held, agent.keeps = agent.ranks, placed.keeps.get(agent.node, [])

    # ---- failure-free

    def _live(self, agent: Agent) -> None:
        """From the first step on: its pace now and then, each at another moment."""
        if self._s.iteration_s and agent.ranks:
            self._after(self._random.random() * pace_every_s(self._s.active), lambda: self._pace(agent))

    def _pace(self, agent: Agent) -> None:
        if not agent.alive:
            return
        self._after(pace_every_s(self._s.active), lambda: self._pace(agent))
        if agent.ranks:
            paces = {rank: 0.01 + 0.001 * self._random.random() for rank in agent.ranks}
            self._send(agent, r.Pace(agent.node, max(0, self._iteration), paces))

    def iterate(self) -> None:
        """An iteration ends, and its generation is committed a moment later, on each node at another one."""
        self._iteration += 1
        iteration, last = self._iteration, self._s.active * self._s.slots - 1
        for agent in list(self.agents.values()):
            if not agent.ranks:
                continue
            if last in agent.ranks:
                loss = {"lm loss": (2.5).hex()}
                seconds = self._s.iteration_s
                self._send(
                    agent,
                    r.Iteration(agent.node, last, agent.epoch, iteration, loss, (1.0).hex(), seconds, 0.0, 1 << 30, 0),
                )
            self._after(
                self._random.random() * self._s.iteration_s / 2,
                lambda agent=agent: self.commit(agent, iteration),  # type: ignore[misc]
            )

    def commit(self, agent: Agent, generation: int) -> None:
        """All ranks of a node have committed a generation."""
        agent.generation = generation
        self._send(agent, r.Committed(agent.epoch, agent.node, generation))

    # ---- commands

    def command(self, line: str) -> dict[str, Any] | None:
        """``start``, ``kill N``, ``restart N:L,... ...`` (workers by node), ``iterate S`` (seconds), ``lose SHARE``,
        ``report``, ``end``; None: it is the end."""
        word, *arguments = line.split()
        match word:
            case "start":
                self.start(self._s.nodes)
            case "kill":
                return {"t": self.kill(int(arguments[0]))}
            case "restart":
                at = time.time()
                for node, _, locals_ in (each.partition(":") for each in arguments):
                    self.restart(int(node), [int(local) for local in locals_.split(",")])
                return {"t": at}
            case "iterate":
                self._until = time.monotonic() + float(arguments[0])
                self._tick()
            case "lose":
                self.loss = float(arguments[0])
            case "report":
                return {
                    "seen": self._seen,
                    "sent": self.sent,
                    "received": self.received,
                    "dropped": self.dropped,
                    "introduced": sum(agent.introduced for agent in self.agents.values()),
                    "wire": _wire_bytes(),
                }
            case "end":
                return None
        return {}

    def _tick(self) -> None:
        if time.monotonic() < self._until:
            self.iterate()
            self._after(self._s.iteration_s, self._tick)

    def close(self) -> None:
        """Every connection ends."""
        for agent in self.agents.values():
            agent.spoke.close(linger_ms=0)
        self._context.term()


def _wire_bytes() -> tuple[int, int]:
    """What this process's TCP connections have sent and received, heartbeats and encryption included."""
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as each:
                if each.family not in (socket.AF_INET, socket.AF_INET6) or each.type != socket.SOCK_STREAM:
                    continue
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:
            continue
        if len(info) == _TCP_INFO_BYTES:
            acked, got = struct.unpack_from("QQ", info, 120)
            sent, received = sent + acked, received + got
    return sent, received


def main() -> int:
    """What ``python -m`` runs: the settings are the first line on stdin, commands the others."""
    rest = b""
    while b"\n" not in rest:
        rest += os.read(0, 65536)  # sys.stdin would keep what comes after the line to itself
    first, rest = rest.split(b"\n", 1)
    swarm = Swarm(msgspec.json.decode(first, type=SwarmSettings))
    swarm.also(0)
    while True:
        if b"\n" in rest or 0 in swarm.step(1.0):
            if b"\n" not in rest:
                data = os.read(0, 65536)
                if not data:
                    break
                rest += data
            *lines, rest = rest.split(b"\n")
            for line in lines:
                answer = swarm.command(line.decode())
                if answer is None:
                    swarm.close()
                    return 0
                print(json.dumps(answer), flush=True)
    swarm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
