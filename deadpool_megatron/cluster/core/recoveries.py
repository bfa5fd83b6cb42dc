"""From a declaration to training again: who takes over, what all go on from, when groups form. Pure.

`cluster.core.recovering.Recovery` knows where one epoch stands; here is what is decided and told at each of its steps::

    declare(reason) -> Declare .. all Offers -> Agree .. all arrived -> Form .. all ready, formed, restored, resumed
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Answer, Effects, LetGo, Persist, Resize, Send, StartOver, Stop, emit
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.recovering import Recovery
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.agreement import ANY_EPOCH, Agreement, NoCommonGeneration, RefusedCopy, agree
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.vault import Version


class Recoveries:
    """The recoveries of one job, one after the other.

    Args:
        rendezvous: where the store listens that process groups are re-formed over.
    """

    def __init__(self, state: JobState, rendezvous: r.Address | None) -> None:
        self._state = state
        self._rendezvous = rendezvous
        self.current: Recovery | None = None
        self.helpers: set[int] = set()
        """Nodes that hold no coordinate and have shards to give."""
        self.vacant: set[tuple[int, int]] = set()
        """Slots (node, local) of healthy nodes whose worker has died."""
        self.in_place: set[tuple[int, int]] = set()
        """Of them, those for which no spare is spent: another process stands by there, or the cause is elsewhere."""
        self._purpose: r.Purpose = "resume"
        self._refused: set[RefusedCopy] = set()
        self._generation = -1
        self._written = ANY_EPOCH  # in which that was
        self._whole = False  # nothing of it has to be rebuilt
        self._waits_until: float | None = None
        self._wait_told = False  # by this coordinator
        self._end = ""  # why the job cannot go on, once it only saves or drains what it has
        self._placed: list[r.SlotAddress] | None = None  # how coordinates were placed when it came to that
        self._not_saved = ""  # why Megatron's checkpoint could not be written
        self._full: set[tuple[int, int]] = set()  # (node, rank whose shard it has no room for)
        self._told: r.Declare | None = None
        self._heard: set[int] = set()  # who was there when that was told
        self._durable_name = ""  # of the durable generation this recovery goes back to

    def of(self, epoch: int) -> Recovery | None:
        """The recovery under way, if it is that of ``epoch``."""
        return self.current if epoch == self._state.members.epoch else None

    # ---- the declaration

    def declare(self, reason: str, now: float) -> Answer[list[int] | None]:
        """A new epoch begins. The ranks that have new workers in it; None: the job has been stopped instead."""
        state, members = self._state, self._state.members
        out_of_use = {n for n in members.active() if members.nodes[n].role in ("lost", "leaving")}
        old = list(members.assignment)
        if not (yield from self._place(out_of_use, reason, now)):
            return None
        members.epoch += 1
        state.protection.moved(members.assignment, state.layout.coordinates, self._purpose == "resume")
        self.vacant = {(node, local) for node, local in self.vacant if node in members.active()}
        replaced = [
            rank
            for rank, slot in enumerate(members.assignment)
            if slot != old[rank] or (slot.node, slot.local) in self.vacant
        ]
        there = [node for node in members.active() if not members.gone(node)]
        self.current = Recovery(self._purpose, there, self.helpers, state.job.deadlines, now, self._waits_until)
        yield from state.durability.epoch_ended(out_of_use, members.assignment)
        yield Persist()
        yield emit(
            "declared",
            lost=sorted(out_of_use),
            replaced=replaced,
            restarts=state.layout.restarts,
            nodes=members.active(),
            width=state.layout.width,
            reason=reason,
            purpose=self._purpose,
        )
        if state.layout.restarts:
            replaced = list(range(len(members.assignment)))
        self._told = r.Declare(
            members.epoch,
            self._purpose,
            reason,
            members.lost(),
            replaced,
            members.assignment,
            members.vaults(),
            state.protection.told,
            *state.layout.sizes,
            self._rendezvous,
        )
        self._heard = {node for node in members.present() if members.nodes[node].agent_pid}
        yield Send(None, self._told)
        return replaced

    def _place(self, out_of_use: set[int], reason: str, now: float) -> Answer[bool]:
        """Give away the coordinates of these nodes and of vacant slots. False: nobody could take them.

        Where a spare is worth waiting for, they stay where they are.
        """
        state, members = self._state, self._state.members
        out_of_use |= self._trains_on()
        taken_by = self._taken_by(out_of_use)
        if taken_by is None and self._purpose == "resume":
            yield from self._call_drains_off(out_of_use)
            taken_by = self._taken_by(out_of_use)
        there = {node for node in members.present() if members.nodes[node].agent_pid}
        coming = bool(members.coming_spares() and there)  # is waited for in any case, until it is late
        patience = math.inf if state.job.when_out_of_spares == "wait" else state.job.wait_for_spare_s
        if not there:
            patience = 0.0  # nobody is left whose state could be kept
        if taken_by is None or self._purpose != "resume":
            self.helpers |= there  # a spare may have shards of when it was none
        if taken_by is not None and self._purpose == "resume":
            self._waits_until = None
            members.hand_over(taken_by)
            self.helpers |= {node for node in taken_by if not members.gone(node)}
            self.helpers -= set(taken_by.values())
        elif state.progress.fresh and out_of_use:
            yield StartOver(reason)
            return False
        elif self._purpose == "resume" and (
            coming or (patience and (self._waits_until is None or now < self._waits_until))
        ):
            if self._waits_until is None:
                self._waits_until, self._wait_told = now + patience, False
            if not self._wait_told:
                until = max(self._waits_until, now + coming * state.job.deadlines.join)
                minutes, self._wait_told = (until - now) / 60, True
                yield emit(
                    "waiting",
                    lost=sorted(out_of_use),
                    minutes=minutes if minutes < math.inf else None,
                    message=f"no spare is left for node {min(out_of_use)} ({reason}); the others keep their state and "
                    f"wait {f'{minutes:.4g} minutes ' * (minutes < math.inf)}for one to come (deadpool join)",
                )
        elif out_of_use or self._purpose != "resume":
            self._waits_until = None
            if out_of_use:  # else what ends the job is what ended it in the epoch before
                self._end = f"no spare is left for node {min(out_of_use)} ({reason})"
            plan = self._rescue(there)
            shrinks = self._purpose != "save" and state.can_shrink()
            if plan is not None and state.layout.can_rescue and not self._not_saved and not shrinks:
                self._purpose = "save"
            elif plan is not None and (shrinks or state.durability.can_drain):
                self._purpose = "drain"
            else:
                yield self._unsaved("" if there else "nobody survives")
                return False
            members.assignment = plan
        return True

    @property
    def placed(self) -> list[r.SlotAddress]:
        """How coordinates are placed, or were before the job came to save, or to drain, what it has."""
        return self._placed or self._state.members.assignment

    def _rescue(self, there: set[int]) -> list[r.SlotAddress] | None:
        """Where the coordinates are while what there is of them is saved: with spares too, as far as these go."""
        state, members = self._state, self._state.members
        before = self._placed = self._placed or members.assignment
        stay = set(placing.nodes_of(before))
        lost = {node for node in stay if members.gone(node) or members.nodes[node].role == "leaving"}
        full = {node for node, _ in self._full}
        spares = sorted(node for node in there - stay - full if members.nodes[node].role != "leaving")
        plan = placing.rescue(before, lost, state.job.slots_per_node, spares, self._full)
        for node in placing.nodes_of(plan or ()):
            members.nodes[node].role = "active"
        return plan

    def _trains_on(self) -> set[int]:
        """Spares enough have come since the job had to save what it has: coordinates are where they were, and those of
        these nodes are to be given away. Empty: it goes on to save, or does not."""
        members, placed, slots = self._state.members, self._placed or [], self._state.job.slots_per_node
        before = placing.nodes_of(placed)
        lost = {node for node in before if members.gone(node) or members.nodes[node].role == "leaving"}
        taken = {node for node in members.active() if node not in before and not members.gone(node)}
        enough = len(lost) <= len(taken) + len(members.ready_spares()) + len(members.cold_spares())
        # (a coordinator that has started again does not know how they were placed)
        if self._purpose != "save" or not lost or not enough or any(slot.local >= slots for slot in placed):
            return set()
        members.assignment = placed
        for node in taken:  # its workers hold coordinates, and others are parked in their place
            members.nodes[node].role = "spare"
            members.nodes[node].parked.clear()
        self.helpers |= taken
        self.vacant = {slot for slot in self.vacant if slot[1] < slots}
        self._purpose, self._placed, self._end, self._not_saved = "resume", None, "", ""
        self._full.clear()
        return lost

    def _unsaved(self, why: str = "") -> Stop:
        """The job ends without a checkpoint."""
        if not why and self._full:
            full = sorted({node for node, _ in self._full})
            why = f"node {', '.join(map(str, full))} has no room for what it had"
        needs = "it takes --save and a backend that shares devices"
        if self._state.layout.restarts:
            needs = "experts span nodes with --moe-token-dispatcher-type flex, and nothing but its end frees a process"
        why = why or self._not_saved or needs
        return Stop(Exit.NO_SPARE, f"{self._end} and no checkpoint could be saved: {why}")

    def _taken_by(self, out_of_use: set[int]) -> dict[int, int] | None:
        return self._state.spares.for_lost(out_of_use, {node for node, _ in self.vacant - self.in_place})

    def _call_drains_off(self, out_of_use: set[int]) -> Effects:
        """There are not spares enough: a node that is drained and still there, and healthy, is worth more than none."""
        members = self._state.members
        for node, state in members.nodes.items():
            if state.role == "leaving" and state.respawns:
                state.role = "active" if members.holds(node) else "spare"
                out_of_use.discard(node)
                yield emit("stays", node=node, cause="no parked spare is left to take over")

    def takes_in(self, node: int) -> bool:
        """Who ended on this node, and has another process standing by, is replaced in the epoch that is under way.

        It had not left its step in that epoch, so it ended with the others or before them. The node has not made its
        offer, and makes it without that worker's live state.
        """
        current = self.current
        if current is None or current.phase is not Phase.ARRIVING or self.ends:
            return False
        return node in current.active and node not in current.offers

    def missed_by(self, record: r.Join) -> bool:
        """An agent that is there again has not heard of the epoch, or what it has said since is lost."""
        members, current = self._state.members, self.current
        needed = members.holds(record.node) or record.node in self.helpers
        if current is not None and record.node in current.givers:
            needed = True
            if current.waits_for(record.node):  # which it may have said over a connection that had ended
                return True
        return needed and (record.epoch != members.epoch or not record.settled)

    @property
    def drains(self) -> bool:
        """The job cannot go on, and agents alone make durable what it has: what becomes of its workers is no matter."""
        return self._purpose == "drain"

    @property
    def ends(self) -> bool:
        """The job cannot go on: it saves what it has, or makes that durable."""
        return self._purpose != "resume"

    def spare_came(self) -> bool:
        """Somebody was waited for, and there are enough spares now."""
        if self.current is None or self.current.waits_until is None:
            return False
        members = self._state.members
        lost = [node for node in members.active() if members.gone(node)]
        return len(lost) <= len(members.ready_spares()) + len(members.cold_spares())

    @property
    def went_back(self) -> bool:
        """The recovery under way goes on from a durable generation."""
        return bool(self._durable_name) and self.current is not None

    # ---- what all go on from

    def offer(self, record: r.Offer, now: float) -> Effects:
        """A node has left its step, and says what it can give."""
        recovery = self.of(record.epoch)
        since = self._state.members.resized
        if since:  # shards of a wider job have the numbers of these, and are others
            own, peer, parity = (_written_since(since, held) for held in (record.own, record.peer, record.parity))
            record = msgspec.structs.replace(record, own=own, peer=peer, parity=parity)
        if recovery is None or not recovery.offered(record):
            return
        yield emit("aborted")
        if recovery.waits_until is None:
            yield from self._agree(recovery, now)
        else:
            recovery.wait()

    def _agree(self, recovery: Recovery, now: float) -> Effects:
        state, members = self._state, self._state.members
        self._durable_name = ""
        if self._purpose == "drain":  # what only a worker holds is not written by an agent
            for node, offer in recovery.offers.items():
                recovery.offers[node] = msgspec.structs.replace(offer, live={}, live_epochs={})
        agreement: Agreement | None
        try:
            refused, words = frozenset(self._refused), state.protection.words
            agreement = agree(members.assignment, recovery.offers, refused, words, state.layout.repeatable)
            missing: list[int] = []
        except NoCommonGeneration as err:
            agreement, missing = None, err.missing
        if agreement is None or agreement.generation < state.progress.committed:
            others = recovery.ask(self._heard & set(members.present()), now)
            for node in others:  # a spare may have what would be given up, and may have been away
                assert self._told is not None
                yield Send(node, self._told)
            if others:
                return
        if agreement is None:
            if self._purpose == "drain" and state.can_shrink() and state.durability.sealing:
                recovery.deadline = None  # that has its own
                state.durability.sealed_last()
                return
            if self._purpose == "drain" and state.can_shrink() and state.durability.base is not None:
                yield Resize(self._end)
                return
            if self._purpose == "drain":
                yield Stop(Exit.NO_SPARE, f"{self._end}, and no generation is complete in memory")
                return
            fallback = state.durability.fallback()
            if fallback is None and (state.progress.fresh or state.durability.only_recut):
                lost = members.lost()
                why = f"node {max(lost)} was lost" if lost else "communication failed"
                if state.progress.committed >= 0:
                    why = f"more nodes were lost than the redundancy covers, which is {state.protection.covers}"
                yield StartOver(why)
                return
            if fallback is None:
                yield Stop(Exit.GENERATION_LOST, self._nothing_left(missing))
                return
            agreement, self._durable_name = Agreement(fallback[0], {}), fallback[1]
            state.progress.iteration = agreement.generation - 1
            held = "no generation is complete in the vaults any more"
            if missing:
                held = f"no vault holds the shards of ranks {', '.join(map(str, missing))} any more"
            yield emit(
                "durable_fallback",
                iteration=agreement.generation,
                name=self._durable_name,
                message=f"more nodes were lost than the redundancy covers, which is {state.protection.covers}: {held}; "
                f"training goes back to durable generation {agreement.generation}",
            )
        recovery.agreed(agreement.generation, now)
        self._generation, self._written = agreement.generation, agreement.epoch
        self._whole = not agreement.rebuilds
        state.progress.go_on(members.active(), members.epoch, agreement.generation)
        yield emit(
            "agreed",
            iteration=agreement.generation,
            sources={str(rank): source.node for rank, source in agreement.sources.items()},
            rebuilds={
                str(rank): sorted({share.node for part in parts for share in part})
                for rank, parts in agreement.rebuilds.items()
            },
        )
        a = agreement
        yield Send(
            None,
            r.Agree(
                members.epoch,
                a.generation,
                a.sources,
                dict(state.progress.done),
                a.rebuilds,
                self._durable_name,
                a.held,
            ),
        )
        yield from self._check_arrived(recovery)

    def _nothing_left(self, missing: list[int]) -> str:
        state = self._state
        if state.progress.committed < 0:
            lost = state.members.lost()
            what = f"node {min(lost)} was lost" if lost else "communication failed"
            return (
                f"{what} before the first generation was committed, so there is nothing to go on from; start the "
                "job again"
            )
        held = "of ranks " + ", ".join(map(str, missing)) if missing else "of every rank"
        return (
            f"more nodes were lost than the redundancy covers, which is {state.protection.covers}: no vault holds the "
            f"shards {held} of one generation; restart the job from Megatron's last checkpoint (--load)"
        )

    def fetch_failed(self, record: r.FetchFailed) -> Answer[str]:
        """A shard could not be had from where it was to come from. Why another epoch has to begin; may be empty."""
        if self.of(record.epoch) is None:
            return ""
        if self._durable_name and record.source < 0:
            yield from self._state.durability.bad(self._durable_name, record.why)
            return f"rank {record.rank} of durable generation {record.generation} could not be read"
        if record.gone:  # so it is offered no more
            return record.why
        self._refused.add((record.rank, record.source, record.generation, record.version_epoch, record.share))
        yield emit("refused", rank=record.rank, node=record.source, iteration=record.generation, cause=record.why)
        what = "the copy" if record.share < 0 else "a share"
        return f"{what} of rank {record.rank} on node {record.source} could not be used: {record.why}"

    def no_room(self, record: r.FetchFailed) -> Answer[str]:
        """A node has no memory for what a lost one had, which others may have. Why another epoch has to begin."""
        leaves = any(self._state.members.nodes[node].role == "leaving" for node in self.helpers)  # with what it has
        if self._whole and not leaves and (yield from self._stay_in_memory(self._generation)):
            return ""
        if (record.node, record.rank) in self._full:
            yield self._unsaved()
            return ""
        self._full.add((record.node, record.rank))
        yield emit("no_room", node=record.node, rank=record.rank, cause=record.why)
        return f"node {record.node} has no room for the shard of rank {record.rank}: {record.why}"

    def given_up(self, record: r.DamagedCopy) -> Effects:
        """A node has given up a copy that had changed: what it offers of that generation from now on is another one."""
        if record.kind != "parity":
            about = (record.holder, record.node, record.generation)
            self._refused = {refused for refused in self._refused if refused[4] >= 0 or refused[:3] != about}
            yield Persist()

    # ---- and then

    def arrived(self, record: r.NodeArrived) -> Effects:
        """The workers that took over coordinates on a node can form their groups."""
        recovery = self.of(record.epoch)
        if recovery is not None:
            recovery.reached("arrived", record.node)
            yield from self._check_arrived(recovery)

    def _check_arrived(self, recovery: Recovery) -> Effects:
        if self._purpose != "drain" and recovery.may_form():
            yield Send(None, r.Form(self._state.members.epoch))

    def last_drained(self) -> Effects:
        """The newest generation is durable, or could not be made so: the end, or a beginning with fewer replicas."""
        goes_on = self._state.can_shrink() and self._state.durability.base is not None
        yield Resize(self._end) if goes_on else self._unsaved()

    def got_on(self, record: r.NodeReady | r.NodeFormed | r.NodeRestored | r.NodeResumed, now: float) -> Effects:
        """A node holds the agreed generation, has its groups, has its parameters back, or trains again."""
        recovery = self.of(record.epoch)
        if recovery is not None:
            if isinstance(record, r.NodeFormed):
                recovery.formed[record.node] = (record.groups, record.changed, record.of)
            recovery.reached(r.STEPS[type(record)], record.node)
            yield from self._advance(recovery, now)

    def compared(self, record: r.Compared, now: float) -> Effects:
        """All ranks have compared what they hold: at the end of a recovery, or because it was time to."""
        members = self._state.members
        if record.epoch != members.epoch:
            return
        for each in record.unlike:
            nodes = sorted({members.assignment[rank].node for rank in each.ranks if rank < len(members.assignment)})
            yield emit(
                "unlike", iteration=record.iteration, part=each.part, ranks=each.ranks, nodes=nodes, equal=record.equal
            )
        if record.rank != 0:
            return
        seconds = round(record.seconds, 6)
        recovery = self.of(record.epoch)
        if recovery is None:
            yield emit("compared", iteration=record.iteration, seconds=seconds)
        else:
            recovery.compared_s = seconds
            yield from self._advance(recovery, now)

    def _advance(self, recovery: Recovery, now: float) -> Effects:
        while step := recovery.advance(now):
            if step == "reformed":
                groups, changed, of = recovery.groups
                yield emit("reformed", groups=groups, changed=changed, of=of)
            else:
                yield emit(step, iteration=recovery.generation)
            if step == "prepared" and self._purpose == "drain":
                yield from self._drain_last(recovery, now)
                return
        if recovery.restored_reported and recovery.compared_s is not None:
            yield emit("compared", iteration=recovery.generation, seconds=recovery.compared_s)
            recovery.compared_s = None
        if recovery.over:
            self.current = None
            self._none_vacant()
            yield emit("resumed", iteration=recovery.generation)
            yield from self.let_helpers_go()
            yield Persist()

    def _drain_last(self, recovery: Recovery, now: float) -> Effects:
        """All nodes hold the newest generation: it stays in memory for fewer replicas, or becomes durable."""
        state = self._state
        if (yield from self._stay_in_memory(recovery.generation)):
            return
        if state.durability.can_drain:
            recovery.deadline = None  # a drain has its own
            yield from state.durability.drain_last(recovery.generation, state.members.active(), now)
        else:
            yield self._unsaved()

    def _stay_in_memory(self, generation: int) -> Answer[bool]:
        """Fewer replicas begin with what nodes hold of the agreed generation. False: that is not what it is for."""
        state, members = self._state, self._state.members
        if self._purpose != "drain" or not state.can_shrink() or state.durability.leaves:
            return False
        version, coordinates = Version(self._written, generation), state.layout.coordinates
        yield from state.durability.keep_in_memory(version, coordinates, members.epoch, members.assignment)
        yield Resize(self._end)
        return True

    def covered(self, record: r.Covered) -> Effects:
        """What a node's ranks go on from has all its copies again."""
        state = self._state
        here = record.epoch == state.members.epoch and record.generation == self._generation
        if here and state.protection.covered(record.node):
            yield emit("protected", survives=state.protection.degree, iteration=record.generation)

    def saved(self, record: r.Saved) -> Effects:
        """A node has written Megatron's checkpoint, since no spare was left."""
        recovery = self.of(record.epoch)
        if recovery is not None and recovery.reached("saved", record.node):
            members = self._state.members
            yield emit("saved", iteration=record.iteration, directory=record.directory)
            yield Stop(
                Exit.NO_SPARE_SAVED,
                f"no spare is left (nodes lost: {', '.join(map(str, members.lost()))}); Megatron's checkpoint of "
                f"iteration {record.iteration} was saved to {record.directory}: restart the job with --load "
                f"{record.directory}",
            )

    def not_saved(self, why: str, by_all: bool = False) -> bool:
        """Megatron's checkpoint could not be written. False: it is tried again.

        True: an epoch has to begin that makes the generation durable instead, or (``by_all``) ends the job.
        """
        # (the word that all have been restored may be on its way still, or was told to a coordinator that has died)
        restored = by_all or (self.current is not None and self.current.restored_reported)
        if self._purpose != "save" or not restored or not (by_all or self._state.durability.can_drain):
            return False
        self._not_saved = why
        return True

    def start_over(self) -> Effects:
        """The start begins anew: nothing of a recovery counts any more."""
        self.current = None
        self._none_vacant()
        for known in (self._refused, self._full):
            known.clear()
        self._purpose, self._placed, self._waits_until = "resume", None, None
        self._end = self._not_saved = self._durable_name = ""
        yield from self.let_helpers_go()

    def _none_vacant(self) -> None:
        self.vacant.clear()
        self.in_place.clear()

    def let_helpers_go(self) -> Effects:
        """Nobody needs their shards any more."""
        for node in sorted(self.helpers):
            if self._state.members.nodes[node].role == "leaving":
                yield emit("left", node=node)
                yield LetGo(node)
        self.helpers.clear()

    # ---- a coordinator that starts again

    def dump(self, now: float) -> dict[str, Any]:
        """What it has to know, as JSON types. ``waits_s``: for so long a spare is still waited for."""
        return {
            "waits_s": None if self._waits_until is None else max(0.0, self._waits_until - now),
            "recovering": self.current is not None,
            "purpose": self._purpose,
            "no_spare": self._end,
            "not_saved": self._not_saved,
            "refused": sorted(self._refused),
            "vacant": sorted(self.vacant),
            "in_place": sorted(self.in_place),
            "helpers": sorted(self.helpers),
        }

    def load(self, kept: dict[str, Any], now: float) -> None:
        """Restore what `dump` gave. A recovery that was under way is not continued."""
        self._waits_until = None if kept["waits_s"] is None else now + kept["waits_s"]
        self._purpose = kept["purpose"]
        self._end = kept["no_spare"]
        self._not_saved = kept["not_saved"]
        self._refused = {(rank, node, g, epoch, share) for rank, node, g, epoch, share in kept["refused"]}
        self.vacant = {(node, local) for node, local in kept["vacant"]}
        self.in_place = {(node, local) for node, local in kept["in_place"]}
        self.helpers = set(kept["helpers"])


def _written_since(epoch: int, held: Mapping[int, Sequence[tuple[int, int]]]) -> dict[int, list[tuple[int, int]]]:
    return {rank: [each for each in versions if each[0] >= epoch] for rank, versions in held.items()}
