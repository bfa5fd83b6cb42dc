"""What goes wrong in a run, drawn from its seed."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from deadpool_megatron.cluster import records as r
from deadpool_megatron.durable.format import MANIFEST
from simulation.durable import OTHER_JOB

if TYPE_CHECKING:
    from simulation.host import Host
    from simulation.run import Run

__all__ = ["DURABLE_KINDS", "KINDS", "PACKET_KINDS", "Faults", "Profile"]


@dataclass(frozen=True, slots=True)
class Profile:
    """How much goes wrong.

    Attributes:
        most: faults of one run.
        only: kinds that are drawn; none named: all.
        durable: every run has a durable directory, or none has; None: drawn.
        shards: the same of parity, constants and failure domains.
        rivals: the same of another job that wants the durable directory.
        restarts: every recovery needs other processes, on all nodes.
        rehearsals: spares set up coordinates ahead of time.
        standbys: processes stand by for the workers, and several workers end at once.
        checks: spares are checked, and some of them fail.
        moves: every run has drains that something happens to, or none has; None: drawn.
        signs: one machine's GPU is at fault, and takes others along.
        together: workers of several nodes die at about the same time.
        shrinks: what has a durable directory goes on with fewer replicas when no spare is left.
        replaced: how likely a packet's connection is replaced just after it was sent.
    """

    most: int = 8
    only: tuple[str, ...] = ()
    durable: bool | None = None
    shards: bool | None = None
    rivals: bool | None = None
    restarts: bool = False
    rehearsals: bool = False
    standbys: bool = False
    checks: bool = False
    moves: bool | None = None
    signs: bool = False
    together: bool = False
    shrinks: bool = False
    replaced: float = 0.0


_UPSETS = ("kill coordinator", "kill coordinator", "crash coordinator soon", "kill node", "lose node", "kill worker")
_WHEN = ("started", "committed", "committed", "committed", "iteration", "declared", "agreed", "resumed")


class Faults:
    """Of one run. Every fault ends: what is cut heals, what is frozen thaws."""

    def __init__(self, cluster: Run, profile: Profile) -> None:
        self._cluster = cluster
        self.profile = profile
        self.pending = 0
        self.ended_at = 0.0
        self.struck: list[str] = []
        self.kinds: Counter[str] = Counter()  # of these
        self._silent: dict[int, tuple[float, float]] = {}  # by node, the last time nothing was heard of it
        self.drained: set[int] = set()  # nodes that the user wants to take away
        self.asking: set[int] = set()  # those of them about which the coordinator is asked now
        self.culprits: set[int] = set()  # nodes whose machine is at fault
        # for which event of the log, how often, seconds after it, what
        self._waiting: list[tuple[str, int, float, str, Callable[[], None]]] = []
        self._seen: Counter[str] = Counter()
        self._upsets: random.Random | None = None
        self._every: dict[str, Callable[[], None]] = {}  # what happens each time

    def draw(self) -> None:
        """What will happen in this run, and when."""
        chance, cluster = self._cluster.world.chance, self._cluster
        names = [name for name in KINDS if not self.profile.only or name in self.profile.only]
        weights = [KINDS[name][0] for name in names]
        for _ in range(chance.randint(0, self.profile.most) if names else 0):
            name = chance.choices(names, weights)[0]
            self._wait(*self._when(chance), name, partial(KINDS[name][1], self))
        if self.profile.signs:
            for _ in range(cluster.signs.randint(1, 2)):
                count, seconds = cluster.signs.randint(1, 6), cluster.signs.uniform(0.0, 1.0)
                self._wait(cluster.signs.choice(("committed", "declared")), count, seconds, "rack", self._rack)
        if self.profile.standbys:
            for _ in range(cluster.standing.randint(1, 3)):
                self._wait(*self._when(cluster.standing), "ends at once", self._end_at_once)
        if self.profile.checks:
            spares = [host for host in cluster.hosts if not host.known.ranks]
            for host in cluster.checks.sample(spares, cluster.checks.randint(0, len(spares))):
                self._wait(*self._when(cluster.checks), "bad spare", partial(self._turn_bad, host))
        if self.profile.together:
            for _ in range(cluster.together.randint(1, 3)):
                self._wait(*self._when(cluster.together), "workers together", self._kill_workers)
        if cluster.durable is not None:
            self._draw_durable()
        draws = cluster.packets
        if cluster.packet_kinds:
            for name in draws.choices(cluster.packet_kinds, k=draws.randint(1, 4)):
                self._wait(*self._when(draws), name, partial(PACKET_KINDS[name], self))

    def _when(self, chance: Random) -> tuple[str, int, float]:
        """For which event a fault waits, how often, and seconds after it."""
        when = chance.choice(_WHEN)
        if when == "started":
            count, most = 1, 2.0
        elif when == "committed":
            count, most = 1, 0.3 * self._cluster.iterations
        elif when == "iteration":  # near the end
            count, most = self._cluster.iterations - chance.randint(0, 3), 2.0
        else:  # in a recovery, or soon after one: those seconds are the interesting ones
            count, most = chance.randint(1, 3), 1.0
        return when, count, chance.uniform(0.0, most)

    def _turn_bad(self, host: Host) -> None:
        """Its checks find something from now on."""
        self.struck[-1] += f" n{host.node}"
        host.bad = True

    def _reset_control(self) -> None:
        """Of some nodes, the connections to the coordinator; each comes again. No node is hurt."""
        draws, there = self._cluster.packets, [host for host in self._cluster.hosts if host.alive]
        for host in draws.sample(there, min(len(there), draws.choice((1, 1, 2, 10)))):
            self.struck[-1] += f" n{host.node}"
            if host.process.frozen:
                self._hurt(host, "its connection is reset while it is frozen")
            host.link.reset(draws.random() < 0.5, draws.uniform(0.05, 0.3))

    def _drop_control(self) -> None:
        """Something between a node and the coordinator forgets their connection, without a word. No node is hurt."""
        there = [host for host in self._cluster.hosts if host.alive and not host.process.frozen]
        for host in self._cluster.packets.sample(there, min(len(there), 1)):
            self.struck[-1] += f" n{host.node}"
            host.link.drop()
        self._until(2.1 * self._cluster.job.deadlines.lease, lambda: None)  # by then the agents have noticed

    def _lose_machine_of_coordinator(self) -> None:
        """Nobody answers for a machine that is gone, and another one has its coordinator."""
        for host in self._cluster.hosts:
            if host.alive and not host.process.frozen:
                host.link.drop()
        self._cluster.hq.crash()
        self._until(2.1 * self._cluster.job.deadlines.lease, lambda: None)

    def _garble(self) -> None:
        """For a while what is read of shards is changed on the way, or by who reads it; not twice in a row."""
        network, draws = self._cluster.network, self._cluster.packets
        network.garbling = draws.uniform(0.3, 1.0)

        def over() -> None:
            network.garbling = 0.0

        self._until(draws.uniform(1.0, 15.0), over)

    def _reset_control_and_lose(self) -> None:
        """The same, and about then a node is lost, or a worker."""
        cluster = self._cluster
        draws, lose = cluster.packets, cluster.packets.choice((self._kill_node, self._lose_node, self._kill_worker))
        first, then = draws.sample((self._reset_control, lose), 2)
        first()
        self._until(draws.uniform(0.0, 0.3), then)

    def _rack(self) -> None:
        """One GPU is at fault: its machine tells of it, the others of their links, and workers of all of them end."""
        cluster, chance = self._cluster, self._cluster.signs
        there = [host for host in cluster.hosts if host.alive and host.known.ranks]
        if len(there) < 2:
            return
        hit = chance.sample(there, chance.randint(2, len(there)))
        self.culprits.add(hit[0].node)
        self.struck[-1] += f" n{hit[0].node}, follow: {[host.node for host in hit[1:]]}"
        for host in hit:
            after = chance.uniform(0.0, 0.5)
            self._until(after, partial(self._tells, host, 149 if host is hit[0] else 145))
            self._until(after + chance.uniform(0.02, 0.8), partial(self._ends, host))

    def _kill_workers(self) -> None:
        """Some of all nodes' die, within a moment of which half is long for the coordinator."""
        chance, cluster = self._cluster.together, self._cluster
        there = [worker for host in cluster.hosts if host.alive for worker in host.workers()]
        workers = [worker for worker in there if worker.rank is not None]
        for worker in chance.sample(workers, min(len(workers), chance.randint(2, 6))):
            self.struck[-1] += f" {worker.rank}"
            self._until(chance.uniform(0.0, 2 * cluster.job.gather_s), partial(worker.die, -9))

    @staticmethod
    def _tells(host: Host, xid: int) -> None:
        if host.alive and not host.process.frozen:
            host.agent.sign(r.MachineSign(host.node, xid))

    def _ends(self, host: Host) -> None:
        workers = [worker for worker in host.workers() if worker.rank is not None]
        if host.alive and workers:
            self._cluster.signs.choice(workers).die(-9)

    def _end_at_once(self) -> None:
        """Any number of workers of any nodes, those that stand by perhaps among them."""
        cluster, chance = self._cluster, self._cluster.standing
        waits = chance.random() < 0.3
        there = [
            worker
            for host in cluster.hosts
            for worker in host.workers()
            if host.alive and host.known.ranks and (waits or worker.rank is not None)
        ]
        hit = chance.sample(there, chance.randint(1, len(there))) if there else []
        self.struck[-1] += f" {sorted({worker.host.node for worker in hit})}"
        for worker in hit:
            worker.die(-9)

    def _draw_durable(self) -> None:
        """Of its own chance, so that other runs stay as they are."""
        draws, names = self._cluster.draws, [*DURABLE_KINDS]
        if draws.random() < 0.3 and (not self.profile.only or "damage" in self.profile.only):
            self._wait("durable_resumed", 1, 0.0, "damage", self._damage)
        for _ in range(draws.randint(0, 3)):
            name = draws.choice(names)
            if not self.profile.only or name in self.profile.only:
                count, seconds = draws.randint(1, 12), draws.uniform(0.0, 1.0)
                self._wait(
                    draws.choice(("committed", "declared")), count, seconds, name, partial(DURABLE_KINDS[name], self)
                )

    def draw_moves(self, draws: random.Random) -> None:
        """A drain, and while it is under way the coordinator dies, or nodes and workers are lost, or both. In some runs
        the coordinator dies before the job has begun, too, or while a spare is waited for."""
        self._upsets = draws
        if draws.random() < 0.2:
            self._cluster.anybody.later(draws.uniform(0.0, 1.0), self._kill_coordinator)

        def drain() -> None:
            self._drain()
            for name in draws.choices(_UPSETS, k=draws.randint(1, 3)):
                self.pending += 1
                seconds = draws.uniform(0.0, draws.choice((0.3, 3.0)))
                self._cluster.anybody.later(seconds, self._strike, name, partial(KINDS[name][1], self))

        for _ in range(draws.randint(1, 2)):
            self._wait("committed", draws.randint(1, 8), draws.uniform(0.0, 1.0), "drain that is upset", drain)

    def change_what_is_read(self) -> None:
        """In the memory of one node what it has read from the durable directory changes, each time."""

        def change() -> None:
            host = self._cluster.hosts[0]
            if not host.alive or self._cluster.hq.ended:
                return
            self.struck.append(f"{self._cluster.world.now:.2f} what n{host.node} has read changes")
            self.kinds["what is read changes"] += 1
            for slot in (slot for arena in host.shards.vault.arenas() for slot in arena.slots):
                if slot.complete:
                    self._cluster.oracle.damages(slot, host)

        self._every["durable_resumed"] = change

    def _full_directory(self) -> None:
        self._trouble("full", True, False)

    def _unreadable_directory(self) -> None:
        self._trouble("unreadable", True, False)

    def _slow_directory(self) -> None:
        self._trouble("slow", self._cluster.draws.uniform(0.5, 8.0), 0.05)

    def _trouble(self, what: str, value: float, usual: float) -> None:
        """For a while that is shorter than a recovery's patience with it."""
        cluster = self._cluster
        directory, seconds = cluster.directory, cluster.draws.uniform(0.5, 12.0)
        setattr(directory, what, value)
        cluster.oracle.directory.begins(what, seconds)
        self._until(seconds, lambda: setattr(directory, what, usual))

    def _damage_file(self) -> None:
        directory, draws = self._cluster.directory, self._cluster.draws
        newest = max((name for name in directory.data if name.endswith(MANIFEST)), default=None)
        files = [] if newest is None else sorted(n for n in directory.data if n.startswith(newest.split("/")[0]))
        if files:
            name = draws.choice(files)
            data = bytearray(directory.data[name])
            data[draws.randrange(len(data))] ^= 1
            directory.data[name] = bytes(data)
            self._cluster.oracle.directory.damages(name.split("/")[0])
            self.struck[-1] += f" {name}"

    def _another_owner(self) -> None:
        """Another job takes the directory over, as one may whose watch saw nobody renew it."""
        directory = self._cluster.directory
        number = max((int(name[6:12]) for name in directory.files()), default=0) + 1
        directory.claim(f"owner-{number:06d}.json", OTHER_JOB)

    def _damage_every_copy(self) -> None:
        """Of one rank, whose worker dies: only the durable directory can help, which may not be readable at once."""
        cluster, draws = self._cluster, self._cluster.draws
        workers = [rank for host in cluster.hosts for rank in host.workers() if rank.rank is not None]
        if not workers:
            return
        worker = draws.choice(workers)
        self.struck[-1] += f" rank {worker.rank}"
        for host in cluster.hosts:
            for arena in host.shards.vault.arenas():
                for slot in arena.slots if arena.info.rank == worker.rank else ():
                    if slot.complete:
                        cluster.oracle.damages(slot, host)
        worker.die(-9)
        if draws.random() < 0.5:
            self._unreadable_directory()

    def _kill_drainer(self) -> None:
        there = [host for host in self._cluster.hosts if host.alive]
        if there:
            host = self._cluster.draws.choice(there)
            self.struck[-1] += f" n{host.node}"
            host.durability.kill_drainer()
            self._cluster.oracle.directory.begins("drainer", 0.0)

    def _wait(self, event: str, count: int, seconds: float, name: str, call: Callable[[], None]) -> None:
        self.pending += 1
        self._waiting.append((event, count, seconds, name, call))

    def seen(self, event: str) -> None:
        """The job's log has come to something that faults may wait for."""
        self._seen[event] += 1
        if event in self._every:
            self._cluster.anybody.later(0.0, self._every[event])
        if event == "committed" and self._seen[event] == 1:
            self._cluster.anybody.later(40.0, self._give_up)
        for each in [each for each in self._waiting if each[0] == event and each[1] <= self._seen[event]]:
            self._waiting.remove(each)
            self._cluster.anybody.later(each[2], self._strike, each[3], each[4])

    def _give_up(self) -> None:
        """The recovery that a fault waits for has not come."""
        self.pending -= len(self._waiting)
        self._waiting.clear()

    def _strike(self, kind: str, call: Callable[[], None]) -> None:
        self.pending -= 1
        cluster = self._cluster
        if cluster.hq.ended:
            return
        cluster.world.say("fault", kind)
        self.struck.append(f"{cluster.world.now:.2f} {kind}")
        self.kinds[kind] += 1
        call()
        self.ended_at = max(self.ended_at, cluster.world.now)

    def _until(self, seconds: float, call: Callable[[], None]) -> None:
        """The fault ends then."""
        self.pending += 1

        def over() -> None:
            self.pending -= 1
            self.ended_at = max(self.ended_at, self._cluster.world.now)
            call()

        self._cluster.anybody.later(seconds, over)

    # ---- whom

    def _host(self) -> Host | None:
        there = [host for host in self._cluster.hosts if host.alive]
        return self._cluster.world.chance.choice(there) if there else None

    def _hurt(self, host: Host, what: str) -> None:
        self._cluster.oracle.hurt.setdefault(host.node, what)
        self.struck[-1] += f" n{host.node}"
        self._cluster.world.say("fault", f"n{host.node} {what}")

    def _long_or_short(self) -> float:
        """Seconds: well below what a lease forgives, or beyond it."""
        chance, lease = self._cluster.world.chance, self._cluster.job.deadlines.lease
        return chance.uniform(0.05, 0.38) * lease if chance.random() < 0.5 else chance.uniform(1.0, 4.0) * lease

    def _may_cost(self, host: Host, seconds: float) -> bool:
        """Nothing is heard of a node for so long; one such fault may begin before another is over."""
        now = self._cluster.world.now
        since, until = self._silent.get(host.node, (now, now))
        if until < now:
            since = now
        until = max(until, now + seconds)
        self._silent[host.node] = since, until
        # (an agent whose connection has just been reset has less time)
        return until - since > (0.1 if host.link.unsteady else 0.38) * self._cluster.job.deadlines.lease

    # ---- what

    def _kill_worker(self) -> None:
        host = self._host()
        workers = host.workers() if host is not None else []
        if host is not None and workers:
            worker = self._cluster.world.chance.choice(workers)
            self.struck[-1] += f" n{host.node} {worker.rank}"
            worker.die(-9)

    def _kill_node(self) -> None:
        if (host := self._host()) is not None:
            self._hurt(host, "killed")
            host.die()

    def _lose_node(self) -> None:
        if (host := self._host()) is not None:
            self._hurt(host, "lost silently")
            host.die(silently=True)

    def _freeze_worker(self) -> None:
        host = self._host()
        workers = host.workers() if host is not None else []
        if workers:
            worker, seconds = self._cluster.world.chance.choice(workers), self._long_or_short()
            worker.process.freeze()
            self._until(seconds, worker.process.thaw)

    def _freeze_agent(self) -> None:
        self._freeze(False)

    def _freeze_node(self) -> None:
        self._freeze(True)

    def _freeze(self, workers: bool) -> None:
        host, seconds = self._host(), self._long_or_short()
        if host is None:
            return
        if self._may_cost(host, seconds):
            self._hurt(host, f"frozen for {seconds:.1f} s")
        those = [host.process, *(rank.process for rank in host.workers())] if workers else [host.process]
        for process in those:
            process.freeze()
        host.link.look()

        def thaw() -> None:
            host.process.frozen = False
            host.link.look()
            for process in those:
                process.thaw()

        self._until(seconds, thaw)

    def _cut(self) -> None:
        host, seconds = self._host(), self._long_or_short()
        if host is None:
            return
        if self._may_cost(host, seconds):
            self._hurt(host, f"cut off for {seconds:.1f} s")
        network, which = self._cluster.network, self._cluster.world.chance.randrange(3)
        if which != 1:
            network.mute.add(host.node)
        if which != 2:
            network.deaf.add(host.node)
        host.link.look()

        def heal() -> None:
            if host.alive:
                network.mute.discard(host.node)
                network.deaf.discard(host.node)
            network.healed()
            self._cluster.meetings.healed()

        self._until(seconds, heal)

    def _kill_coordinator(self) -> None:
        self._cluster.hq.crash()

    def _crash_coordinator(self) -> None:
        chance = self._cluster.world.chance
        self._cluster.hq.crash_soon(chance.randrange(2), chance.randrange(6))

    def _freeze_coordinator(self) -> None:
        hq, chance, lease = self._cluster.hq, self._cluster.world.chance, self._cluster.job.deadlines.lease
        seconds = chance.uniform(0.05, 0.9) * lease
        if chance.random() < 0.6:
            seconds = chance.choice((0.5, 2.0, 10.0)) * lease
        process = hq.process
        process.freeze()
        for host in self._cluster.hosts:
            host.link.look()

        def thaw() -> None:
            process.frozen = False
            for host in self._cluster.hosts:
                host.link.look()
            process.thaw()

        self._until(seconds, thaw)

    def _slow(self) -> None:
        world = self._cluster.world
        world.slow = world.chance.uniform(3.0, 20.0)

        def over() -> None:
            world.slow = 1.0

        self._until(world.chance.uniform(0.5, 4.0), over)

    def _resets(self) -> None:
        network, chance = self._cluster.network, self._cluster.world.chance
        network.resets = chance.uniform(0.2, 0.9)

        def over() -> None:
            network.resets = 0.0

        self._until(chance.uniform(0.5, 6.0), over)

    def _full(self) -> None:
        spares = [host for host in self._cluster.hosts if host.alive and not host.known.ranks]
        if spares:
            host = self._cluster.world.chance.choice(spares)
            host.room = False
            self._hurt(host, "without memory")

    def _damage(self) -> None:
        host, chance = self._host(), self._cluster.world.chance
        if host is None:
            return
        arenas = host.shards.vault.arenas()
        if arenas:
            arena = chance.choice(arenas)
            slot = chance.choice(arena.slots)
            if slot.complete:
                self._cluster.oracle.damages(slot, host)
                self.struck[-1] += f" n{host.node} {arena.info.kind} {arena.info.rank} {slot.version}"

    def _slow_link(self) -> None:
        """One node's news of the next seconds come late, or it hears late, or both."""
        host = self._host()
        if host is not None:
            which = self._cluster.world.chance.randrange(3)
            self._delay(host, which != 1, which != 2)

    def _delay(self, host: Host, up: bool, down: bool) -> None:
        self.struck[-1] += f" n{host.node}"
        chance = self._cluster.world.chance
        seconds = chance.uniform(0.3, 3.0)
        host.link.late_up, host.link.late_down = seconds * up, seconds * down

        def over() -> None:
            host.link.late_up = host.link.late_down = 0.0

        self._until(chance.uniform(0.5, 3.0), over)

    def _late_recovery(self) -> None:
        """A worker dies in the last iterations, and one node's news of the recovery come late."""
        cluster = self._cluster

        def kill() -> None:
            self._wait("prepared", self._seen["prepared"] + 1, 0.0, "late news", late)
            self._kill_worker()

        def late() -> None:
            if (host := self._host()) is not None:
                self._delay(host, True, False)

        before = cluster.iterations - cluster.world.chance.randint(0, 3)
        self._wait("iteration", max(before, self._seen["iteration"] + 1), 0.0, "kill worker", kill)

    def _break_groups(self) -> None:
        """A communication fails with every process alive."""
        host = self._host()
        workers = [rank for rank in host.workers() if rank.rank is not None] if host is not None else []
        if workers:
            self._cluster.meetings.broken(workers[0])

    def _damaged_source(self) -> None:
        """A rank's worker dies, and one of the copies has changed; soon after the recovery its new node dies too."""
        cluster, chance = self._cluster, self._cluster.world.chance
        workers = [rank for host in cluster.hosts for rank in host.workers() if rank.rank is not None]
        if not workers:
            return
        worker = chance.choice(workers)
        number = worker.rank
        copies = [
            (host, slot)
            for host in cluster.hosts
            for arena in host.shards.vault.arenas()
            if arena.info.rank == number and host.alive
            for slot in arena.slots
            if slot.complete
        ]
        if not copies:
            return
        newest = max(slot.begin for _, slot in copies)
        host, slot = chance.choice([each for each in copies if each[1].begin == newest])
        cluster.oracle.damages(slot, host)
        self.struck[-1] += f" {number} {slot.version} on n{host.node}, worker on n{worker.host.node}"
        worker.die(-9)

        def then() -> None:
            there = [host for host in cluster.hosts if host.alive and number in host.known.ranks.values()]
            for host in there[:1]:
                self._hurt(host, "killed")
                host.die()

        def at_commit() -> None:
            self._wait("committed", self._seen["committed"] + 1, chance.uniform(0.0, 0.2), "and its node dies", then)

        if chance.random() < 0.7:
            self._wait("resumed", self._seen["resumed"] + 1, 0.0, "then", at_commit)

    def _drain_and_kill_spare(self) -> None:
        cluster = self._cluster
        self._drain()

        def then() -> None:
            spares = [host for host in cluster.hosts if host.alive and not host.known.ranks]
            for host in spares:
                for worker in host.workers():
                    worker.die(-9)

        cluster.anybody.later(cluster.world.chance.uniform(0.0, 1.0), then)

    def _join_and_crash(self) -> None:
        self._cluster.hq.crash_soon(0, 0)
        self._join()

    def _drain(self) -> None:
        host = self._host()
        if host is not None:
            self.struck[-1] += f" n{host.node}"
            self._ask_to_drain(host, self._cluster.world.now + 60.0)

    def _ask_to_drain(self, host: Host, until: float, again: bool = False) -> None:
        """As `deadpool drain --timeout 60`. ``again``: a coordinator that has ended may have heard it."""
        cluster, node = self._cluster, host.node
        self.drained.add(node)
        self.asking.add(node)
        cluster.oracle.drain_asked(node)

        def answered(reply: r.InjectReply | r.SpareAdded | None) -> None:
            later = reply is None or (isinstance(reply, r.InjectReply) and reply.later)
            if later and cluster.world.now < until:
                cluster.anybody.later(0.5, self._ask_to_drain, host, until, again or reply is None)
                return
            self.asking.discard(node)
            error = "" if reply is None else reply.error
            if reply is None or error:
                if not (again and error.endswith("being drained already")):
                    cluster.oracle.drain_ends(node)
                    cluster.oracle.refused_drain(host, error)
            else:
                cluster.oracle.drain_begins(node)

        cluster.hq.ask(r.Drain(node), answered)

    def came_back(self) -> None:
        """The coordinator has started again: who waits for a drain asks what has become of it, where the log may not
        say so. (Where it must, a drain is to go on whether it is asked for or not.)"""
        for host in self._cluster.hosts if self._cluster.hq.torn else ():
            if host.node in self._cluster.oracle.drains and host.node not in self.asking:
                self._cluster.anybody.later(0.05, self._ask_to_drain, host, math.inf, True)

    def awaited(self) -> None:
        """The job waits for a spare; in half of the runs one comes, in time or too late."""
        chance = self._cluster.patience
        if self._cluster.job.wait_for_spare_s and chance.random() < 0.5:
            self._until(chance.uniform(0.0, 1.2 * self._cluster.job.wait_for_spare_s), self._join)
        draws = self._upsets
        if draws is not None and self._cluster.job.wait_for_spare_s and draws.random() < 0.7:
            self._until(draws.uniform(0.3, 1.0) * self._cluster.job.wait_for_spare_s, self._kill_coordinator)

    def narrowed(self) -> None:
        """Fewer replicas go on; in most runs machines come again, and something may happen to what becomes of that."""
        cluster, chance = self._cluster, self._cluster.again
        upset = (self._kill_worker, self._kill_node, self._kill_coordinator)
        for _ in range(chance.choice((0, 1, 1, 2, 3))):
            self._until(chance.uniform(0.2, 10.0), self._come_back)
        if chance.random() < 0.4:
            self.pending += 1
            cluster.anybody.later(chance.uniform(1.0, 20.0), self._strike, "once narrower", chance.choice(upset))

    def _come_back(self) -> None:
        """As `deadpool join`, once more where the job is busy."""
        cluster = self._cluster

        def answered(reply: object) -> None:
            if not isinstance(reply, r.SpareAdded) or reply.error:
                if not cluster.hq.ended:
                    self._until(1.0, self._come_back)
            else:
                cluster.anybody.later(cluster.again.uniform(0.1, 2.0), cluster.add_host, reply.node)

        cluster.hq.ask(r.AddSpare("again"), answered)

    def _join(self) -> None:
        """As `deadpool join`."""
        cluster = self._cluster

        def answered(reply: object) -> None:
            if isinstance(reply, r.SpareAdded) and not reply.error:
                cluster.anybody.later(cluster.world.chance.uniform(0.1, 2.0), cluster.add_host, reply.node)

        cluster.hq.ask(r.AddSpare("new"), answered)


# By name: how often it is drawn, and what happens.
KINDS: dict[str, tuple[int, Callable[[Faults], None]]] = {
    "kill worker": (6, Faults._kill_worker),
    "kill node": (6, Faults._kill_node),
    "lose node": (4, Faults._lose_node),
    "freeze worker": (2, Faults._freeze_worker),
    "freeze agent": (2, Faults._freeze_agent),
    "freeze node": (2, Faults._freeze_node),
    "cut": (3, Faults._cut),
    "kill coordinator": (4, Faults._kill_coordinator),
    "crash coordinator soon": (3, Faults._crash_coordinator),
    "freeze coordinator": (2, Faults._freeze_coordinator),
    "slow network": (2, Faults._slow),
    "slow link": (3, Faults._slow_link),
    "late recovery": (2, Faults._late_recovery),
    "broken groups": (2, Faults._break_groups),
    "resets": (3, Faults._resets),
    "full spare": (2, Faults._full),
    "damage": (3, Faults._damage),
    "damaged source": (3, Faults._damaged_source),
    "drain": (4, Faults._drain),
    "drain, and the spare dies": (2, Faults._drain_and_kill_spare),
    "join": (3, Faults._join),
    "join, and the coordinator dies": (1, Faults._join_and_crash),
}
PACKET_KINDS: dict[str, Callable[[Faults], None]] = {
    "reset control": Faults._reset_control,
    "reset control, and a loss": Faults._reset_control_and_lose,
    "drop control": Faults._drop_control,
    "lose machine of coordinator": Faults._lose_machine_of_coordinator,
    "garbled reads": Faults._garble,
}
DURABLE_KINDS: dict[str, Callable[[Faults], None]] = {
    "full directory": Faults._full_directory,
    "unreadable directory": Faults._unreadable_directory,
    "slow directory": Faults._slow_directory,
    "damaged file": Faults._damage_file,
    "another owner": Faults._another_owner,
    "kill drainer": Faults._kill_drainer,
    "every copy damaged": Faults._damage_every_copy,
}
