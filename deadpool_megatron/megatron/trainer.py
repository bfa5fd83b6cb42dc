"""One coordinate of a Megatron run as DeadPool sees it: its generations, its snapshots, its way back."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, ClassVar

import msgspec
import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.utils import get_model_config

from deadpool_megatron import emulation, points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.pulse import PulsePage
from deadpool_megatron.cluster.agent.workers import MUSTER_FD
from deadpool_megatron.comm import Communicators
from deadpool_megatron.compat import UserError
from deadpool_megatron.config import DeadpoolConfig
from deadpool_megatron.durable import Layout, split_small, trailer_of
from deadpool_megatron.megatron.at_rest import AtRest
from deadpool_megatron.megatron.comparison import Comparison, Difference, Unequal
from deadpool_megatron.megatron.description import layout_of
from deadpool_megatron.megatron.faults import strike
from deadpool_megatron.megatron.frozen import Frozen
from deadpool_megatron.megatron.graphs import Graphs
from deadpool_megatron.megatron.host import Host
from deadpool_megatron.megatron.links import Links
from deadpool_megatron.megatron.loss_report import LossReport
from deadpool_megatron.megatron.low_precision import prepare_scaling
from deadpool_megatron.megatron.muster import Muster
from deadpool_megatron.megatron.once import Once
from deadpool_megatron.megatron.pieces import pieces_of
from deadpool_megatron.megatron.replay import ReplayIterator
from deadpool_megatron.megatron.reset import end_unfinished_saves, reset_after_abort, synchronize_parameters
from deadpool_megatron.megatron.small_state import SmallState, positions, unlike
from deadpool_megatron.megatron.standby import numa_node
from deadpool_megatron.megatron.state_hash import digests
from deadpool_megatron.megatron.unique_state import UniqueState, expected_bytes
from deadpool_megatron.megatron.width import OtherWidth, widths_below
from deadpool_megatron.recovery import EpochClosed, Refused, Session, Superseded
from deadpool_megatron.snapshot import CopyEngine, CudaCopyEngine, HostCopyEngine, Pacing, ShardPlan, Snapshotter
from deadpool_megatron.vault import ConstantsWriter, SlotWriter, Version, constants_of

_FOR_EVER_S = 365 * 86400.0  # the coordinator declares the next epoch, or the job ends


class MegatronTrainer:
    """Implements `recovery.Trainer` on Megatron's objects. Used by the training thread only.

    Args:
        host: the loop that trains.
        model: list of model chunks (DDP), as `train` gets it.
        iterators: the data iterators `train` gets, nested as they are.
        rebuild: makes those iterators anew at a generation in the own vault, nested the same, without communication.
        page: where the agent sees the progress.
    """

    latest: ClassVar[MegatronTrainer | None] = None  # for measurements

    def __init__(
        self,
        host: Host,
        session: Session,
        communicators: Communicators,
        config: DeadpoolConfig,
        doorbell: int,
        model: list[Any],
        optimizer: Any,
        scheduler: Any,
        iterators: Iterable[Any],
        rebuild: Callable[[r.Generation], Iterable[Any]],
        page: PulsePage,
    ) -> None:
        self._rebuild = rebuild
        self._host = host
        self._session = session
        self._communicators = communicators
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._page = page
        if "deadpool_first_iteration" not in host.args:  # a spare has it from the small state
            host.fields.put({"deadpool_first_iteration": host.args["iteration"]})
        self._began: int = host.args["deadpool_first_iteration"]
        self.rank = torch.distributed.get_rank()
        self.once = Once(host, session, self.check, self.rank, torch.distributed.get_world_size(), self._began)
        self.at_rest = AtRest(model)
        self.muster = Muster(
            int(os.environ[MUSTER_FD]),
            self.rank,
            int(os.environ["LOCAL_WORLD_SIZE"]),
            lambda: session.joined_epoch,
            self.check,
        )
        self._unique = UniqueState(optimizer)
        self._frozen = Frozen(model, config.slice_bytes)
        self._comparison = Comparison(host, model, optimizer, scheduler)
        host.fields.training_begins()
        scaled = prepare_scaling(model, get_model_config(model[0]))
        self.small_state = SmallState(host, model, optimizer, scheduler, self._frozen, scaled)
        self._plan = ShardPlan([*self._unique.items(), *self.small_state.items()], config.slice_bytes)
        self._replays = [_under_rerun(each) for each in _flatten(iterators)]
        self.small_state.positions = [replay.position for replay in self._replays]
        self._small = self.small_state.capture(host.args["iteration"])
        self._small_generation = -1
        self._expected = expected_bytes(model, optimizer)
        print(
            f"deadpool: rank {self.rank} copies {self._plan.nbytes:,} bytes of unique state a generation, in "
            f"{len(self._plan.segments)} pieces; {self._expected:,} by the arithmetic",
            flush=True,
        )
        described = bool(config.durable_dir) or config.when_out_of_spares == "shrink"
        self._layout = layout_of(self._plan, pieces_of(model, optimizer) if described else {})
        self._trailer = trailer_of(self._layout) if described else b""
        self._writer = SlotWriter(self._memory(self.rank, self._layout, len(self._stored)), doorbell)
        if self._frozen:
            constants = layout_of(self._frozen.plan)
            trailer = trailer_of(constants) if described else b""
            path = self._memory(constants_of(self.rank), constants, len(trailer))
            self._frozen.use(ConstantsWriter(path, doorbell), trailer)
        self._engine: CopyEngine = CudaCopyEngine() if _on_device() else HostCopyEngine()
        self._snapshotter = Snapshotter(self._plan, self._writer, self._engine, Pacing(config.copy_bandwidth))
        self._links = Links(model)
        # No Python runs inside of a replayed iteration: slices are asked for before it, and the gate comes after it.
        self._graphs = Graphs(host.args.get("cuda_graph_impl"), model)
        self._graphed = self._graphs.whole_iterations
        self.live_generation: int | None = None
        self.live_epoch = session.joined_epoch
        self._restored = -1  # the generation that training goes on from, until it has been trained
        self._ticks = 0
        self._blocked = 0.0
        self._fault: r.Fault | None = None
        self._local = int(os.environ["LOCAL_RANK"])
        self._slow_s = 0.0
        self._resumed_epoch = session.joined_epoch
        self._first = (-1, -1)
        self._on_device = _on_device()
        self._losses = LossReport()
        self._tells_losses = (
            parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        self.paused = False
        MegatronTrainer.latest = self
        optimizer.step_with_ready_grads = self._gated(optimizer.step_with_ready_grads)

    @property
    def _stored(self) -> bytes:
        """The small state as copies have it: behind it is what they consist of."""
        return self._small + self._trailer

    def _memory(self, holder: int, layout: Layout, small_bytes: int) -> str:
        try:
            return self._session.request_arena(holder, layout.unique_bytes, small_bytes, numa_node(), layout.digest)
        except Refused as err:
            raise UserError(str(err)) from None

    def register(self, can_rescue: bool, restarts: bool) -> None:
        """Tell who this is, once, before training. See `Registered`, and `widths_below`. Raises UserError for what the
        job is to do, and cannot."""
        widths: list[int] = []
        if self._config.when_out_of_spares == "shrink":
            widths = widths_below(self._host, self._layout, self._small, first=self._session.joined_epoch == 0)
        self._session.tell(
            r.Registered(
                0,
                0,
                r.CoordinateInfo(
                    self.rank,
                    parallel_state.get_tensor_model_parallel_rank(),
                    parallel_state.get_pipeline_model_parallel_rank(),
                    parallel_state.get_data_parallel_rank(),
                    parallel_state.get_context_parallel_rank(),
                    parallel_state.get_expert_model_parallel_rank(),
                ),
                self._plan.nbytes,
                len(self._stored),
                self._communicators.table_digest(),
                can_rescue,
                self._expected,
                repeatable=self._repeatable(),
                restarts=restarts,
                widths=widths if self.rank == 0 else [],
                iterations=(self._host.args.get("train_iters") or 0) if self.rank == 0 else 0,
            )
        )

    def _repeatable(self) -> bool:
        """Whether training a generation once more gives the same bits: states of different epochs may be mixed then.

        On a device Megatron's ``--deterministic-mode`` has it so (it wants NCCL_ALGO set), and groups that were formed
        anew reduce in the same order only without NVLS, which adds up in the switch.
        """
        if not self._on_device:
            return True
        algorithms = os.environ.get("NCCL_ALGO", "")
        return bool(self._host.args["deterministic_mode"]) and algorithms in ("Ring", "Tree", "^NVLS")

    def resume(self, at: r.Generation, other: OtherWidth | None = None) -> None:
        """Begin with a durable generation that is in the own vault, or one of another width. Collective; raises what a
        broken one raises."""
        self.adopt_iterators(at.generation)
        if other is None:
            self.restore(at)
        else:
            other.fill(self._plan, self._model, self._optimizer)
            self._take_up(at, other.small)
        if other is not None and at.constants:
            other.fill_constants(self._frozen.plan)
            self._frozen.look()
        elif at.constants:
            self._frozen.take()
        self.synchronize()
        if not self._config.export:  # which has no data iterators
            self.prove()

    def take_first_generation(self, deadline_s: float) -> None:
        """Commit the state training begins with, so that there is a generation to go back to from the first step on.

        What never changes goes to the vaults with it.
        Blocks, once, until every coordinate has committed it or the deadline passes (then a loss before the first
        commit ends the job). Raises EpochClosed.
        """
        iteration = self._host.args["iteration"]
        self._first = (self._session.joined_epoch, iteration)
        if self._writer.arena.find(Version(*self._first)) is None:  # a durable one is there already
            self._snapshotter.open(*self._first, self._stored)
            self._snapshotter.gate()
        self._frozen.keep()
        end = time.monotonic() + deadline_s
        # A word in shared memory that the agent writes; this is start-up, so looking at it now and then will do.
        while self._writer.kept is None and time.monotonic() < end:
            self.check()
            time.sleep(0.005)
        if self._writer.kept is None:
            print(
                f"deadpool: rank {self.rank} begins unprotected: generation {iteration} is not committed after "
                f"{deadline_s:g} s, and a node lost before that ends the job (`deadpool status` has the reason)",
                flush=True,
            )

    # ---- the training step

    def begin(self, iteration: int) -> None:
        """Generation ``iteration`` opens: nothing of it has changed yet."""
        start = time.perf_counter()
        points.iteration_is(iteration)
        points.reach("small-state.before")
        self.check()
        self._page.enter(iteration)
        if self.paused:
            self._blocked = 0.0
            return
        session = self._session
        every = self._config.check_replicas
        if every and iteration % every == 0 and iteration > self._began:
            self._look_at_replicas(iteration)
        self.at_rest.begin()
        self.small_state.positions = [replay.position for replay in self._replays]
        self._small = self.small_state.capture(iteration)
        self._small_generation = iteration
        # As far back as a recovery may go: to the committed generation, which grows old while the coordinator is away.
        keep_from = iteration - 2 * self._config.snapshot_interval
        kept = self._writer.kept
        if kept is not None:
            keep_from = min(keep_from, kept.generation)
        for replay in self._replays:
            replay.mark(iteration, keep_from)
        if iteration != self._restored:  # that one is still what it was restored from
            self.live_epoch, self._restored = session.joined_epoch, -1
        self.live_generation = iteration
        self._ticks = 0
        points.reach("small-state.after")
        self._fault = next(
            (f for f in session.armed if f.iteration == iteration and not f.point and f.local == self._local), None
        )
        hold = session.hold
        if hold is not None and hold.epoch == session.joined_epoch and iteration >= hold.iteration:
            self._hold_still(hold, iteration)
        if iteration % self._config.snapshot_interval == 0 and self._first != (session.joined_epoch, iteration):
            self._snapshotter.open(session.joined_epoch, iteration, self._stored, self._links.opened())
        if self._resumed_epoch != session.joined_epoch:
            self._resumed_epoch = session.joined_epoch
            session.step("resumed", session.joined_epoch, iteration)
        if self._graphed and self._fault is not None:
            self._suffer(self._fault)
        self._blocked = time.perf_counter() - start

    def _hold_still(self, hold: r.Hold, iteration: int) -> None:
        """A planned move: the generation goes to the vault at once; then wait. Raises EpochClosed."""
        session = self._session
        missed = iteration != hold.iteration
        if not missed:
            if self._first != (session.joined_epoch, iteration):
                self._snapshotter.open(session.joined_epoch, iteration, self._stored)
                self._first = (session.joined_epoch, iteration)
            self._snapshotter.gate()
        session.tell(r.Held(session.joined_epoch, iteration, missed))
        session.wait_newer(session.joined_epoch, _FOR_EVER_S)
        raise EpochClosed

    def tick(self, backward: bool = False) -> None:
        """A forward or backward pass begins: copy the next slices, leave if the epoch is over.

        Without effect where the whole iteration is a graph: these passes are its warm-up or its capture.
        """
        if self.paused or self._graphed:
            return
        start = time.perf_counter()
        self._ticks += 1
        self._page.beat()
        if self._fault is not None and self._ticks >= self._fault.tick:
            self._suffer(self._fault)
        self.check()
        self._losses.poll()
        self._snapshotter.tick(self._links.busy(backward))
        self._blocked += time.perf_counter() - start

    def forward_took(self, nanoseconds: int) -> None:
        """A forward pass of training is over."""
        if self._slow_s:
            time.sleep(self._slow_s)
            nanoseconds += int(self._slow_s * 1e9)
        self._page.forward(nanoseconds)

    def evaluate(self) -> None:
        """A forward pass of an evaluation begins."""
        self._page.beat()
        if self._graphed:  # a capture is not to be left
            return
        points.reach("evaluation.during")
        self.check()

    def check(self) -> None:
        """Raises EpochClosed when a newer epoch has been declared."""
        if self._session.closed or self._communicators.poisoned:
            raise EpochClosed

    def look(self) -> None:
        """Before anything that lasts is made of numbers of this iteration, the optimizer's step first of all: the host
        waits for the collectives that they come from, since an aborted one returns garbage and no error. Raises
        EpochClosed."""
        if self._on_device:
            torch.cuda.current_stream().synchronize()
        self.check()

    def _gated(self, step: Any) -> Any:
        """The commit gate around ``optimizer.step_with_ready_grads``, the first mutation of unique state."""

        def step_with_ready_grads(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            if self._graphed:
                self._page.beat()
            self._snapshotter.gate()
            self._blocked += time.perf_counter() - start
            self.look()  # also with Transformer Engine, where the gradients' norm stays on the device
            self.live_generation = None
            points.reach("optimizer-step.before")
            result = step(*args, **kwargs)
            points.reach("optimizer-step.after")
            return result

        return step_with_ready_grads

    def end(self, iteration: int, loss: dict[str, Any], grad_norm: float | None, seconds: float) -> None:
        """Iteration ``iteration`` is over on this rank; tell about it if this rank knows the loss."""
        points.reach("iteration.after")
        self.at_rest.end()
        self._page.leave()
        self.check()
        if self.paused:
            return
        start = time.perf_counter()
        self._snapshotter.gate()  # a skipped step (inf gradients) has not passed the gate
        if loss and self._tells_losses:
            stats = self._snapshotter.account()
            record = r.Iteration(
                0,
                self.rank,
                self._session.joined_epoch,
                iteration,
                {},
                float(grad_norm).hex() if grad_norm is not None else None,
                seconds,
                self._blocked,
                stats.copied_bytes,
                stats.skipped,
                stats.gate_s,
                stats.device_stall_s,
                stats.copied_s,
                stats.bandwidth,
            )

            def tell(losses: dict[str, float]) -> None:
                self.check()
                exact = {name: value.hex() for name, value in losses.items()}
                self._session.tell(msgspec.structs.replace(record, losses=exact))

            self._losses.add(loss, tell)
        self._blocked += time.perf_counter() - start

    def report_all(self) -> None:
        """Training is over: tell what is still on its way."""
        self._losses.flush()

    def digests(self) -> dict[str, str]:
        """Of the state that training has ended with, as `state_hash.digests`."""
        return digests(self._host.args, self._model, self._optimizer, self._scheduler)

    def figures(self) -> dict[str, float]:
        """Of the last iteration on this rank, for the run's writers; seconds, bytes, bytes a second.

        Skipped generations are counted from the start, ``copied-seconds`` from the opening of the generation.
        """
        stats = self._snapshotter.account()
        return {
            "epoch": self._session.joined_epoch,
            "replicas": parallel_state.get_data_parallel_world_size(),
            "blocked-seconds": self._blocked,
            "stall-seconds": stats.gate_s,
            "device-stall-seconds": stats.device_stall_s,
            "snapshot-bytes": stats.copied_bytes,
            "copied-seconds": stats.copied_s,
            "copy-bandwidth": stats.bandwidth,
            "skipped-generations": stats.skipped,
        }

    def account(self) -> dict[str, Any]:
        """What this rank's last iteration has cost and copied so far, `SnapshotStats` and ``blocked_s``."""
        return {**asdict(self._snapshotter.account()), "blocked_s": self._blocked}

    def look_at_device(self) -> None:
        """Raises torch.AcceleratorError when a kernel has failed, whoever has met that first: NCCL says it in words of
        its own. Waits for nothing."""
        if self._on_device:
            torch.cuda.current_stream().query()

    # ---- recovery.Trainer

    def let_go(self) -> None:
        """Launch no kernel any more that neighbours would have to launch too; drop what modules have half-done and all
        captured graphs. In this order: attributes may be graphs."""
        self.muster.leave()
        self.at_rest.restore()
        if self._graphs.drop():
            self.live_generation = None

    def unwind(self) -> None:
        """Drop what the broken step left behind; what it has queued on the device comes to its end first."""
        if self._on_device:
            # As long as that takes: an abort ends NCCL's kernels, but not what was queued behind them, and that must
            # not write into what is restored. A survivor that is too late at it counts as lost (abort_deadline).
            torch.cuda.synchronize()
        self._losses.drop()
        self._snapshotter.give_up()
        self._page.leave()
        end_unfinished_saves(self._host.async_saves, self.rank)
        reset_after_abort(self._host, self._model, self._optimizer)

    def restore(self, agreed: r.Generation) -> None:
        """Make the live state that of the agreed generation. Raises VaultError, and has changed nothing then."""
        generation = agreed.generation
        if agreed.live and self.live_generation == generation and self._small_generation == generation:
            small = self._small
        else:
            small, _ = split_small(self._snapshotter.restore(Version(agreed.version_epoch, generation)))
            self.live_epoch = agreed.version_epoch
        self._take_up(agreed, small)

    def _take_up(self, agreed: r.Generation, small: bytes) -> None:
        """The tensors are those of the agreed generation: so is all else."""
        generation, self.live_generation = agreed.generation, None
        # Data first: building iterators and drawing from them moves random numbers, which the small state puts back.
        if not all(replay.remembers(generation) for replay in self._replays):
            fresh = list(_flatten(self._rebuild(agreed)))
            for replay, each in zip(self._replays, fresh, strict=True):
                replay.renew(each.iterable, generation)
        # An export draws no data, and has no iterators.
        stood = positions(small) if self._replays else []
        for replay, position in zip(self._replays, stood, strict=True):
            replay.rewind(generation)
            if replay.position != position:
                replay.seek(position)
        self.small_state.restore(small)
        self._small, self._small_generation = small, generation
        for owner in (replay.owner for replay in self._replays):
            if isinstance(owner, RerunDataIterator):
                owner.replaying, owner.saved_microbatches, owner.replay_pos = False, [], 0
        self.once.agreed(agreed.done)
        self.live_generation = self._restored = generation

    def synchronize(self) -> None:
        """Bring back what other ranks hold: replicated state, 16-bit parameters. Collective."""
        synchronize_parameters(self._model, self._optimizer, self._unique, self._frozen)
        self._frozen.keep()

    def prove(self) -> None:
        """Compare all ranks; restore what differs once more. Collective.

        Raises Unequal if it differs still, Superseded when the epoch has ended: then all differ from garbage.
        """
        begun = time.perf_counter()
        found = self._compare()
        if found:
            self.small_state.restore(self._small)
            self._frozen.look()
            self.synchronize()
        left = self._compare() if found else []
        if self._session.closed:
            raise Superseded(self._session.declared_epoch)
        if self.rank == 0 or any(self.rank in each.ranks for each in found):
            self._told(self._small_generation, found, not left, time.perf_counter() - begun)
        if left:
            raise Unequal(f"after the recovery {'; '.join(map(str, left))} differ from those of the others")

    def _compare(self) -> list[Difference]:
        self.small_state.positions = [replay.position for replay in self._replays]
        wrong = unlike(self._small, self.small_state.capture(self._small_generation))
        if wrong:
            print(
                f"deadpool: rank {self.rank} has not come back right: {', '.join(wrong)}", file=sys.stderr, flush=True
            )
        return self._comparison.run(not wrong)

    def _told(self, iteration: int, found: list[Difference], equal: bool, seconds: float) -> None:
        told = [r.Unlike(each.part, list(each.ranks)) for each in found]
        self._session.tell(r.Compared(0, self.rank, self._session.declared_epoch, iteration, seconds, told, equal))

    def _look_at_replicas(self, iteration: int) -> None:
        """``--deadpool-check-replicas``: what differs is told, and training goes on. Collective."""
        begun = time.perf_counter()
        # Parameters may still be gathered lazily: upstream's way to have them all, as before a checkpoint.
        lazy = [chunk for chunk in self._model if chunk.use_forward_hook]
        for chunk in lazy:
            chunk.disable_forward_pre_hook()
        found = self._comparison.run(True)
        for chunk in lazy:
            chunk.enable_forward_pre_hook()
        self.check()
        if self.rank == 0:
            self._told(iteration, found, not found, time.perf_counter() - begun)

    def adopt_iterators(self, generation: int) -> None:
        """A spare's iterators begin at ``generation``: mark it, so that `restore` finds it."""
        for replay in self._replays:
            replay.mark(generation, generation)

    def replays_of(self, iterators: Any, iteration: int) -> list[ReplayIterator]:
        """Of iterators that ``train`` does not get (test data), those that have one here, marked as ``iteration``."""
        replays = [each for each in map(_under_rerun, _flatten([iterators])) if each not in self._replays]
        for replay in replays:
            if not replay.remembers(iteration):
                replay.mark(iteration, iteration)
        return replays

    # ---- faults

    def _suffer(self, fault: r.Fault) -> None:
        self._fault = None
        if fault.kind == "slow":
            self._slow_s = fault.seconds
        else:
            strike(fault)


def _on_device() -> bool:
    return torch.cuda.is_available() and not emulation.is_installed()


def _flatten(iterators: Iterable[Any]) -> Iterator[Any]:
    for each in iterators:
        if isinstance(each, (list, tuple)):
            yield from _flatten(each)
        elif each is not None:
            yield each


def _under_rerun(iterator: Any) -> ReplayIterator:
    """Put a ReplayIterator between Megatron's RerunDataIterator and what it draws from."""
    if not hasattr(iterator, "iterable"):
        raise UserError(
            f"data iterator {type(iterator).__name__} is not supported with --deadpool: it must come from Megatron's "
            "--dataloader-type single, cyclic or external"
        )
    if hasattr(iterator.iterable, "save_state"):
        raise UserError(
            f"data loader {type(iterator.iterable).__name__} is not supported with --deadpool: it keeps a position of "
            "its own (as Energon's do), which a spare could not take up; use one that begins at "
            "args.consumed_train_samples"
        )
    if not isinstance(iterator.iterable, ReplayIterator):
        iterator.iterable = ReplayIterator(iterator.iterable)
        iterator.iterable.owner = iterator
    replay: ReplayIterator = iterator.iterable
    return replay
