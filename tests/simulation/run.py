"""One run: a job of its own shape, its faults, and the judgement."""

from __future__ import annotations

import contextlib
import io
import random
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.core.job import Deadlines, JobSpec
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.durable import FORMAT, Coordinate, Manifest, directory_name
from deadpool_megatron.durable.files import seal, write_shard
from deadpool_megatron.vault import VaultFull
from simulation.durable import DIRECTORY, LAYOUT, Directory
from simulation.faults import Faults, Profile
from simulation.headquarters import Headquarters
from simulation.host import Host
from simulation.meetings import Meetings
from simulation.network import Link, Network
from simulation.oracle import Oracle, Violation
from simulation.rank import state as packed
from simulation.rank import whole
from simulation.world import Process, World

__all__ = ["Outcome", "Run", "Violation", "simulate"]

DEADLINES = Deadlines(lease=5.0, abort=15.0, build=40.0, form=10.0, join=30.0)
DURABLE_SHARE = 0.2  # of the runs have a durable directory
SHARDS_SHARE = 0.1  # have parity, constants or failure domains
_LONGEST_S = 900.0  # of virtual time, after which a run hangs
_SHAPES = ((3, 1, 1), (4, 1, 1), (3, 1, 2), (4, 1, 2), (4, 2, 1), (4, 2, 2), (5, 1, 1), (5, 2, 1), (3, 0, 1), (4, 0, 2))


@dataclass(slots=True)
class Outcome:
    """How a run ended. ``violation``: the promise that was broken; empty: none."""

    seed: int
    code: int
    message: str
    violation: str
    faults: Sequence[str]
    epochs: int
    seconds: float
    events: int
    shape: str
    trace: list[str] = field(default_factory=list)

    @property
    def end(self) -> str:
        """For people."""
        return f"ended with {int(self.code)}{': ' if self.message else ''}{self.message}"


class Run:
    """The parts of one run."""

    def __init__(self, seed: int, profile: Profile, trace: bool = False) -> None:
        world = self.world = World(seed, trace)
        chance = world.chance
        nodes, spares, slots = chance.choice(_SHAPES)
        redundancy = "2" if nodes - spares >= 3 and chance.random() < 0.2 else "1"
        self.patience = random.Random(f"patience {seed}")  # of its own, so that a seed's other draws stay
        wait = self.patience.uniform(10.0, 60.0) if self.patience.random() < 0.2 else 0.0
        self.job = JobSpec(nodes, spares, slots, True, DEADLINES, redundancy=redundancy, wait_for_spare_s=wait)
        self.iterations = chance.randint(14, 36)
        self.draws = random.Random(f"durable {seed}")  # of its own as well
        self.directory = Directory(world)
        if profile.durable or (self.draws.random() < DURABLE_SHARE and profile.durable is None):
            interval, keep = self.draws.randint(2, 8), self.draws.randint(1, 3)
            durable = DurableSpec(DIRECTORY, "sim", interval, keep, 20.0, 20.0, resume=True)
            self.job = replace(self.job, durable=durable)
        self._draw_shards(profile, seed)
        self.can_rescue = chance.random() < 0.5
        self.hang_floor, self.hang_outside = 4.0, 20.0
        self.network = Network(world)
        self.meetings = Meetings(self)
        self.oracle = Oracle(self)
        self.anybody = Process(world, "fate")
        self.faults = Faults(self, profile)
        self.hosts: list[Host] = []
        self._by_node: dict[int, Host] = {}
        self._pids = 100
        if self.job.durable is not None and self.draws.random() < 0.3:
            self._begin_with(self.draws.randint(1, 8))
        self.hq = Headquarters(
            world, self.job, self.directory, self._link, lambda: [h.link for h in self.hosts], self._event
        )
        for node in range(nodes):
            self.add_host(node)
        self.faults.draw()

    def _draw_shards(self, profile: Profile, seed: int) -> None:
        """What is kept of a rank, and where; from chance of its own."""
        draws = random.Random(f"shards {seed}")
        self.constants = False
        share = draws.random() < SHARDS_SHARE
        if not (profile.shards or (share and profile.shards is None)):
            return
        active = self.job.active_nodes
        schemes = [each for each in ("1", "2", "2+1", "2+1", "2+2", "3+1") if Scheme.parse(each).size <= active]
        racks = draws.randint(2, 3) if draws.random() < 0.6 else 0
        domains = {node: {"rack": f"r{draws.randrange(racks)}"} for node in range(self.job.nodes)} if racks else {}
        self.job = replace(self.job, redundancy=draws.choice(schemes), domains=domains)
        self.constants = self.job.durable is None and draws.random() < 0.6

    @property
    def shape(self) -> str:
        """For people."""
        job = self.job
        waits = f", waits {job.wait_for_spare_s:.0f} s for a spare" if job.wait_for_spare_s else ""
        durable = f", durable every {job.durable.interval}" if job.durable is not None else ""
        return (
            f"{job.active_nodes}+{job.spare_nodes} nodes x {job.slots_per_node}, redundancy {job.redundancy}{waits}"
            f"{durable}{', constants' * self.constants}{', racks' * bool(job.domains)}"
        )

    def _begin_with(self, generation: int) -> None:
        """An earlier run of the job has left this generation in the durable directory."""
        name = directory_name(generation, "before", 1)
        states = [packed(generation, self.oracle.value(rank, generation)) for rank in range(self.job.world_size)]
        shards = [
            write_shard(self.directory, name, rank, generation, LAYOUT, memoryview(whole(each)), each)
            for rank, each in enumerate(states)
        ]
        places = tuple(Coordinate(rank, 0, 0, rank, 0, 0) for rank in range(self.job.world_size))
        seal(
            self.directory,
            Manifest(FORMAT, generation, 0, name, "", self.job.world_size, places, tuple(shards), {}),
        )
        self.oracle.directory.durable(generation, name)

    def _link(self, node: int) -> Link | None:
        host = self._by_node.get(node)
        return host.link if host is not None else None

    def _event(self, event: str, fields: dict[str, Any]) -> None:
        self.oracle.event(event, fields)

    def at(self, host: str) -> Host:
        """By its address."""
        return self._by_node[int(host.removeprefix("n"))]

    def lives(self, node: int) -> bool:
        """Its agent is there."""
        host = self._by_node.get(node)
        return host is not None and host.alive

    def came(self, node: int) -> bool:
        """Its agent has ever been there."""
        host = self._by_node.get(node)
        return host is not None and host.link.ever

    def add_host(self, node: int) -> None:
        """A machine comes up."""
        if node in self._by_node:
            raise Violation(f"number {node} is given twice")
        self._by_node[node] = host = Host(self, node)
        self.hosts.append(host)

    def new_pid(self) -> int:
        """For a worker."""
        self._pids += 1
        return self._pids

    def left(self, host: Host) -> None:
        """An agent leaves: it was told to, or has fenced itself."""
        self.world.say("run", f"n{host.node} leaves")
        if host.agent.code == Exit.FENCED:
            self.oracle.fences(host.node)

    def check_room(self, host: Host, rank: int) -> None:
        """Raises VaultFull."""
        if not host.room:
            raise VaultFull(f"no room for rank {rank} on node {host.node}")

    def run(self) -> tuple[int, str]:
        """To the end of the job. Raises Violation."""
        hq, oracle, world = self.hq, self.oracle, self.world
        while hq.ended is None:
            if not world.step():
                raise Violation("nothing happens any more")
            if world.events % 16 == 0:
                self._drained()
                oracle.look()
                if world.now > _LONGEST_S:
                    raise Violation(f"no end after {_LONGEST_S:g} s: {hq.core.phase}, iteration {oracle.iteration}")
        self._drained()
        oracle.end(*hq.ended)
        return hq.ended

    def _drained(self) -> None:
        """A node that the user has taken away is none that the job may count on."""
        for node, state in self.hq.core.nodes.items():
            if state.role in ("leaving", "left") and node not in self.faults.drained:
                raise Violation(f"node {node} is taken away, and nobody asked for it")
            if state.role == "left":
                self.oracle.hurt.setdefault(node, "drained")


def simulate(seed: int, profile: Profile | None = None, trace: bool = False) -> Outcome:
    """One run from its seed alone."""
    run = Run(seed, profile or Profile(), trace)
    code, message, violation = -1, "", ""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            code, message = run.run()
        except Violation as err:
            violation = str(err)
        except Exception as err:  # noqa: BLE001 - whatever the product, or the simulation, raises
            where = traceback.extract_tb(err.__traceback__)[-1]
            violation = f"{type(err).__name__}: {err} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
            run.world.say("run", traceback.format_exc())
    return Outcome(
        seed, code, message, violation, run.faults.struck, len(run.oracle.declared), run.world.now, run.world.events,
        run.shape, run.world.trace or [],
    )  # fmt: skip
