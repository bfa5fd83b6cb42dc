"""The promises, judged by what really happened. Knows nothing of how the product decides."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.durable.format import MANIFEST, generation_of
from deadpool_megatron.vault import Version, constants_of
from deadpool_megatron.vault.arena import Slot
from deadpool_megatron.vault.stripes import parts_of

if TYPE_CHECKING:
    from simulation.host import Host
    from simulation.rank import Rank
    from simulation.run import Run

__all__ = ["Oracle", "Violation"]

_SIGN_S = 50.0  # so long at least a sign is known
_MASK = (1 << 60) - 1
_FEW, _FEW_S = 8, 3.0  # iterations may be shorter than the way of a generation
_END_S = 12.0
_DRAIN_S = 8.0
_ROOM_S = 6.0  # until a generation is committed, and written
_ROOM_PEACE_S = 40.0  # what could not be written before is not tried again at once
_WAIT_S = 20.0  # for the next coordinator to come, and agents back to it
_PEACE_S = 4.0  # after the last fault: what waits before it tries again has tried


class Violation(AssertionError):
    """A promise is broken."""


class DirectoryOracle:
    """What the durable directory must be able to give."""

    def __init__(self, cluster: Run) -> None:
        self._cluster = cluster
        self._durable: list[tuple[int, str]] = []  # as told, newest first
        self.damaged: set[str] = set()
        self.trouble_until = -1.0

    def begins(self, what: str, seconds: float) -> None:
        """Something is wrong with it for so long."""
        self.trouble_until = max(self.trouble_until, self._cluster.world.now + seconds)

    def damages(self, name: str) -> None:
        """A file of this generation has changed."""
        self.damaged.add(name)

    def found(self, there: DirectoryOracle) -> None:
        """This job has taken over what another one has left."""
        self._durable, self.damaged = list(there._durable), set(there.damaged)

    def durable(self, generation: int, name: str) -> None:
        """The user is told that a generation is durable."""
        spec = self._cluster.durable
        assert spec is not None
        self._durable = [(generation, name), *self._durable][: spec.keep]

    def made(self, generation: int) -> bool:
        """This generation, or a newer one, was made durable: the user was told so, or it has its manifest."""
        names = [name.split("/")[0] for name in self._cluster.directory.data if name.endswith(MANIFEST)]
        found = [found for name in names if (found := generation_of(name)) is not None]
        return max([*found, *(told for told, _ in self._durable)], default=-1) >= generation

    def whole(self) -> int | None:
        """The newest generation that is there."""
        directory = self._cluster.directory
        for generation, name in self._durable:
            pruned = directory.taken and f"{name}/{MANIFEST}" not in directory.data  # by the job that has it now
            if name not in self.damaged and not pruned:
                return generation
        return None

    def in_peace(self, seconds: float) -> bool:
        """Nothing was wrong with it for so long."""
        return not self._cluster.directory.taken and self._cluster.world.now > self.trouble_until + seconds


@dataclass(slots=True)
class _Held:
    """Where the newest committed generation is, as vaults had it when it was.

    Attributes:
        copies: by rank, (node, kind, slot, turn).
        words: by the ranks of a word, what is kept of its parity: (row, node, slot, turn).
    """

    generation: int
    copies: dict[int, list[tuple[int, str, Slot, int]]] = field(default_factory=dict)
    words: dict[tuple[int, ...], list[tuple[int, int, Slot, int]]] = field(default_factory=dict)


@dataclass(slots=True)
class _Era:
    """A number of ranks, and the numbers that a run of so many has.

    Attributes:
        epoch: since when.
        first: the generation that it began with.
        name: of that in the durable directory; empty: it was in memory.
        values: by generation from that one on, by rank.
    """

    epoch: int
    first: int
    name: str
    values: list[list[int]]

    @property
    def ranks(self) -> int:
        """How many."""
        return len(self.values[0])

    def at(self, generation: int) -> list[int]:
        """By rank, what the undisturbed run has there."""
        while len(self.values) <= generation - self.first:
            last = self.values[-1]
            total = sum(last) & _MASK
            self.values.append([Oracle.after(value, total) for value in last])
        if generation < self.first:
            raise Violation(f"generation {generation} of {self.ranks} ranks, which began with {self.first}")
        return self.values[generation - self.first]


class Oracle:
    """Of one run.

    Attributes:
        hurt: nodes that something happened to which may cost them, and what.
        drains: nodes that are being drained, as the user was told, and the last time something was in the way of that.
    """

    def __init__(self, cluster: Run) -> None:
        self._cluster = cluster
        world_size = cluster.job.world_size
        self._eras = [_Era(0, 0, "", [[rank * 7919 + 1 for rank in range(world_size)]])]
        self.hurt: dict[int, str] = {}
        self._rows: dict[int, int] = {}  # by word
        self.directory = DirectoryOracle(cluster)
        self._goes_back: int | None = None  # to this durable generation
        self._drained: set[int] = set()  # and replaced
        self._unfit: set[int] = set()  # spares, as the user was told
        self.drains: dict[int, float] = {}
        self._drain_told: set[int] = set()
        self._through: dict[int, set[int]] = {}  # by epoch, ranks that have finished in it
        self._done_at: float | None = None  # all of them
        self._back_at = 0.0  # the coordinator, which then waits for those that it knows
        self._deaths: Counter[int] = Counter()
        self._active = list(range(cluster.job.active_nodes))  # nodes, as was declared last
        self._linked: dict[int, float] = {}  # by node, when the coordinator has heard of its links last
        self._ended_alone: set[int] = set()  # nodes of which a worker has ended with no such sign
        self._stood_by: dict[int, bool] = {}  # by node, for everybody who ended there in this recovery
        self._broken: dict[tuple[int, int], Slot] = {}  # by slot and turn
        self._trains: dict[tuple[int, int], int] = {}
        self.safe: _Held | None = None
        self._base: _Held | None = None  # what another number of ranks begins with, in memory
        self.constants_gone = False
        self._breaks = 0  # communicators that broke with every process alive, before the newest iteration
        self._undrained: Counter[str] = Counter()  # drains that failed in peace, by whose constants had changed
        self._resumed = False  # from a durable generation
        self.committed = -1
        self._since, self._since_s = 0, 0.0  # iterations in peace since the last commit, and when that was
        self._ended_at = 0.0  # the last iteration
        self.iteration = -1
        self.ends: dict[int, tuple[int, int]] = {}  # by rank: epoch it finished in, value
        self.declared: list[tuple[float, int, str]] = []
        # The last one, by the epoch since when there are as many ranks, and by rank: the value that its part has.
        self._checkpoint: dict[int, dict[int, int]] = {}
        self._tracked: dict[int, int] | None = None  # as it is on disk when the tracker file says that it is whole
        self.training = False
        self.given_up = 0  # generations that were, rightly
        self._drain_began = 0.0  # the newest drain
        self._first = -1  # the generation that it began anew with, with the nodes that it had
        self.saving: list[int] | None = None  # who was healthy when it was found that no spare is left
        self._waits_since: float | None = None  # for a spare
        self._room_since = 0.0  # for replicas that are away
        self._waits_perhaps = False  # it is not known whether it waits
        self._late: set[int] = set()  # who came when the wait was over, and may not have been counted on

    # ---- numbers

    def value(self, rank: int, generation: int, epoch: int = 0) -> int:
        """What the undisturbed run has there, of as many ranks as in this epoch."""
        return self._era(epoch).at(generation)[rank]

    def ranks(self, epoch: int | None = None) -> int:
        """How many the job has in an epoch; None: now."""
        return (self._eras[-1] if epoch is None else self._era(epoch)).ranks

    def _era(self, epoch: int) -> _Era:
        if epoch and epoch >= (since := self._begun_anew()) > self._eras[-1].epoch:
            self._narrower(since)
        return next(era for era in reversed(self._eras) if era.epoch <= epoch)

    def _begun_anew(self) -> int:
        """Since which epoch there are as many ranks, and since they began with another generation: 0 for ever."""
        core = self._cluster.hq.core
        resized, durability = core.members.resized, core._durability
        fresh = durability.only_recut and core.committed < 0
        other = fresh and durability.base != (self._eras[-1].first, self._eras[-1].name)  # that was damaged, or is gone
        return max(resized, core._start.epoch) if resized > self._eras[-1].epoch or (resized and other) else 0

    def _narrower(self, epoch: int) -> None:
        """Somebody knows that the job has fewer ranks since this epoch; perhaps not by the log, whose writer died."""
        core = self._cluster.hq.core
        memory, written = core._durability.memory, self._eras[-1].epoch
        base = (memory.base.generation, "") if memory is not None else core._durability._recut[0]
        if memory is not None:
            written = memory.base.epoch
        with contextlib.suppress(KeyError, msgspec.DecodeError):  # it has been removed, or a fault has changed it
            written = msgspec.json.decode(self._cluster.directory.data[f"{base[1]}/{MANIFEST}"])["epoch"]
        before = next(era for era in reversed(self._eras) if era.epoch <= written).at(base[0])
        values = [self.recut(before, rank, len(core.assignment)) for rank in range(len(core.assignment))]
        self._eras.append(_Era(epoch, *base, [values]))
        newest = self.safe or self._base
        self._base = newest if memory is not None and newest is not None and newest.generation == base[0] else None
        self.committed, self.iteration, self.safe = -1, base[0] - 1, None
        self.saving = self._tracked = self._done_at = self._waits_since = None
        self.ends.clear()
        self._since, self._since_s = 0, self._cluster.world.now

    @staticmethod
    def recut(values: Sequence[int], rank: int, ranks: int) -> int:
        """What one of so many ranks has of a generation, perhaps of another number of them."""
        if ranks == len(values):  # where a node has come since the job was to begin with fewer
            return values[rank]
        return (sum(values) * 31 + rank * 7919 + 1) & _MASK

    @staticmethod
    def after(value: int, total: int) -> int:
        """A step of training."""
        return (value * 6364136223846793005 + total + 1) & _MASK

    def _right(self, rank: Rank, generation: int, when: str) -> None:
        assert rank.rank is not None
        if rank.value != self.value(rank.rank, generation, max(rank.joined, rank.declared_epoch)):
            raise Violation(f"rank {rank.rank} has wrong numbers {when} of iteration {generation}")

    def begins(self, rank: Rank, iteration: int) -> None:
        """A rank begins an iteration."""
        self._right(rank, iteration, "at the begin")

    def restored(self, rank: Rank, generation: int) -> None:
        """A rank has the agreed generation."""
        self._right(rank, generation, "restored for the begin")

    def steps(self, rank: Rank, iteration: int) -> None:
        """A rank changes its state."""
        assert rank.rank is not None
        node = self._trains.setdefault((rank.joined, rank.rank), rank.host.node)
        if node != rank.host.node:
            raise Violation(f"rank {rank.rank} is trained by nodes {node} and {rank.host.node} in epoch {rank.joined}")

    def through(self, rank: Rank) -> None:
        """A rank has said that it has finished training."""
        assert rank.rank is not None
        self._through.setdefault(rank.joined, set()).add(rank.rank)
        newest = self.declared[-1][1] if self.declared else 0
        if rank.joined == newest and len(self._through[newest]) == self.ranks(newest):
            self._done_at = self._cluster.world.now

    def writes(self, rank: Rank) -> None:
        """A rank has written its part of Megatron's last checkpoint, which is none any more until all have."""
        assert rank.rank is not None
        self._right(rank, self._cluster.iterations, "in the last checkpoint")
        self._checkpoint.setdefault(self._era(rank.joined).epoch, {})[rank.rank] = rank.value

    def tracks(self, rank: Rank) -> None:
        """The tracker file says that it is whole."""
        era = self._era(rank.joined)
        parts = self._checkpoint.get(era.epoch, {})
        missing = set(range(era.ranks)) - parts.keys()
        if missing:
            raise Violation(f"rank {rank.rank} takes the last checkpoint for whole without ranks {sorted(missing)}")
        if era is self._eras[-1]:
            self._tracked = dict(parts)

    def finished(self, rank: Rank) -> None:
        """A rank has come to the end of training."""
        assert rank.rank is not None
        self._right(rank, self._cluster.iterations, "at the end, which is the begin")
        self.ends[rank.rank] = (rank.joined, rank.value)

    def kept(self, keeper: Host, rank: int, version: Version, epoch: int) -> None:
        """A keeper has taken a copy in, sent in an epoch."""
        if epoch < keeper.known.epoch:
            raise Violation(f"node {keeper.node}, in epoch {keeper.known.epoch}, takes a copy sent in epoch {epoch}")

    # ---- what the coordinator writes down

    def event(self, event: str, fields: dict[str, Any]) -> None:
        """A line of the job's log."""
        world = self._cluster.world
        if event != "iteration":
            world.say("log", f"{event} { {k: v for k, v in fields.items() if k != 't'} }")
        if event in ("started", "durable_resumed", "committed", "declared", "agreed", "prepared", "resumed") or (
            event == "iteration" and fields["iteration"] > self.iteration
        ):
            self._cluster.faults.seen(event)
        match event:
            case "training":
                self.training = True
                durable = self.directory.whole()
                if not self._resumed and durable is not None and self._cluster.hq.lives == 1:
                    raise Violation(f"training begins from zero, and generation {durable} is durable")
            case "durable_resumed":
                self._resumed = True
            case "iteration":
                if fields["iteration"] > self.iteration:
                    self.iteration = fields["iteration"]
                    self._breaks = self._cluster.faults.kinds["broken groups"]
                self._behind()
            case "declared":
                self._done_at = None
                self.declared.append((world.now, fields["epoch"], fields["reason"]))
                drained = re.search(r"node (\d+) is (?:drained$|at fault)", fields["reason"])
                if fields["purpose"] == "resume" and drained:
                    self._drained.add(int(drained[1]))
                if fields["purpose"] == "resume" and not drained:
                    self._rightly_taken(fields["nodes"])
                came = {*fields["nodes"]} - {*self._active}
                self._best_taken(came)
                resumes = fields["purpose"] == "resume" and self._cluster.hq.core.phase is not Phase.WAITING
                if came and resumes:  # the next wait is another one
                    self._waits_since = None
                self._active = fields["nodes"]
                if fields["purpose"] in ("save", "drain") and self.saving is None:
                    self.saving = self._healthy()
                    self._waited()
                if len(self.declared) > 1 and self.declared[-1][1] <= self.declared[-2][1]:
                    raise Violation(f"epoch {fields['epoch']} is declared after {self.declared[-2][1]}")
            case "shrunk" | "grown":
                self._resumed = True
                self._active, self._first = fields["nodes"], fields["iteration"]
                self._resized(fields)
                if event == "shrunk":
                    self._cluster.faults.narrowed()
            case "started_over":
                self._era(fields["epoch"])  # it may have become narrower before, and nobody was there to write so
                self._active = fields["nodes"]
                if self.committed > self._first and not (self._cluster.widths and self.lost()):
                    raise Violation(f"the job begins anew, although generation {self.committed} was committed")
                self.committed, self.safe = -1, None
            case "agreed":
                self._agreed(fields["iteration"])
                self._goes_back = None
            case "committed":
                self._committed(Version(fields["epoch"], fields["iteration"]))
            case "unfit":
                self._unfit.add(fields["node"])
            case "checked":
                self._unfit.discard(fields["node"])
            case "sign" if fields["role"] == "link":
                self._linked[fields["node"]] = world.now
            case "coordinator_back":
                if self._cluster.hq.torn and self._waits_since is None:  # that a wait began may have been its last word
                    self._waits_since, self._waits_perhaps = self._cluster.hq.died_at, True
                self._back_at = world.now
                if self._cluster.hq.torn:
                    # (of an end that has been counted nothing may have been written)
                    self._stood_by |= dict.fromkeys(self._cluster.hq.core.nodes, False)
                self._active = self._cluster.hq.core.members.active()  # it may have died of declaring them
                self._cluster.faults.came_back()
            case "stood_still" if self._waits_since is not None:  # nobody is late for that
                self._waits_since += min(fields["seconds"], world.now - self._waits_since)
            case "left":
                self.drain_ends(fields["node"])
            case "detected" if "local" not in fields:
                self.drain_ends(fields["node"])
            case "draining":
                self._drain_began = world.now
            case "detected":
                node = fields["node"]
                self._stood_by[node] = fields.get("stood_by", False) and self._stood_by.get(node, True)
            case "base_lost":
                self._era(fields["epoch"])
                if not self.base_lost():
                    raise Violation(f"generation {fields['iteration']} in memory is given up, and it is there")
            case "durable_failed":
                self._not_drained(fields["message"])
            case "durable":
                self._undrained.clear()
                self.directory.durable(fields["iteration"], fields["name"])
            case "durable_fallback":
                self._goes_back = fields["iteration"]
            case "stays":
                self._drained.discard(fields["node"])
                self.drain_ends(fields["node"])
            case "joined":
                wait, since = self._cluster.job.wait_for_spare_s, self._waits_since
                if since is not None and world.now > since + wait:
                    self._late.add(fields["node"])
            case "waiting" if self._waits_since is None or self._waits_perhaps:  # else by another coordinator
                since = world.now + 60 * fields["minutes"] - self._cluster.job.wait_for_spare_s
                new = self._waits_since is None or since >= world.now - 1e-6  # the one before, if any, was never told
                if new or not self._cluster.hq.core.members.coming_spares():
                    self._waits_since = min(world.now, since)
                self._waits_perhaps = False
                self._cluster.faults.awaited()
            case "resumed":
                self._since, self._waits_since = 0, None
                self._stood_by.clear()

    def _fits(self, nodes: int, most: int) -> int:
        """The most replicas that so many nodes can hold, and no more than ``most``."""
        cluster = self._cluster
        slots, replica = cluster.job.slots_per_node, cluster.replica
        for width in range(most, 0, -1):
            wanted, rest = divmod(width * replica, slots)
            if (width == most or width in cluster.widths) and not rest and 0 < wanted <= nodes:
                return width
        return 0

    def _resized(self, fields: dict[str, Any]) -> None:
        """Fewer replicas, or more: no fewer than the healthy nodes can hold."""
        core = self._cluster.hq.core
        self._era(fields["epoch"])
        here = [node for node in self._healthy() if core.nodes[node].agent_pid]
        here = [node for node in here if node not in self._cluster.faults.drained | self._cluster.faults.culprits]
        most = self._fits(len(here), fields["was"])
        if fields["width"] < most:
            raise Violation(f"{fields['width']} of {fields['was']} replicas go on, and nodes {here} could hold {most}")
        free = set(here) - set(fields["nodes"]) - set(fields["spares"])
        if free:
            raise Violation(f"nodes {sorted(free)} are healthy, and neither train nor are spares")

    def _rightly_taken(self, nodes: list[int]) -> None:
        """No spare is spent on who only follows, and none is one that failed while another one is there."""
        core, now = self._cluster.hq.core, self._cluster.world.now
        for node in {*self._active} - {*nodes} - self.hurt.keys() - self._drained - self._cluster.faults.culprits:
            if now - self._linked.get(node, -_SIGN_S) < _SIGN_S and node not in self._ended_alone:
                raise Violation(f"node {node} gives way, and what ended there has its cause elsewhere")
            if self._stood_by.get(node):
                raise Violation(f"node {node} gives way, and another process stood by for everybody who ended there")
        fresh = [n for n, s in core.nodes.items() if s.role == "spare" and not s.record.failures]
        fresh = [n for n in fresh if core.members.parked(n) and n not in self._active]
        for node in {*nodes} - {*self._active}:
            if core.nodes[node].record.failures and fresh and self._active:
                raise Violation(f"node {node}, which failed before, takes over, and node {fresh[0]} is parked")

    def _waited(self) -> None:
        """The job is to end for want of a spare: has it waited for one as long as it was told to?"""
        wait, since = self._cluster.job.wait_for_spare_s, self._waits_since
        if wait and self._healthy() and (since is None or self._cluster.world.now < since + wait - 0.1):
            raise Violation(f"the job ends for want of a spare, and has not waited {wait:.0f} s for one")

    @property
    def _peace(self) -> bool:
        faults, hq = self._cluster.faults, self._cluster.hq
        # (a coordinator that is to crash does so when it next writes or tells something, perhaps seconds later)
        over = not faults.pending and self._cluster.world.now > max(faults.ended_at, hq.died_at) + _PEACE_S
        return over and hq.core.recovery is None

    def _not_drained(self, message: str) -> None:
        """Constants that have changed in memory are had from their keepers before the next drain."""
        changed = re.search(r"never changes of rank (\d+) has changed in memory", message)
        if changed is None or not self._peace or self._with_constants(int(changed[1])) is None:
            return
        self._undrained[changed[1]] += 1
        if self._undrained[changed[1]] > 1:
            raise Violation(f"drains fail again and again in peace: {message}")

    def _behind(self) -> None:
        """While nothing goes wrong, generations are committed every few iterations.

        An iteration in which a message is late does not count: the generation at which all are to meet is two ahead of
        the newest one begun, so who hears of it more than an iteration later than the others misses it, rightly.
        Nor does one in which slots stay for a drain that has no memory to copy them to.
        """
        world = self._cluster.world
        late, self._ended_at = world.late_at >= self._ended_at, world.now
        late |= any(host.shards.vault._pinned for host in self._cluster.hosts)
        self._since = 0 if not self._peace else self._since if late else self._since + 1
        if self._since == 0:
            self._since_s = world.now
        if self._since > _FEW and world.now - self._since_s > _FEW_S:
            raise Violation(f"{_FEW} iterations in peace, and nothing was committed since generation {self.committed}")

    def _committed(self, version: Version) -> None:
        generation = version.generation
        held = self._held(generation, lambda host, there: there == version)
        for rank in range(self.ranks(version.epoch)):
            if rank not in held.copies:
                raise Violation(f"generation {generation} is committed, and nobody has it of rank {rank}")
        self.safe, self._base = held, None
        self.committed, self._since, self._since_s = generation, 0, self._cluster.world.now

    def _held(self, generation: int, wanted: Callable[[Host, Version], bool]) -> _Held:
        """What vaults have of a generation."""
        held = _Held(generation)
        for host in self._cluster.hosts:
            for arena in host.shards.vault.arenas():
                for slot in arena.slots if not arena.info.constant else ():
                    version = slot.version
                    if not slot.complete or version is None or not wanted(host, version):
                        continue
                    where = host.node, arena.info.kind, slot, slot.turn
                    if arena.info.kind == "parity":
                        ranks = tuple(each.rank for each in parts_of(bytes(slot.small[: slot.small_bytes])))
                        row = self._rows.get(arena.info.rank)
                        if row is not None:
                            held.words.setdefault(ranks, []).append((row, host.node, slot, slot.turn))
                    else:
                        held.copies.setdefault(arena.info.rank, []).append(where)
        return held

    def _moves_on(self, generation: int) -> None:
        """What is agreed takes the place of what was committed where vaults have all of it: that may be overwritten."""
        since = self._eras[-1].epoch
        held = self._held(
            generation,
            lambda host, version: (
                version.generation == generation and version.epoch >= since and not self._gone(host.node)
            ),
        )
        if held.copies.keys() >= set(range(self.ranks())):
            self.safe = held

    def lost(self) -> str:
        """Why the newest committed generation may be given up; empty: it may not."""
        if self.safe is None:
            return "nothing was committed"
        held = self.safe
        for rank, copies in held.copies.items():
            left = [node for node, _, slot, turn in copies if self._good(node, slot, turn)]
            if not left and not self._from_parity(held, rank):
                return f"every holder of rank {rank} of generation {held.generation} is gone or damaged"
        return ""

    def base_lost(self) -> bool:
        """What another number of ranks begins with may be given up: nobody has all of it."""
        if self._base is None:
            return True
        alive = (
            any(self._good(node, slot, turn) for node, _, slot, turn in each) for each in self._base.copies.values()
        )
        return not all(alive) or len(self._base.copies) < self._eras[-2].ranks

    def _good(self, node: int, slot: Slot, turn: int) -> bool:
        return not self._gone(node) and self._whole(slot, turn)

    def _from_parity(self, held: _Held, rank: int) -> bool:
        """For each part of a rank's shard a word has as many shares left as it takes."""
        parts = {ranks.index(rank): False for ranks in held.words if rank in ranks}
        for ranks, rows in held.words.items():
            if rank not in ranks:
                continue
            own = [
                any(kind == "own" and self._good(node, slot, turn) for node, kind, slot, turn in held.copies[other])
                for other in ranks
                if other != rank
            ]
            parity = {row for row, node, slot, turn in rows if self._good(node, slot, turn)}
            parts[ranks.index(rank)] |= sum(own) + len(parity) >= len(ranks)
        return bool(parts) and len(parts) == Scheme.parse(self._cluster.job.redundancy).k and all(parts.values())

    def planned(self, host: Host) -> None:
        """A node keeps parity: of which row each word is."""
        if host.shards.stripes is not None:
            self._rows |= {word: plan.row for word, plan in host.shards.stripes.plans.items()}

    def without_constants(self, rank: Rank) -> None:
        """A worker that takes over cannot have what never changes of its rank."""
        assert rank.rank is not None
        holder = self._with_constants(rank.rank)
        if holder is not None:
            raise Violation(f"rank {rank.rank} is without its constants, which node {holder.node} has")
        if self._cluster.durable is not None and self.directory.whole() is not None and self.directory.in_peace(40.0):
            raise Violation(f"rank {rank.rank} is without its constants, which the durable directory has")
        self.constants_gone = True

    def _with_constants(self, rank: int) -> Host | None:
        """Who has those of a rank."""
        for host in self._cluster.hosts:
            there = host.shards.vault.arenas() if host.node not in self.hurt and host.alive else ()
            for slot in (arena.slots[0] for arena in there if arena.info.rank == constants_of(rank)):
                if slot.complete and self._whole(slot, slot.turn):
                    return host
        return None

    def _none_left(self) -> bool:
        """Nobody has constants of some rank any more: each process that needs them finds so, a new one each time."""
        ranks = range(self.ranks())
        durable = self._cluster.durable is not None and self.directory.whole() is not None
        return self._cluster.constants and not durable and not all(map(self._with_constants, ranks))

    def _gone(self, node: int) -> bool:
        """Its copies are; a node that is drained has them until it leaves."""
        return node in self.hurt or (node in self._drained and not self._cluster.lives(node))

    def damages(self, slot: Slot, host: Host) -> None:
        """Bytes of a copy change in memory; what was read from the durable directory counts as a worker's end then."""
        if self._cluster.durable is not None:
            self.dies(host.node)
        slot.unique[100:108] = b"\xff" * 8
        self._broken[id(slot), slot.turn] = slot

    def _whole(self, slot: Slot, turn: int) -> bool:
        return (id(slot), turn) not in self._broken  # overwritten: by something newer, or it would have been kept

    def dies(self, node: int) -> None:
        """A worker has ended that nobody wanted to end; a node that loses many counts as bad itself."""
        self._deaths[node] += 1
        if self._cluster.world.now - self._linked.get(node, -_SIGN_S) >= _SIGN_S:
            self._ended_alone.add(node)
        if self._deaths[node] > self._cluster.job.worker_deaths:
            self.hurt.setdefault(node, "its workers die")

    def fences(self, node: int) -> None:
        """A node ends itself: rightly if half of those in the job, or more, are gone, so that it cannot tell."""
        others = [n for n, state in self._cluster.hq.core.nodes.items() if n != node and not state.gone]
        others = [n for n in others if self._cluster.came(n)]  # of the others nobody knows where they are
        if 2 * (1 + sum(not self._gone(n) for n in others)) <= 1 + len(others):
            self.hurt.setdefault(node, "half of the nodes are gone")

    def drain_asked(self, node: int) -> None:
        """What is told from now on is the answer."""
        self._drain_told.discard(node)

    def drain_begins(self, node: int) -> None:
        """The user was told that a node is being drained."""
        if node not in self._drain_told:
            self.drains[node] = self._cluster.world.now

    def drain_ends(self, node: int) -> None:
        """The user was told what has become of it, perhaps before the answer."""
        self._drain_told.add(node)
        self.drains.pop(node, None)

    def _look_at_drains(self) -> None:
        """One that nothing is in the way of does not take for ever."""
        cluster, now = self._cluster, self._cluster.world.now
        core, job = cluster.hq.core, cluster.job
        patience = _DRAIN_S + (job.deadlines.build if job.rehearsals else 0.0)  # for a rehearsal
        trains = core.phase is Phase.RUNNING and not core.awaits_agents
        trains = trains and self.iteration + 1 < cluster.iterations  # else it is over, and is not yet saved
        for node, since in self.drains.items():
            parked = any(core.members.parked(host.node) for host in self._spares(node))
            if not trains or not self._peace or node in self.hurt or not parked:
                self.drains[node] = now
            elif now > since + patience:
                raise Violation(f"node {node} is being drained for {now - since:.0f} s in peace")

    def _spares(self, node: int) -> list[Host]:
        """Healthy nodes that could take over."""
        no_use = self.hurt.keys() | self._drained | self._cluster.faults.drained
        hosts = self._cluster.hosts
        return [h for h in hosts if h.node not in no_use and h.node != node and h.link.ever and not h.known.ranks]

    def refused_drain(self, host: Host, error: str) -> None:
        """A drain was refused for good: rightly, unless a healthy spare is there or on its way."""
        cluster = self._cluster
        no_use = self.hurt.keys() | self._drained | cluster.faults.drained
        spares = [h for h in cluster.hosts if h is not host and h.node not in no_use and not h.known.ranks]
        here = host.alive and host.node not in self.hurt and host.known.ranks and not self.ends
        if here and spares and cluster.hq.ended is None and "no parked spare" in error:
            raise Violation(f"node {host.node} is not drained ({error}), and node {spares[0].node} is a spare")

    def _best_taken(self, taken: set[int]) -> None:
        """Who has failed a check takes over only where nobody else is parked."""
        core = self._cluster.hq.core
        better = [node for node in core.members.ready_spares() if node not in self._unfit]
        if better and (bad := taken & self._unfit):
            raise Violation(f"node {min(bad)} has failed its check and takes over, and node {better[0]} is parked")
        self._unfit -= taken

    def _agreed(self, generation: int) -> None:
        if self.safe is not None and generation < self.safe.generation:
            why = self.lost()
            if not why:
                raise Violation(
                    f"back to generation {generation}, although {self.safe.generation} was committed and is there"
                )
            self.given_up += 1
            self.safe = None
            durable = self.directory.whole()
            if self._goes_back == generation and durable is not None and generation < durable:
                raise Violation(f"back to durable generation {generation}, although {durable} is there")
        elif self.safe is not None and generation > self.safe.generation:
            self._moves_on(generation)
        self._since, self._since_s = 0, self._cluster.world.now

    def _healthy(self) -> list[int]:
        left = {node for node, state in self._cluster.hq.core.nodes.items() if state.role == "left"}
        away = self.hurt.keys() | self._drained | self._late | left
        return [host.node for host in self._cluster.hosts if host.link.ever and host.node not in away]

    # ---- after each turn of the coordinator

    def look(self) -> None:
        """Nobody healthy is given up, and every phase has its deadline."""
        core = self._cluster.hq.core
        self._look_at_drains()
        self._look_for_room()
        wait, since = self._cluster.job.wait_for_spare_s, self._waits_since
        waits = wait and core.phase is Phase.WAITING and since is not None and not core.members.coming_spares()
        waits = waits and not self._cluster.hq.process.frozen
        if waits and self._cluster.world.now > (since or 0.0) + wait + _WAIT_S:
            raise Violation(f"a spare is waited for longer than {wait:.0f} s, since {since:.0f}")
        for node, state in core.nodes.items():
            if state.role == "lost" and node not in self.hurt.keys() | self._drained and self._cluster.came(node):
                raise Violation(f"node {node} is healthy, and was given up")
        faults, now = self._cluster.faults, self._cluster.world.now
        over = self._done_at is not None and core.phase not in (Phase.FINISHING, Phase.ENDED)
        if over and not faults.pending and now > max(self._done_at or 0.0, faults.ended_at, self._back_at) + _END_S:
            raise Violation("every rank has finished training, and the job does not end")
        if len(set(core.assignment)) < len(core.assignment):
            raise Violation("two coordinates are in one slot")
        if core.recovery is not None and core.next_deadline() is None:
            raise Violation(f"phase {core.phase.value} has no deadline")

    def _look_for_room(self) -> None:
        """In peace replicas come back when there are nodes for them."""
        cluster, core = self._cluster, self._cluster.hq.core
        room = 0
        peace = cluster.widths and core.phase is Phase.RUNNING and self._peace and self._done_at is None
        peace = peace and not core.awaits_agents  # of whom some may be lost
        if peace and self.directory.in_peace(_ROOM_PEACE_S) and not self.drains:
            spares = [n for n in self._healthy() if core.members.parked(n) and n not in self._active]
            spares = [n for n in spares if core.nodes[n].role == "spare" and n not in self._unfit]
            there = [*self._active, *(n for n in spares if core.members.failures(n) < 2)]
            room = self._fits(len(there), cluster.job.world_size // cluster.replica)
        if room <= self.ranks() // cluster.replica:
            self._room_since = cluster.world.now
        elif cluster.world.now > self._room_since + _ROOM_S:
            raise Violation(
                f"there has been room for {room} replicas since {self._room_since:.0f} s, and they stay away"
            )

    # ---- the end

    def _drained_at_last(self, message: str) -> None:
        """What is complete in memory is made durable before the job ends without a spare or a checkpoint."""
        spec = self._cluster.durable
        assert spec is not None
        if self.safe is None or self.lost() or not self.directory.in_peace(spec.deadline):
            return
        if self.directory.trouble_until >= self._drain_began:
            return  # of which the coordinator may have heard long after
        if self._cluster.constants and not all(map(self._with_constants, range(self.ranks()))):
            return  # a generation is of no use without them
        if not self.directory.made(self.safe.generation):
            raise Violation(
                f"ended for want of a spare ({message}), and generation {self.safe.generation} was not made durable"
            )

    def _could_not_shrink(self, code: int, message: str) -> None:
        """The job has ended for want of a spare: no replica is left, or nothing that one could begin with."""
        cluster = self._cluster
        spec = cluster.durable
        durable = spec is not None and self.directory.whole() is not None and self.directory.in_peace(spec.deadline)
        there = self.safe is not None and not self.lost() and not self.saving
        width = self._fits(len(self._healthy()), self.ranks() // cluster.replica)
        if (durable or there or not self.base_lost()) and width and self.training:
            raise Violation(f"ended with {code} ({message}), and {width} replicas could have gone on")

    def end(self, code: int, message: str) -> None:
        """The job has ended: is that covered by what happened?"""
        cluster = self._cluster
        healthy = self._healthy()
        if code and message.startswith((";", ",", " ")):
            raise Violation(f"ended with {code}, and nothing says why: {message}")
        if code == 0:
            if silent := self.drains.keys() - cluster.faults.asking:
                raise Violation(f"nodes {sorted(silent)} were to be drained, and nobody says what became of that")
            if self._tracked is None:
                raise Violation("the job ended well, and its last checkpoint is not whole")
            for rank in range(self.ranks()):
                if rank not in self.ends and len(healthy) == len(cluster.hosts):
                    raise Violation(f"the job ended well, and rank {rank} never finished")
            return
        if code in (Exit.NO_SPARE, Exit.NO_SPARE_SAVED):
            healthy = healthy if self.saving is None else self.saving
            if len(healthy) >= self.ranks() // cluster.job.slots_per_node:
                raise Violation(f"ended with {code} ({message}), and {len(healthy)} nodes are healthy: {healthy}")
            if code == Exit.NO_SPARE and cluster.durable is not None:
                self._drained_at_last(message)
            if cluster.job.when_out_of_spares == "shrink":
                self._could_not_shrink(code, message)
            return
        if code == Exit.UNEQUAL and self.constants_gone:
            return
        if code == 1 and "for a moment" in message and not self.training:
            return  # an error of the script, of which a coordinator hears that was frozen since before training began
        if code == Exit.USAGE and "no other durable generation is there" in message:
            if self.directory.whole() is not None and self.directory.in_peace(20.0):
                raise Violation(f"ended with {code} ({message}), and generation {self.directory.whole()} is durable")
            return
        broke = cluster.faults.kinds["broken groups"] - self._breaks > cluster.job.transient_retries
        if code == Exit.RECOVERY_FAILED and "with every node alive" in message and (broke or self._none_left()):
            return
        if code == Exit.GENERATION_LOST:
            why = self.lost()
            if not why:
                raise Violation(
                    f"ended with {code} ({message}), and generation {self.safe and self.safe.generation} is there"
                )
            if self.directory.whole() is not None and cluster.hq.knows_directory:  # else the user was told so
                raise Violation(f"ended with {code} ({message}), and generation {self.directory.whole()} is durable")
            return
        raise Violation(f"ended with {code}: {message}")
