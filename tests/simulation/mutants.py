"""Each fix of issue 15 taken back, to see that some seed finds it missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent import commits, fetching
from deadpool_megatron.cluster.agent import durable as node_durable
from deadpool_megatron.cluster.agent.commits import Commits, Upkeep
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.fence import Fence
from deadpool_megatron.cluster.agent.fetching import Attempts
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.recovery import NodeRecovery
from deadpool_megatron.cluster.agent.shards import FetchDone
from deadpool_megatron.cluster.coordinator import coordinator
from deadpool_megatron.cluster.coordinator.coordinator import Coordinator
from deadpool_megatron.cluster.core import recoveries
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.durable import Durability
from deadpool_megatron.cluster.core.effects import Answer, Declare, Effects, Stop
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.members import Members
from deadpool_megatron.cluster.core.observations import Observations
from deadpool_megatron.cluster.core.planned_moves import Drains
from deadpool_megatron.cluster.core.progress import Progress
from deadpool_megatron.cluster.core.protection import Protection
from deadpool_megatron.cluster.core.recoveries import Recoveries
from deadpool_megatron.cluster.core.recovering import Recovery
from deadpool_megatron.cluster.core.signs import Blamed, Signs, Verdict
from deadpool_megatron.cluster.core.start import Start
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.core.worker_ends import WorkerEnds
from deadpool_megatron.cluster.link.awake import AwakeClock
from deadpool_megatron.cluster.placement import agreement
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.durable import lease, loading
from deadpool_megatron.observe import RunDirectory
from deadpool_megatron.recovery import Redo
from deadpool_megatron.vault import CommitLedger, Vault, Version, is_constants
from deadpool_megatron.vault.arena import Slot
from deadpool_megatron.vault.intake import Intake, Intakes
from simulation import durable, headquarters, vaults

__all__ = ["MUTANTS"]

Patch = pytest.MonkeyPatch


def _ranks_apart_are_told_of_by_nobody(patch: Patch) -> None:
    """Row 1: a node reports only what all of its ranks have."""
    committed = Commits.committed

    def before(self: Commits, rank: int, generation: int) -> r.Committed | None:
        told = committed(self, rank, generation)
        return None if told is not None and told.apart else told

    patch.setattr(Commits, "committed", before)


def _who_comes_back_does_not_hear_the_floor(patch: Patch) -> None:
    """Row 1, of nodes: what was told of commits while a node was away it never hears."""
    patch.setattr(Observations, "catch_up", lambda self, node: iter(()))


def _one_failed_fetch_condemns_the_copy(patch: Patch) -> None:
    """Row 2: a connection that breaks is no reason to try again."""

    def failed(self: Attempts[Any], err: Any, now: float) -> None:
        self.error = err

    patch.setattr(Attempts, "failed", failed)


def _no_memory_is_the_sources_fault(patch: Patch) -> None:
    """Row 2: a spare without memory blames who would have given."""
    failed = FetchDone.failed

    def before(*args: Any) -> FetchDone:
        done = failed(*args)
        return FetchDone(done.rank, done.epoch, done.generation, done.source, None, done.error, done.tried, False)

    patch.setattr(FetchDone, "failed", before)


def _a_refusal_outlives_what_it_condemns(patch: Patch) -> None:
    """Row 3: by rank, node and generation, whatever version is there now."""
    patch.setattr(
        agreement,
        "_usable",
        lambda refused, rank, node, g, epoch, share=-1: (rank, node, g) not in {each[:3] for each in refused},
    )


def _a_drain_goes_on_without_a_spare(patch: Patch) -> None:
    """Row 4."""

    def before(self: Drains, drain: Any) -> Effects:
        self._drain = None
        self._state.members.nodes[drain.node].role = "leaving"
        self._recoveries.helpers.add(drain.node)
        yield Declare(f"node {drain.node} is drained")

    patch.setattr(Drains, "_move_out", before)
    _a_drained_node_does_not_come_back(patch)


def _a_gap_in_its_own_time_is_everybody_elses_silence(patch: Patch) -> None:
    """Row 5."""
    patch.setattr(AwakeClock, "now", lambda self: self._clock())


def _training_alone_is_done_again(patch: Patch) -> None:
    """Row 7: a loss in the last save goes back to a generation, and what came after training is left out then."""

    def doing(self: Redo, act: Any) -> Any:
        return self._through([act], False)

    patch.setattr(Redo, "doing", doing)


def _a_loss_at_the_start_ends_the_job(patch: Patch) -> None:
    """Row 8."""

    def before(self: Start, reason: str) -> Answer[bool]:
        yield Stop(Exit.NO_SPARE, reason)
        return False

    patch.setattr(Start, "over", before)


def _nobody_waits_for_a_spare(patch: Patch) -> None:
    """Row 10."""
    place = Recoveries._place

    def before(self: Recoveries, out_of_use: set[int], reason: str, now: float) -> Answer[bool]:
        self._waits_until = now
        return place(self, out_of_use, reason, now)

    patch.setattr(Recoveries, "_place", before)


def _a_drained_node_does_not_come_back(patch: Patch) -> None:
    """Found by the simulation: the spare had no memory, and the job ended although the drained node was still there."""
    patch.setattr(Recoveries, "_call_drains_off", lambda self, out_of_use: iter(()))


def _an_end_is_decided_again(patch: Patch) -> None:
    """Found by the simulation: what came in after the coordinator had ended the job, and died, gave another code."""
    stop = Core._stop

    def before(self: Core, code: Exit | int, message: str) -> Effects:
        self._state.end = None
        return stop(self, code, message)

    patch.setattr(Core, "_stop", before)


def _a_process_ends_once_for_each_coordinator(patch: Patch) -> None:
    """Found by the simulation: a healthy node was given up for deaths that had been counted before."""
    load = WorkerEnds.load
    patch.setattr(WorkerEnds, "load", lambda self, kept: load(self, {**kept, "ended": []}))


def _who_has_left_is_forgotten(patch: Patch) -> None:
    """Found by the simulation: the coordinator died while workers left, and the next one waited for them for ever."""
    load = WorkerEnds.load
    patch.setattr(WorkerEnds, "load", lambda self, kept: load(self, {**kept, "left": []}))


def _who_is_about_to_join_is_too_late(patch: Patch) -> None:
    """Found by the simulation: `deadpool join` was answered, and the job ended before that agent was there."""
    patch.setattr(Core, "_recovery_due", lambda self: self.recovery.deadline if self.recovery is not None else None)


def _a_broken_copy_keeps_its_slot(patch: Patch) -> None:
    """Found by the simulation: the worker waited for the commit of a version that was known to be broken."""
    patch.setattr(Slot, "pair", property(lambda self: (self.begin, self.end)))


def _the_end_is_looked_for_while_agents_come_back(patch: Patch) -> None:
    """Found by the simulation: a worker's death was kept for later, and the job waited for that worker to leave."""
    look = Core._look_for_end

    def before(self: Core) -> Effects:
        expected, self._returning._expected = self._returning._expected, {}
        yield from look(self)
        self._returning._expected = expected

    patch.setattr(Core, "_look_for_end", before)


def _the_end_of_a_connection_is_that_of_its_node(patch: Patch) -> None:
    """A connection to the coordinator that is reset costs its node."""
    away = Core.node_away

    def before(self: Core, node: int, now: float, stood_still: bool = False) -> Any:
        return away(self, node, now, True) if stood_still else self.node_lost(node, "gone", now)

    patch.setattr(Core, "node_away", before)


def _who_lives_has_one_lease(patch: Patch) -> None:
    """An agent that has not noticed yet that its connection was dropped is given up."""

    def before(self: Core, node: int, now: float) -> list[Any]:
        if self._returning.awaits(node):
            self._returning.also(node, now + self.job.deadlines.lease, stood_still=False)
        return []

    patch.setattr(Core, "node_lives", before)


def _one_complaint_condemns_a_copy(patch: Patch) -> None:
    """What arrives changed once is refused for good, though it was the fault of who has read it."""
    failed = Attempts.failed

    def before(self: Attempts[Any], err: Any, now: float) -> float | None:
        self.doubted = True
        return failed(self, err, now)

    patch.setattr(Attempts, "failed", before)


def _one_moment_without_a_majority_is_enough(patch: Patch) -> None:
    """Found by the simulation: a short cut ended a spare, as the coordinator was away and it asked just then."""
    cut_off = Fence.cut_off

    def before(self: Fence, vaults: Any, now: float) -> bool:
        return cut_off(self, vaults, now) or self._alone_since is not None

    patch.setattr(Fence, "cut_off", before)


def _what_was_told_as_committed_is_forgotten(patch: Patch) -> None:
    """Found by the simulation: one node kept a generation that the others then overwrote, and the next loss was 77."""
    patch.setattr(Progress, "heard", lambda self, kept, iteration: None)


def _who_finishes_early_is_forgotten(patch: Patch) -> None:
    """Row 6."""
    finished = Core._node_finished

    def before(self: Core, record: r.Finished) -> Effects:
        if self.phase is Phase.RUNNING:
            yield from finished(self, record)

    patch.setattr(Core, "_node_finished", before)


def _a_drain_does_not_wait_for_a_spare_that_starts(patch: Patch) -> None:
    """Row 12."""
    cannot = Core.cannot_drain

    def before(self: Core, node: int) -> tuple[str, bool]:
        why, later = cannot(self, node)
        return (f"no parked spare is there to take over node {node}", False) if "starting" in why else (why, later)

    patch.setattr(Core, "cannot_drain", before)


def _a_process_that_ends_before_it_takes_over_is_not_missed(patch: Patch) -> None:
    """Found by the simulation: the recovery waited for its deadline, then gave the healthy node up."""
    refill = WorkerEnds._refill

    def before(self: WorkerEnds, state: Any, record: r.WorkerExited, cause: str) -> Effects:
        if record.rank is not None:
            yield from refill(self, state, record, cause)

    patch.setattr(WorkerEnds, "_refill", before)


def _an_older_epochs_fetch_still_lands(patch: Patch) -> None:
    """Found by the simulation: two fetches wrote the same slot, and what they left passed for the newer one."""
    patch.setattr(Intake, "cut", lambda self: None)
    patch.setattr(Intakes, "begin", lambda self, rank, epoch, patience_s: Intake(rank, epoch))


def _a_broken_own_copy_blames_the_source(patch: Patch) -> None:
    """Found by the simulation: the good copy of a peer was refused for it."""

    def before(vault: Vault, rank: int, version: Version) -> Slot | None:
        own = vault.arena(rank, "own")
        held = own.find(version) if own is not None else None
        if held is not None:
            held.verify()
        return held

    patch.setattr(vaults, "own_copy", before)


def _a_wish_is_answered_before_it_is_kept(patch: Patch) -> None:
    """Found by the simulation: who was promised a place by a coordinator that died then was turned away."""
    act, asked = Coordinator._do, Coordinator._request
    late: list[tuple[Any, ...]] = []

    def do(self: Coordinator, actions: Any, step: Any = None) -> None:
        if actions and self._asking:
            late.append((self, actions, step))
        else:
            act(self, actions, step)

    def request(self: Coordinator, identity: bytes, record: Any, now: float) -> None:
        self._asking = True
        try:
            asked(self, identity, record, now)
        finally:
            self._asking = False
        while late:
            act(*late.pop())

    patch.setattr(Coordinator, "_asking", False, raising=False)
    patch.setattr(Coordinator, "_do", do)
    patch.setattr(Coordinator, "_request", request)


def _a_refusal_outlives_the_damaged_copy(patch: Patch) -> None:
    """Found by the simulation: the copy that took its place, of the same version, stayed refused."""
    patch.setattr(Recoveries, "given_up", lambda self, record: iter(()))


def _a_copy_given_up_is_handed_out(patch: Patch) -> None:
    """Found by the simulation: a worker was told to restore a version of epoch -1, and died of it."""
    send = NodeRecovery._hand_out

    def before(
        self: NodeRecovery, rank: int, generation: int, version: tuple[int, int] | None = None, live: bool = False
    ) -> None:
        if version is None and self._shards.version_of(rank, generation) is None:
            worker = self._crew.mine().get(rank)
            if worker is not None:
                worker.send(r.Generation(self._job.epoch, generation, -1, self._shards.path_of(rank), self._done))
            self._upkeep.aim()
        else:
            send(self, rank, generation, version, live)

    patch.setattr(NodeRecovery, "_hand_out", before)


def _a_node_waits_longer_than_the_job(patch: Patch) -> None:
    """Found by the simulation: after ranks were apart the node missed what the job took next, and commits stopped."""
    ledger = commits.CommitLedger
    patch.setattr(commits, "CommitLedger", lambda members, epoch, margin: ledger(members, epoch, margin=2))


def _live_state_takes_the_place_of_what_is_committed(patch: Patch) -> None:
    """Found by the simulation: when it was lost too, no generation was left: 77 after two workers had died."""
    agree = NodeRecovery.agree

    def before(self: NodeRecovery, record: r.Agree) -> None:
        agree(self, msgspec.structs.replace(record, held=True))

    patch.setattr(NodeRecovery, "agree", before)


def _what_is_below_the_floor_is_told_again(patch: Patch) -> None:
    """Found by the simulation: a new coordinator took for committed what the last one had let nodes overwrite."""
    patch.setattr(Commits, "last", property(lambda self: self._last))


def _ranks_are_apart_for_what_is_dead_already(patch: Patch) -> None:
    """Found by the simulation: the job gave up one generation after the other."""
    patch.setattr(CommitLedger, "raised", lambda self, floor: None)


def _a_node_that_has_left_is_counted_until_the_next_epoch(patch: Patch) -> None:
    """Found by the simulation: a spare took itself for cut off when the coordinator was away, and ended."""
    patch.setattr(KnownJob, "departed", lambda self, record: None)


def _what_cannot_be_read_at_once_is_given_up(patch: Patch) -> None:
    """A durable generation counts no more after the first error of the file system."""
    patch.setattr(node_durable, "_PATIENCE_S", -1.0)


def _why_nothing_goes_on_is_forgotten(patch: Patch) -> None:
    """A coordinator that starts again while the last generation is drained does not know why the job ends."""
    dump = Recoveries.dump
    patch.setattr(Recoveries, "dump", lambda self, now: dump(self, now) | {"no_spare": ""})


def _a_failed_read_is_taken_for_nonsense(patch: Patch) -> None:
    """Whoever reads from the durable directory has no source that is a node, and is not heard."""
    misfit = coordinator.misfit

    def before(record: r.AgentRecord, world_size: int, epoch: int) -> str:
        refused = isinstance(record, r.FetchFailed) and record.source < 0
        return "FetchFailed of source -1" if refused else misfit(record, world_size, epoch)

    patch.setattr(coordinator, "misfit", before)


def _what_is_durable_is_looked_up_alone(patch: Patch) -> None:
    """A coordinator that starts again while the directory cannot be read knows of nothing durable."""
    patch.setattr(Durability, "dump", lambda self: [])


def _spares_are_no_help_at_the_end(patch: Patch) -> None:
    """Row 10: what only a spare still has, from when it was none, is gone when the job ends."""
    rescue = Recoveries._rescue
    patch.setattr(Recoveries, "_rescue", lambda self, there: rescue(self, there & set(self._state.members.active())))


def _what_cannot_be_saved_is_saved_again(patch: Patch) -> None:
    """Row 10: Megatron's checkpoint cannot be written, and nothing is made durable instead."""
    patch.setattr(Recoveries, "not_saved", lambda self, why, by_all=False: False)


def _a_node_may_change_what_it_reads_for_ever(patch: Patch) -> None:
    """The start begins anew each time."""
    patch.setattr(WorkerEnds, "changed", lambda self, node, now: False)


def _a_copy_that_cannot_be_drained_is_the_end(patch: Patch) -> None:
    """Row 10, found by the simulation: it had changed in memory, and others were there."""
    patch.setattr(node_durable.NodeDurability, "_give_up_copy", lambda self, take, why: None)


def _nothing_is_drained_at_the_end(patch: Patch) -> None:
    """Row 10: a job without a spare or a checkpoint ends with what is in memory."""
    patch.setattr(Durability, "can_drain", property(lambda self: False))


def _memory_is_all_there_is(patch: Patch) -> None:
    """What the vaults cannot answer ends the job, durable generation or not."""
    patch.setattr(Durability, "fallback", lambda self: None)


def _anybody_writes(patch: Patch) -> None:
    """Row 11: who writes to the durable directory does not look whose it is."""
    patch.setattr(durable, "check_owner", lambda store, job: None)


def _a_full_run_directory_is_an_error(patch: Patch) -> None:
    """Row 9: what only observes ends the coordinator."""
    patch.setattr(RunDirectory, "_trying", lambda self, name: contextlib.nullcontext())


def _a_coordinator_cannot_start_again_on_a_full_disk(patch: Patch) -> None:
    """Found by the simulation: it could not say where it listens, and ended with exit code 2."""
    job = RunDirectory.job
    patch.setattr(RunDirectory, "job", lambda self, content, again=False: job(self, content))


def _nobody_watches_whether_an_owner_lives(patch: Patch) -> None:
    """Row 11: the second job takes the directory when it has looked twice."""
    patch.setattr(lease, "WATCH_S", 0.0)


def _what_a_job_begins_with_must_be_whole(patch: Patch) -> None:
    """A copy that changes after it was read from the durable directory ends the worker that begins with it."""
    before = Core._fetch_failed

    def failed(self: Core, record: r.FetchFailed) -> Effects:
        return iter(()) if self._state.phase is Phase.STARTING else before(self, record)

    patch.setattr(Core, "_fetch_failed", failed)


def _who_was_away_hears_nothing_again(patch: Patch) -> None:
    """Found by the simulation: the coordinator stood still, and nobody ever heard where training begins."""
    patch.setattr(Start, "send_again", lambda self, node=None, roster=True: iter(()))


def _words_of_older_placements_are_forgotten(patch: Patch) -> None:
    """Found by the simulation: a coordinator that started again had nothing rebuilt before the end."""
    dump = Protection.dump
    patch.setattr(Protection, "dump", lambda self: dump(self) | {"words": []})


def _constants_are_asked_for_where_they_should_be(patch: Patch) -> None:
    """Found by the simulation: one of two keepers had changed bytes, and the other one was not asked."""
    patch.setattr(fetching.Search, "widen", lambda self: None)


def _constants_are_asked_for_three_times(patch: Patch) -> None:
    """Found by the simulation: connections broke for longer than that, and a healthy job ended with 73."""
    patch.setattr(fetching.Search, "pause", lambda self, now: self.tries.pop(0) if self.left and self.tries else None)
    init = fetching.Search.__init__

    def before(self: Any, places: Any, now: float, everybody: Any = ()) -> None:
        init(self, places, now, everybody)
        self.tries = [0.0, 0.1, 0.5]

    patch.setattr(fetching.Search, "__init__", before)


def _own_constants_are_taken_for_whole(patch: Patch) -> None:
    """Found by the simulation: changed where a new process took its rank up; keepers had them."""
    patch.setattr(NodeRecovery, "_with_constants", lambda self, rank, generation: None)


def _constants_are_looked_after_until_a_process_registers(patch: Patch) -> None:
    """Found by the simulation: they changed after that, before it had taken them up in the next epoch."""
    before = NodeRecovery._with_constants

    def with_constants(self: NodeRecovery, rank: int, generation: int) -> tuple[int, int] | None:
        worker = self._crew.mine().get(rank)
        return None if worker is None or worker.in_loop else before(self, rank, generation)

    patch.setattr(NodeRecovery, "_with_constants", with_constants)


def _the_last_drain_writes_constants_as_they_are(patch: Patch) -> None:
    """Found by the simulation: own ones had changed in memory, others were there, and nothing was made durable."""
    before = NodeRecovery._with_constants
    patch.setattr(
        NodeRecovery, "_with_constants", lambda self, rank, g: None if self._drains else before(self, rank, g)
    )


def _constants_that_have_changed_stay_so(patch: Patch) -> None:
    """Every drain of the epoch fails because of them; keepers have them whole."""
    patch.setattr(NodeRecovery, "restore_constants", lambda self, rank: None)


def _constants_are_asked_of_vaults_alone(patch: Patch) -> None:
    """Nobody has them whole any more in memory, and the durable directory is not looked into."""
    patch.setattr(node_durable.NodeDurability, "_bring_constants", lambda self, rank, epoch: None)


def _constants_that_were_read_are_not_read_again(patch: Patch) -> None:
    """Found by the simulation: they changed in memory before training began, and the job ended with 73."""

    def before(vault: Vault, rank: int, version: Version) -> Slot | None:
        own = vault.arena(rank, "own")
        return own.find(version) if own is not None else None

    patch.setattr(loading, "own_copy", before)


def _constants_count_as_kept_for_ever(patch: Patch) -> None:
    """They are where they belonged in the epoch before."""
    restart = Commits.restart

    def before(self: Commits) -> None:
        safe = set(self._safe)
        restart(self)
        self._safe |= safe

    patch.setattr(Commits, "restart", before)


def _a_rank_commits_without_its_constants(patch: Patch) -> None:
    """What a spare gets of it is of no use."""
    patch.setattr(Commits, "due", lambda self, event: [] if is_constants(event.rank) else [event])


def _a_share_that_was_refused_is_asked_for_again(patch: Patch) -> None:
    """Parity: a share whose bytes have changed is as good as any other."""
    of = agreement._Shares._of

    def before(self: Any, *args: Any) -> Any:
        refused, self._refused = self._refused, frozenset()
        try:
            return of(self, *args)
        finally:
            self._refused = refused

    patch.setattr(agreement._Shares, "_of", before)


def _an_offer_comes_before_who_is_to_take_it(patch: Patch) -> None:
    """What is agreed then finds no process in a slot whose old one has still to end."""
    patch.setattr(Crew, "renewing", lambda self, slots: False)


def _a_drain_is_forgotten_by_the_next_coordinator(patch: Patch) -> None:
    """Who was told that a node is being drained waited for nothing."""
    patch.setattr(Drains, "load", lambda self, kept: None)


def _a_drain_is_forgotten_in_a_recovery(patch: Patch) -> None:
    """The same, where another node was replaced meanwhile."""
    patch.setattr(Drains, "forget", Drains.ended)


def _a_rank_that_hangs_in_a_recovery_costs_its_node(patch: Patch) -> None:
    """The phase's deadline is the end of it, whatever another process in its slot could do."""
    patch.setattr(Recovery, "remind", lambda self, late, now: None)


def _the_wait_for_a_spare_begins_anew(patch: Patch) -> None:
    """With each coordinator."""
    load = Recoveries.load
    patch.setattr(Recoveries, "load", lambda self, kept, now: load(self, {**kept, "waits_s": None}, now))


def _what_follows_spends_a_spare(patch: Patch) -> None:
    """Every end of a worker is its own node's."""
    patch.setattr(Signs, "judge", lambda self, record, by_peer: Verdict(Blamed.UNKNOWN))


def _a_spare_that_failed_is_as_good_as_any(patch: Patch) -> None:
    patch.setattr(Members, "failures", lambda self, node: 0)


def _one_replica_goes_on(patch: Patch) -> None:
    """Whatever is left, the smallest number of replicas goes on."""
    most = JobState.replicas
    patch.setattr(JobState, "replicas", lambda self: min([*self.layout.widths, most(self)]) if most(self) else 0)


def _what_has_become_narrower_stays_so(patch: Patch) -> None:
    """Whoever comes."""
    patch.setattr(JobState, "can_grow", lambda self: False)


def _what_was_written_by_a_wider_job_counts(patch: Patch) -> None:
    """Offers of older epochs stand, and vaults keep what they have."""
    patch.setattr(recoveries, "_written_since", lambda epoch, held: dict(held))
    patch.setattr(Upkeep, "empty", lambda self: None)


def _a_durable_generation_of_another_width_is_none(patch: Patch) -> None:
    """A loss before the first commit of the new width ends the job."""
    patch.setattr(Durability, "only_recut", property(lambda self: False))


def _the_next_coordinator_forgets_the_width(patch: Patch) -> None:
    """It takes the job for as wide as at first, and looks for such a generation."""
    patch.setattr(headquarters, "read_state", lambda store: None)


def _a_shrink_ends_with_the_last_drain(patch: Patch) -> None:
    """The newest generation is whole in memory, and nobody goes on."""

    def before(self: Recoveries, recovery: object, now: float) -> Effects:
        yield self._unsaved()

    patch.setattr(Recoveries, "_drain_last", before)


def _a_shrink_is_still_under_way_when_it_is_over(patch: Patch) -> None:
    """What came of the last epochs of the wider job is not forgotten: the next loss only drains."""

    def before(self: Recoveries) -> Effects:
        self.current = None
        self._none_vacant()
        self._refused.clear()
        yield from self.let_helpers_go()

    patch.setattr(Recoveries, "start_over", before)


def _a_spare_is_spent_although_another_process_stands_by(patch: Patch) -> None:
    def taken_by(self: Recoveries, out_of_use: set[int]) -> dict[int, int] | None:
        return self._state.spares.for_lost(out_of_use, {node for node, _ in self.vacant})

    patch.setattr(Recoveries, "_taken_by", taken_by)


def _who_stands_by_waits_for_an_epoch_that_does_not_come(patch: Patch) -> None:
    """A worker that ends before its node has offered is replaced in the next epoch, which the core does not declare."""
    patch.setattr(NodeRecovery, "ended", lambda self, worker: None)


def _a_spare_that_fails_its_check_is_as_good_as_any(patch: Patch) -> None:
    patch.setattr(Members, "unfit", lambda self, node: False)


def _a_recovery_may_end_before_who_ended_in_it_is_replaced(patch: Patch) -> None:
    """Whoever ends is gathered with others, in a recovery too."""
    soon = Core._declare_soon

    def before(self: Core, reason: str) -> Effects:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Core, "phase", property(lambda core: Phase.RUNNING))
            effects = list(soon(self, reason))
        yield from effects

    patch.setattr(Core, "_declare_soon", before)


def _the_end_does_not_wait_for_who_has_just_ended(patch: Patch) -> None:
    look = Core._look_for_end

    def before(self: Core) -> Effects:
        soon, self._soon = self._soon, None
        yield from look(self)
        self._soon = self._soon or soon

    patch.setattr(Core, "_look_for_end", before)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "together": _a_recovery_may_end_before_who_ended_in_it_is_replaced,
    "together end": _the_end_does_not_wait_for_who_has_just_ended,
    "narrowest": _one_replica_goes_on,
    "stays narrow": _what_has_become_narrower_stays_so,
    "wider copies": _what_was_written_by_a_wider_job_counts,
    "only recut": _a_durable_generation_of_another_width_is_none,
    "width kept": _the_next_coordinator_forgets_the_width,
    "goes on": _a_shrink_ends_with_the_last_drain,
    "shrink over": _a_shrink_is_still_under_way_when_it_is_over,
    "renewing": _an_offer_comes_before_who_is_to_take_it,
    "1 ranks": _ranks_apart_are_told_of_by_nobody,
    "1 nodes": _who_comes_back_does_not_hear_the_floor,
    "2 tries": _one_failed_fetch_condemns_the_copy,
    "2 own": _no_memory_is_the_sources_fault,
    "3": _a_refusal_outlives_what_it_condemns,
    "4": _a_drain_goes_on_without_a_spare,
    "5": _a_gap_in_its_own_time_is_everybody_elses_silence,
    "7": _training_alone_is_done_again,
    "8": _a_loss_at_the_start_ends_the_job,
    "10": _nobody_waits_for_a_spare,
    "6": _who_finishes_early_is_forgotten,
    "12": _a_drain_does_not_wait_for_a_spare_that_starts,
    "refused twice": _a_refusal_outlives_the_damaged_copy,
    "given up": _a_copy_given_up_is_handed_out,
    "margin": _a_node_waits_longer_than_the_job,
    "live alone": _live_state_takes_the_place_of_what_is_committed,
    "false alarm": _ranks_are_apart_for_what_is_dead_already,
    "below floor": _what_is_below_the_floor_is_told_again,
    "stale fetch": _an_older_epochs_fetch_still_lands,
    "broken own": _a_broken_own_copy_blames_the_source,
    "kept late": _a_wish_is_answered_before_it_is_kept,
    "comes back": _a_drained_node_does_not_come_back,
    "one end": _an_end_is_decided_again,
    "ends once": _a_process_ends_once_for_each_coordinator,
    "has left": _who_has_left_is_forgotten,
    "joins late": _who_is_about_to_join_is_too_late,
    "broken new": _a_broken_copy_keeps_its_slot,
    "all back": _the_end_is_looked_for_while_agents_come_back,
    "reset": _the_end_of_a_connection_is_that_of_its_node,
    "dropped": _who_lives_has_one_lease,
    "one complaint": _one_complaint_condemns_a_copy,
    "one moment": _one_moment_without_a_majority_is_enough,
    "told before": _what_was_told_as_committed_is_forgotten,
    "departed": _a_node_that_has_left_is_counted_until_the_next_epoch,
    "early end": _a_process_that_ends_before_it_takes_over_is_not_missed,
    "read again": _what_cannot_be_read_at_once_is_given_up,
    "no spare": _why_nothing_goes_on_is_forgotten,
    "no source": _a_failed_read_is_taken_for_nonsense,
    "looks again": _what_is_durable_is_looked_up_alone,
    "10 spares": _spares_are_no_help_at_the_end,
    "10 copy": _a_copy_that_cannot_be_drained_is_the_end,
    "10 save": _what_cannot_be_saved_is_saved_again,
    "reads for ever": _a_node_may_change_what_it_reads_for_ever,
    "10 drain": _nothing_is_drained_at_the_end,
    "goes back": _memory_is_all_there_is,
    "9": _a_full_run_directory_is_an_error,
    "9 again": _a_coordinator_cannot_start_again_on_a_full_disk,
    "11": _anybody_writes,
    "11 watch": _nobody_watches_whether_an_owner_lives,
    "heard again": _who_was_away_hears_nothing_again,
    "old words": _words_of_older_placements_are_forgotten,
    "own constants": _own_constants_are_taken_for_whole,
    "constants everywhere": _constants_are_asked_for_where_they_should_be,
    "constants tries": _constants_are_asked_for_three_times,
    "constants registered": _constants_are_looked_after_until_a_process_registers,
    "constants read": _constants_that_were_read_are_not_read_again,
    "constants drained": _the_last_drain_writes_constants_as_they_are,
    "constants restored": _constants_that_have_changed_stay_so,
    "constants durable": _constants_are_asked_of_vaults_alone,
    "constants anew": _constants_count_as_kept_for_ever,
    "constants first": _a_rank_commits_without_its_constants,
    "share refused": _a_share_that_was_refused_is_asked_for_again,
    "drain kept": _a_drain_is_forgotten_by_the_next_coordinator,
    "drain goes on": _a_drain_is_forgotten_in_a_recovery,
    "hangs": _a_rank_that_hangs_in_a_recovery_costs_its_node,
    "wait kept": _the_wait_for_a_spare_begins_anew,
    "follows": _what_follows_spends_a_spare,
    "stands by": _a_spare_is_spent_although_another_process_stands_by,
    "takes in": _who_stands_by_waits_for_an_epoch_that_does_not_come,
    "lemon": _a_spare_that_failed_is_as_good_as_any,
    "unfit": _a_spare_that_fails_its_check_is_as_good_as_any,
    "begins again": _what_a_job_begins_with_must_be_whole,
}
