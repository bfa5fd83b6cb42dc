"""A node: the production `Agent` and its parts around simulated workers, vault bytes and connections."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.agent import Agent
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.fence import Fence
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.lookout import LOOK_S
from deadpool_megatron.cluster.agent.pulse import PulsePage
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.agent.watch import Watch
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.agent.workers import Worker
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.config import DeadpoolConfig
from deadpool_megatron.vault.errors import TransferFailed
from deadpool_megatron.vault.words import Words
from simulation.durable import DIRECTORY, SimulatedDurability
from simulation.network import Link
from simulation.rank import Rank
from simulation.vaults import SimulatedShards
from simulation.world import Pipe, Process

if TYPE_CHECKING:
    from simulation.run import Run

__all__ = ["Host"]


class _Blind(Watch):
    """Writes no log; remembers which epochs one would have."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def sent(self, record: Any) -> None:
        return

    def entered(self, epoch: int, coordinates: int, reason: str = "") -> None:
        self.epochs.append(epoch)

    def received(self, record: Any, ranks: int, of: int) -> None:
        return

    def rang(self, rank: int) -> None:
        return

    def committed(self, rank: int, epoch: int, generation: int) -> None:
        return


class _Control:
    """The agent's end of a worker's control socket."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def send(self, packet: bytes, flags: int = 0) -> None:
        self._rank.told.send(self._rank.process, self._rank.hear, packet)

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        return


class _Words(Words):
    """Nobody else sees them: without fences."""

    __slots__ = ()

    def __getitem__(self, index: int) -> int:
        value: int = self._view[index]
        return value

    def __setitem__(self, index: int, value: int) -> None:
        self._view[index] = value

    def add(self, index: int, amount: int) -> None:
        self._view[index] += amount


class _Page(PulsePage):
    """In this process's memory."""

    def __init__(self) -> None:
        self._words = _Words(memoryview(bytearray(64)))

    def close(self) -> None:
        return


class _Process:
    """What the agent knows of a worker's process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def wait(self) -> int:
        assert self.code is not None
        return self.code


@dataclass(slots=True)
class _Worker(Worker):
    """Holds no descriptors."""

    def close(self) -> None:
        return


class _Processes(WorkerProcesses):
    """Starts `Rank`s."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.ranks: dict[int, Rank] = {}  # by pid

    @property
    def share_devices(self) -> bool:
        return True

    def adopted(self, local: int) -> bool:
        return False

    def all_started(self) -> None:
        return

    def of_job(self, rank: int | None) -> dict[str, str]:
        return {"RANK": str(rank)}

    def keep_warm(self, calm: bool) -> bool:
        return True

    @property
    def warm_server(self) -> tuple[bool, str]:
        return False, ""

    def close(self) -> None:
        return

    def start(self, local: int, rank: int | None, rehearses: int | None = None, standby: bool = False) -> Worker:
        host = self._host
        pid = host.cluster.new_pid()
        worker = _Worker(local, _Process(pid), -1, None, -1, rank, _Page(), rehearses, standby)  # type: ignore[arg-type]
        self.ranks[pid] = sim = Rank(host, worker)
        worker.control = _Control(sim)  # type: ignore[assignment]
        sim.start()
        return worker

    def located(self, worker: Worker, numa: int, alive: Iterable[Worker]) -> set[int]:
        return set()

    def kill(self, worker: Worker) -> None:
        self.ranks[worker.pid].die(-9)

    def reap(self, worker: Worker) -> int:
        return worker.process.wait()

    def is_stopped(self, worker: Worker) -> bool:
        return self.ranks[worker.pid].process.frozen

    def keep_stacks(self, worker: Worker) -> None:
        self.ranks[worker.pid].process.thaw()

    def last_words(self, worker: Worker) -> list[str]:
        return []

    def signal(self, worker: Worker, signum: int) -> None:
        return

    def end(self, workers: Iterable[Worker], at_once: bool, told: bool) -> None:
        return

    def stacks_file(self, local: int) -> Path:
        return Path("stacks")

    def link_log(self, worker: Worker, rank: int) -> None:
        return


class Host:
    """One machine with its agent."""

    def __init__(self, cluster: Run, node: int) -> None:
        self.cluster = cluster
        self.node = node
        world = self.world = cluster.world
        job = cluster.job
        self.process = Process(world, f"n{node}")
        self.name = f"n{node}"
        self.news = Pipe(world, 0.0001, 0.002)  # from the vault's threads
        self.durability: SimulatedDurability
        self.drainers: list[Process] = []
        self.bad = False  # its checks find something
        self.room = True  # there is memory for shards that are fetched
        config = DeadpoolConfig(
            True, lease=job.deadlines.lease, redundancy=job.redundancy, hang_floor=cluster.hang_floor,
            hang_outside=cluster.hang_outside, durable_dir=DIRECTORY * (cluster.durable is not None),
            when_out_of_spares=job.when_out_of_spares,  # type: ignore[arg-type]
            abort_deadline=job.deadlines.abort, build_deadline=job.deadlines.build,
        )  # fmt: skip
        settings = AgentSettings(
            config, cluster.name, node, job.slots_per_node, job.active_nodes, self.name, "hq:1", bytes(32)
        )
        known = self.known = KnownJob(node, job.active_nodes, job.slots_per_node, Scheme.parse(job.redundancy))
        self.shards = SimulatedShards(self)
        self.processes = _Processes(self)
        self.crew = Crew(known, self.processes, cluster.job.rehearsals, cluster.standby_workers)
        fence = Fence(node, job.deadlines.lease, self._ask, random.Random(world.chance.random()))
        self.link = Link(world, cluster.network, self, cluster.hq, job.deadlines.lease)
        self.watch = _Blind()
        self.agent = Agent(
            settings,
            known,
            self.crew,
            self.processes,
            self.shards,
            self.watch,
            fence,
            self.link.post,
            world.clock,
            partial(SimulatedDurability, self),
        )
        self.process.later(world.chance.uniform(0.0, 0.3), self._begin)

    @property
    def alive(self) -> bool:
        """Its agent lives."""
        return self.process.alive

    def later(self, low: float, high: float, call: Callable[..., None], *args: Any) -> None:
        """In one of the agent's threads."""
        self.process.later(self.world.delay(low, high), call, *args)

    def _begin(self) -> None:
        self.crew.start(self.cluster.job.slots_per_node)
        self.link.connect()
        self._look()

    def _look(self) -> None:
        self.agent.look(self.link.up)
        self._leave_if_told()
        self.process.later(LOOK_S if not self.link.up else 2 * LOOK_S, self._look)

    def _leave_if_told(self) -> None:
        if self.agent.code is not None and self.alive:
            self.world.say(self.name, f"the agent leaves with {self.agent.code}")
            self.cluster.left(self)
            self.die()

    def told(self, packet: bytes) -> None:
        """A packet of the coordinator."""
        record = r.decode_from_coordinator(packet)
        self.world.say(f"hq -> {self.name}", record)
        self.agent.from_coordinator(record)
        self._leave_if_told()

    def ended(self, worker: Worker) -> None:
        """A worker's process has ended, and is seen to."""
        if not worker.exited:
            self.agent.ended(worker)

    def _ask(self, others: list[r.Address], tell: Callable[[int], None]) -> None:
        """Who of the others can be reached: a frozen process's kernel takes connections all the same."""
        there = [self.cluster.at(each.host) for each in others]
        reached = sum(each.alive and self.cluster.network.both(self.node, each.node) for each in there)
        self.process.later(self.world.chance.uniform(0.01, 1.0), tell, reached)

    def reach(self, other: Host) -> None:
        """Raises what a connection to another vault raises."""
        if other is self:
            return
        if not other.alive:
            raise TransferFailed(f"node {other.node} refuses connections")
        if other.process.frozen or not self.cluster.network.both(self.node, other.node):
            raise TransferFailed(f"node {other.node} does not answer")
        if self.cluster.network.breaks():
            raise TransferFailed("connection reset")

    # ---- what can happen to it

    def workers(self) -> list[Rank]:
        """Those that live."""
        return [rank for rank in self.processes.ranks.values() if rank.process.alive]

    def die(self, silently: bool = False) -> None:
        """The agent's process ends, and its workers with it. ``silently``: the machine, so that nobody is told."""
        if not self.alive:
            return
        self.process.die()
        for drainer in self.drainers:
            drainer.die()
        for rank in self.workers():
            rank.die(-9, silently=silently)
        if silently:
            self.cluster.network.mute.add(self.node)
            self.cluster.network.deaf.add(self.node)
            self.link.look()
        elif self.link.up:
            self.link.close_agents_end()
