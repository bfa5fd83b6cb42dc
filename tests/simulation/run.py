"""One run: a job of its own shape, its faults, and the judgement."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import math
import random
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.core.job import Deadlines, JobSpec
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.durable import FORMAT, Coordinate, Lease, Manifest, Unreadable, directory_name, this_process
from deadpool_megatron.durable.files import seal, write_constants, write_shard
from deadpool_megatron.durable.lease import LOOK_S, WATCH_S, Taken, Taking
from deadpool_megatron.vault import VaultFull
from simulation.durable import CONSTANTS_LAYOUT, DIRECTORY, LAYOUT, Directory
from simulation.faults import PACKET_KINDS, Faults, Profile
from simulation.headquarters import Headquarters, RunDisk
from simulation.host import Host
from simulation.meetings import Meetings
from simulation.network import HQ, Link, Network
from simulation.oracle import Oracle, Violation
from simulation.rank import constants, whole
from simulation.rank import state as packed
from simulation.world import Process, World

__all__ = ["Outcome", "Run", "Violation", "simulate"]

DEADLINES = Deadlines(lease=5.0, abort=15.0, build=40.0, form=10.0, join=30.0)
DURABLE_SHARE = 0.2  # of the runs have a durable directory
PACKET_SHARE = 0.2  # have packets changed, or connections to the coordinator that are reset
RIVALS_SHARE = 0.1  # of those with a durable directory have another job that wants it
RUN_DISK_SHARE = 0.1  # write a run directory, on a disk with troubles
MOVES_SHARE = 0.1  # have drains that something happens to
SHARDS_SHARE = 0.1  # have parity, constants or failure domains
_RIVAL = "rival"
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
    kinds: Counter[str]  # of faults
    trace: list[str] = field(default_factory=list)

    @property
    def end(self) -> str:
        """For people."""
        return f"ended with {int(self.code)}{': ' if self.message else ''}{self.message}"


class Run:
    """The parts of one run."""

    def __init__(
        self,
        seed: int,
        profile: Profile,
        trace: bool = False,
        beside: Run | None = None,
        lease: Lease | None = None,
    ) -> None:
        """``beside``: the job whose durable directory this one has taken over, with ``lease``."""
        world = self.world = World(seed, trace) if beside is None else beside.world
        chance = world.chance
        nodes, spares, slots = chance.choice(_SHAPES)
        redundancy = "2" if nodes - spares >= 3 and chance.random() < 0.2 else "1"
        self.patience = random.Random(f"patience {seed}")  # of its own, so that a seed's other draws stay
        wait = self.patience.uniform(10.0, 60.0) if self.patience.random() < 0.2 else 0.0
        self.job = JobSpec(nodes, spares, slots, True, DEADLINES, redundancy=redundancy, wait_for_spare_s=wait)
        self.signs = random.Random(f"signs {seed}")
        self.standing = random.Random(f"standing {seed}")
        levels = ("device", "coordinate")
        self.standby_workers = self.standing.choice(levels) if profile.standbys else "none"
        self.checks = random.Random(f"checks {seed}")
        if profile.checks:
            self.job = replace(self.job, spare_check_s=self.checks.uniform(0.5, 5.0))
        self.over = False  # and judged
        self._until = world.now + _LONGEST_S
        self.iterations = chance.randint(14, 36) + (0 if beside is None else beside.iterations)
        self.draws = random.Random(f"durable {seed}")  # of its own as well
        self.packets = random.Random(f"packets {seed}")  # likewise
        share = self.packets.random() < PACKET_SHARE
        self.packet_kinds = [k for k in PACKET_KINDS if (k in profile.only if profile.only else share)]
        self.files: dict[str, bytes] = {}  # that agents give to their workers
        self.name = name = "sim" if beside is None else _RIVAL
        self.directory = Directory(world, name, None if beside is None else beside.directory)
        self.rival: Rival | None = None
        if beside is not None and beside.job.durable is not None:
            self.job = replace(beside.job, durable=replace(beside.job.durable, job=name))
        elif profile.durable or (self.draws.random() < DURABLE_SHARE and profile.durable is None):
            interval, keep = self.draws.randint(2, 8), self.draws.randint(1, 3)
            durable = DurableSpec(DIRECTORY, name, interval, keep, 20.0, 20.0, resume=True)
            self.job = replace(self.job, durable=durable)
        self.replica, self.widths = 1, list[int]()
        shrinks = random.Random(f"shrinks {seed}")  # of its own again
        self.again = random.Random(f"again {seed}")
        if profile.shrinks and self.job.durable is not None and beside is None:
            self.job = replace(self.job, when_out_of_spares="shrink")
            self.replica = shrinks.choice([n for n in (1, 1, 2) if self.job.world_size % n == 0])
            width = self.job.world_size // self.replica
            even = shrinks.random() < 0.2  # other numbers of replicas would have counts of microbatches that differ
            self.widths = [each for each in range(1, width) if not even or width % each == 0]
            self.iterations += shrinks.randint(0, 30)
            if random.Random(f"memory {seed}").random() < 0.4:
                self.job = replace(self.job, durable=DurableSpec("", "", resume=True))
        if profile.rehearsals:
            self.job = replace(self.job, rehearsals=random.Random(f"rehearsals {seed}").randint(1, 2))
        self.together = random.Random(f"together {seed}, what")
        if profile.together:
            self.job = replace(self.job, gather_s=self.together.choice((0.003, 0.02, 0.1)))
        self.constants = beside is not None and beside.constants
        if beside is None:
            self._draw_shards(profile, seed)
        self.restarts = profile.restarts
        self.can_rescue = chance.random() < 0.5 and not self.restarts
        self.hang_floor, self.hang_outside = 4.0, 20.0
        self.network = Network(world, profile.replaced, random.Random(f"replaced {seed}"))
        self.meetings = Meetings(self)
        self.oracle = Oracle(self)
        self.anybody = Process(world, "fate")
        self.faults = Faults(self, profile)
        self.hosts: list[Host] = []
        self._by_node: dict[int, Host] = {}
        self._pids = 100
        if beside is not None:
            self.oracle.directory.found(beside.oracle.directory)
        elif self.durable is not None and self.draws.random() < 0.3:
            self._begin_with(self.draws.randint(1, 8))
        self.hq = Headquarters(
            world,
            self.job,
            self.directory,
            self._link,
            lambda: [h.link for h in self.hosts],
            self._event,
            lease,
            self._draw_run_disk(seed, beside),
            self._answers,
            random.Random(f"ports {seed}") if self.packet_kinds else None,
        )
        for node in range(self.job.nodes):
            self.add_host(node)
        self.faults.draw()
        self.saving_fails = ""  # Megatron's checkpoint cannot be written: how that shows
        self._draw_rare(seed)
        draws = random.Random(f"rival {seed}")
        share = draws.random() < RIVALS_SHARE
        if profile.shrinks:
            return
        if beside is None and self.job.durable is not None and (profile.rivals or (share and profile.rivals is None)):
            self.rival = Rival(self, seed, profile, draws.uniform(0.0, 40.0))

    @property
    def durable(self) -> DurableSpec | None:
        """What the job does about its durable directory; None: it has none."""
        spec = self.job.durable
        return spec if spec is not None and spec.directory else None

    def _draw_rare(self, seed: int) -> None:
        """What would be too rare, or too much, among the others; from its own chance."""
        draws = random.Random(f"rare {seed}")
        if draws.random() < 0.1:
            self.saving_fails = draws.choice(("error", "hangs"))
        if self.durable is not None and draws.random() < 0.1:
            self.faults.change_what_is_read()
        moves = random.Random(f"moves {seed}")
        only, share = self.faults.profile.only, moves.random() < MOVES_SHARE
        if self.faults.profile.moves or (share and self.faults.profile.moves is None and (not only or "drain" in only)):
            self.faults.draw_moves(moves)
        self.full_for_a_moment = draws.random() < 0.05  # when the first rank writes its part of the last checkpoint

    def _draw_run_disk(self, seed: int, beside: Run | None) -> RunDisk | None:
        """In some runs the run directory's file system is full, or read-only, once or for ever; from its own chance."""
        draws = random.Random(f"disk {seed}")
        if draws.random() >= RUN_DISK_SHARE or beside is not None:
            return None
        disk = RunDisk(draws)

        def trouble(error: int) -> None:
            disk.error = error

        for at in sorted(draws.uniform(0.2, 15.0) for _ in range(draws.randint(1, 2))):
            self.anybody.later(at, trouble, draws.choice((errno.ENOSPC, errno.EROFS)))
            if draws.random() < 0.8:
                self.anybody.later(at + draws.uniform(0.1, 20.0), trouble, 0)
        return disk

    def _draw_shards(self, profile: Profile, seed: int) -> None:
        """What is kept of a rank, and where; from chance of its own."""
        draws = random.Random(f"shards {seed}")
        share = draws.random() < SHARDS_SHARE
        if not (profile.shards or (share and profile.shards is None)):
            return
        active = self.job.active_nodes
        schemes = [each for each in ("1", "2", "2+1", "2+1", "2+2", "3+1") if Scheme.parse(each).size <= active]
        racks = draws.randint(2, 3) if draws.random() < 0.6 else 0
        domains = {node: {"rack": f"r{draws.randrange(racks)}"} for node in range(self.job.nodes)} if racks else {}
        self.job = replace(self.job, redundancy=draws.choice(schemes), domains=domains)
        self.constants = draws.random() < 0.6

    @property
    def shape(self) -> str:
        """For people."""
        job = self.job
        waits = f", waits {job.wait_for_spare_s:.0f} s for a spare" if job.wait_for_spare_s else ""
        durable = f", durable every {self.durable.interval}" if self.durable is not None else ""
        durable += f", replicas of {self.replica} become fewer" * bool(self.widths)
        return (
            f"{job.active_nodes}+{job.spare_nodes} nodes x {job.slots_per_node}, redundancy {job.redundancy}{waits}"
            f"{durable}{', constants' * self.constants}{', racks' * bool(job.domains)}"
            f"{', a save ' * bool(self.saving_fails)}{self.saving_fails}"
        )

    def _begin_with(self, generation: int) -> None:
        """An earlier run of the job has left this generation in the durable directory."""
        name = directory_name(generation, "before", 1)
        states = [packed(generation, self.oracle.value(rank, generation)) for rank in range(self.job.world_size)]
        shards = [
            write_shard(self.directory, name, rank, generation, LAYOUT, memoryview(whole(each)), each)
            for rank, each in enumerate(states)
        ]
        if self.constants:
            for rank, shard in enumerate(shards):
                file = write_constants(self.directory, CONSTANTS_LAYOUT, memoryview(constants(rank)))
                shards[rank] = msgspec.structs.replace(shard, constants=file)
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

    def _answers(self, vault: r.Address) -> bool | None:
        host = self.at(vault.host)
        return None if host.process.frozen or not self.network.both(HQ, host.node) else not host.alive

    def lives(self, node: int) -> bool:
        """Its agent is there."""
        host = self._by_node.get(node)
        return host is not None and host.alive

    def came(self, node: int) -> bool:
        """Its agent has ever been there."""
        host = self._by_node.get(node)
        return host is not None and host.link.ever

    def place(self, rank: int, epoch: int) -> r.CoordinateInfo:
        """Where a rank is in the layout: pipelines of so many stages as a replica has ranks."""
        width = self.oracle.ranks(epoch) // self.replica
        return r.CoordinateInfo(rank, 0, rank // width, rank % width)

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
        """To the end of the job, and of one that has taken its directory over. Raises Violation."""
        world = self.world
        while not self.over or (self.rival is not None and not self.rival.over):
            if not world.step():
                raise Violation("nothing happens any more")
            if world.events % 16 == 0 or self.hq.ended is not None:
                self._look()
            if self.rival is not None and self.rival.run is not None:
                self.rival.run._look()
        assert self.hq.ended is not None
        return self.hq.ended

    def _look(self) -> None:
        """After an event."""
        hq, oracle, world = self.hq, self.oracle, self.world
        if self.over or (hq.ended is None and world.events % 16):
            return
        self._drained()
        if hq.ended is not None:
            self.over = True
            oracle.end(*hq.ended)
            if hq.run_disk is not None and (missing := hq.log.missing()):
                raise Violation(f"{missing} events of the last coordinator are neither written nor counted")
            for host in self.hosts if self.rival is not None else ():
                host.die(silently=True)
            return
        oracle.look()
        if world.now > self._until:
            raise Violation(f"no end after {_LONGEST_S:g} s: {hq.core.phase}, iteration {oracle.iteration}")

    def _drained(self) -> None:
        """A node that the user has taken away is none that the job may count on."""
        for node, state in self.hq.core.nodes.items():
            if state.role in ("leaving", "left") and node not in self.faults.drained | self.faults.culprits:
                raise Violation(f"node {node} is taken away, and nobody asked for it")
            if state.role == "left":
                self.oracle.hurt.setdefault(node, "drained")


class Rival:
    """Somebody starts a second job with the durable directory of one that may live."""

    def __init__(self, first: Run, seed: int, profile: Profile, at: float) -> None:
        self._first = first
        self._seed, self._profile = seed, replace(profile, rivals=False, durable=False, shards=False)
        self.run: Run | None = None
        self.refused = False
        self._taking: Taking | None = None
        first.anybody.later(at, self._look)

    @property
    def over(self) -> bool:
        """It was refused, or has ended."""
        return self.refused or (self.run is not None and self.run.over)

    def _look(self) -> None:
        first = self._first
        world, directory = first.world, first.directory
        self._taking = self._taking or Taking(
            Directory(world, _RIVAL, directory),
            this_process(_RIVAL),
            lambda line: world.say("rival", "does the owner live?"),
            world.now,
        )
        owner = directory.owner
        silent = world.now - directory.beat_at.get("sim", -math.inf)
        try:
            lease = self._taking.look(world.now)
        except Taken as err:
            world.say("rival", "the owner lives")
            self.refused = True
            if silent > WATCH_S:
                raise Violation(f"a job is refused a directory that nobody has renewed: {err}") from None
            return
        if lease is None:
            first.anybody.later(LOOK_S, self._look)
            return
        world.say("rival", "takes the directory over")
        if owner is not None and owner.job == "sim" and not owner.ended and silent < WATCH_S:
            raise Violation(f"the directory is taken from a job that renewed it {silent:.1f} s ago")
        try:
            self.run = Run(self._seed, self._profile, beside=first, lease=lease)
        except Unreadable as err:  # it ends with 77: nothing begins from zero beside what there is
            world.say("rival", str(err))
            self.refused = True
            if (whole := first.oracle.directory.whole()) is not None:
                raise Violation(f"a job is refused for damage, and generation {whole} is whole: {err}") from None


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """A run is short, and what it leaves is garbage as a whole."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def simulate(seed: int, profile: Profile | None = None, trace: bool = False) -> Outcome:
    """One run from its seed alone."""
    run = Run(seed, profile or Profile(), trace)
    code, message, violation = -1, "", ""
    with contextlib.redirect_stderr(io.StringIO()), _without_collections():
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
        run.shape, run.faults.kinds, run.world.trace or [],
    )  # fmt: skip
