"""What DeadPool does at the points of a training loop, whichever it is: the host (`host.Host`) says where they are.

Every method here that gets a `Call` stands in the place of a function of the loop, and makes the call itself. Besides,
in megatron.core: ``schedules.backward_step`` ticks, as forward passes do by ``forward_step_func``; the ranks of a node
meet before the kernels of ``moe.fused_a2a`` are launched; buffers of ``param_and_grad_buffer`` are not registered.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from deadpool_megatron import config as settings
from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.pulse import PulsePage
from deadpool_megatron.cluster.agent.workers import ADOPTED, BEGAN
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.comm import Communicators, StoreClients, is_communication_error
from deadpool_megatron.compat import UserError
from deadpool_megatron.durable import Source
from deadpool_megatron.megatron.adapters import current
from deadpool_megatron.megatron.data_position import DataPosition
from deadpool_megatron.megatron.description import describe_job
from deadpool_megatron.megatron.frozen import frozen_parameters
from deadpool_megatron.megatron.host import Call, Host
from deadpool_megatron.megatron.in_memory import in_memory
from deadpool_megatron.megatron.muster import Muster, meet_before_launches, meet_before_replays
from deadpool_megatron.megatron.registration import register_nothing
from deadpool_megatron.megatron.reset import forget_strategies
from deadpool_megatron.megatron.standby import RunningJob, numa_node, publish_job
from deadpool_megatron.megatron.trainer import MegatronTrainer
from deadpool_megatron.megatron.userbuffers import Userbuffers
from deadpool_megatron.megatron.width import CannotRead, OtherWidth, in_directory
from deadpool_megatron.megatron.writers import Series
from deadpool_megatron.recovery import EpochClosed, Patience, Redo, Session, Superseded, UnexplainedError, rejoin
from deadpool_megatron.support import (
    check_arguments,
    check_environment,
    flex_in_graphs,
    not_looked_at,
    not_on_a_gpu,
    waits_for_nodes,
)
from deadpool_megatron.vault import VaultError

_OWN_ERROR_S = 0.5  # from an error of this rank's own until it is told, in case the epoch's end comes with it


@dataclass(slots=True)
class Hooks:
    """All hooks of one worker process.

    Args:
        host: the loop that they are in.
        session: the line to the agent.
        communicators: this process's groups.
        config: the job's settings.
        doorbell: the eventfd the agent listens to.
        store: clients of the rendezvous store.
        standby: this process is a spare taking over a coordinate.
        page: where the agent sees the progress.
        rehearses: this spare sets up a coordinate that it may be given later: `build_iterators` waits for that.
    """

    host: Host
    session: Session
    communicators: Communicators
    config: settings.DeadpoolConfig
    doorbell: int
    store: StoreClients
    standby: bool
    page: PulsePage
    rehearses: bool = False
    trainer: MegatronTrainer | None = None
    phase: str = "setup"
    iteration: int = -1
    durable: r.Generation | None = None
    other_width: OtherWidth | None = None
    _data: DataPosition = field(default_factory=DataPosition)
    _redo: Redo | None = None
    _userbuffers: Userbuffers | None = None
    _in_pretrain: bool = False
    _rejoined: bool = False
    _groups: str = ""
    _begun: float | None = None
    _series: Series = field(default_factory=Series)
    _postponed: list[Callable[[], Any]] = field(default_factory=list)

    def install(self) -> None:
        """Put the hooks in place. Raises UserError for a version that is not supported."""
        import megatron.core
        from megatron.core.distributed import param_and_grad_buffer
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.transformer.moe import fused_a2a

        current().check_seams(str(megatron.core.__version__))
        self.host.install(self)
        self.host.replace(schedules, "backward_step", self.backward_step)
        meet_before_launches(fused_a2a, self._muster)
        register_nothing(param_and_grad_buffer)

    def _muster(self) -> Muster | None:
        return self.trainer.muster if self.trainer is not None else None

    def learn_job(self, job: RunningJob) -> None:
        """For a spare: of those that train."""
        self._groups, self._begun = job.groups, job.begun

    def look_for_neighbours(self, replaced: list[int]) -> None:
        """These ranks get new workers: this one ends where its kernels wait for one of them (`megatron.muster`). From
        the watcher thread."""
        if self.trainer is None or not self.trainer.muster.bereft(replaced):
            return
        print(
            f"deadpool: rank {self.trainer.rank} ends, exit code {Exit.NEIGHBOUR_LOST:d}: a worker of its node is gone "
            "and kernels that they launch together wait for it; another process takes its place",
            file=sys.stderr,
            flush=True,
        )
        if ADOPTED in os.environ:
            self.session.tell(r.Leaving(Exit.NEIGHBOUR_LOST))
        os._exit(Exit.NEIGHBOUR_LOST)

    def is_waiting(self) -> bool:
        """A thread waits for other ranks, in a communication or before a launch: it is not the one that is stuck."""
        return self.communicators.is_waiting() or (self.trainer is not None and self.trainer.muster.waiting)

    def take_exit_notice(self) -> None:
        """The machines are wanted soon: what ``--exit-signal-handler`` does, if it is on. From the watcher thread."""
        if self.host.args.get("exit_signal_handler"):
            os.kill(os.getpid(), self.host.args["exit_signal"])

    # ---- set-up

    def initialize(self, call: Callable[[], Any]) -> Any:
        """Process groups are made, settings are final before it."""
        host = self.host
        if self.standby and not self.rehearses:
            points.reach("take-over.building")
        check_environment(os.environ)
        processes = int(os.environ["LOCAL_WORLD_SIZE"])
        check_arguments(host.args, processes, ADOPTED in os.environ)
        if self.config.rehearsals and not host.can_rehearse:
            raise UserError(
                "--deadpool-rehearsals: only Megatron-LM's own training loop can be rehearsed; leave it out"
            )
        if self.config.standby_workers == "coordinate" and not host.can_rehearse:
            raise UserError(
                "--deadpool-standby-workers coordinate: only with Megatron-LM's own training loop; take device instead"
            )
        if self.rehearses and (why := host.not_rehearsed()):
            raise UserError(f"not rehearsed with {why}")
        if self.standby:
            host.load_nothing()  # it would be read by collectives
        self._goes_on()
        if flex_in_graphs(host.args):
            from megatron.core.transformer.moe import fused_a2a

            meet_before_replays(fused_a2a, self._muster)
        result = call()
        unproven = not_on_a_gpu(host.args, processes)
        if not self.standby and torch.distributed.get_rank() == 0:
            if unproven:
                print(f"deadpool: not run on a GPU yet: {', '.join(unproven)}; see deadpool check", flush=True)
            if host.args.get("nccl_ub"):
                print("deadpool: --use-nccl-ub is left out: no buffer is registered with a communicator", flush=True)
            if flags := not_looked_at(host.flags):
                print(f"deadpool: nobody has looked at what a lost node does to {', '.join(flags)}", flush=True)
        self._unless_rehearsed(self._introduce)
        if (self.config.resume != "none" or self.config.when_out_of_spares == "shrink") and not self.standby:
            self._resumes()
        return result

    def _goes_on(self) -> None:
        """A job that begins anew has what is left of its allotted time (``--exit-duration-in-mins``)."""
        if began := float(os.environ.get(BEGAN, "0")):
            self.host.begun = began

    def _introduce(self) -> None:
        """Tell the agent what it has to know of this coordinate by the time that the model is built."""
        if self.standby and self.communicators.table_digest() == self._groups:
            # All groups of the job are there: they can form while the model is built and the lost shard comes.
            self.session.stand_by(torch.distributed.get_rank())
        if self.config.durable_dir or self.config.when_out_of_spares == "shrink":
            self.session.describe(torch.distributed.get_rank(), describe_job(self.host.args))

    def open_outlet(self, call: Call) -> None:
        """A writer or a logger is made, with a file or a service behind it: who rehearses has none."""
        self._unless_rehearsed(call)

    def _unless_rehearsed(self, act: Callable[[], Any]) -> None:
        """What others see of this coordinate, so that it is done once the coordinate is this worker's."""
        if self.rehearses:
            self._postponed.append(act)
        else:
            act()

    def make_userbuffers(self, call: Call) -> None:
        """Of Transformer Engine, which upstream makes in its set-up: inside of a node."""
        if "transformer_engine_torch" not in sys.modules:
            call()  # says what is missing
            return
        self._userbuffers = Userbuffers(call, self.store.connect, self.config.form_deadline)
        self._userbuffers.meet_before_launches(self._muster)
        if self.standby:
            self._userbuffers.promise()
        else:
            self._userbuffers.make(self.session.joined_epoch)

    def _resumes(self) -> None:
        """The agent says which durable generation there is, once it has brought this rank's shard into its vault."""
        agreed = self.session.wait_generation(self.session.joined_epoch)
        if agreed.generation >= 0:
            note = agreed.note
            self.durable = agreed
            if agreed.recut or agreed.memory:
                with self._begun_with():
                    other = self.other_width = OtherWidth(self._source(agreed), self.host.args)
                self.durable, note = msgspec.structs.replace(agreed, constants=other.constants), other.note
            if note and torch.distributed.get_rank() == 0:
                print(f"deadpool: {note}", flush=True)
        elif self.config.export:
            raise UserError(f"--deadpool-export: there is no durable generation in {self.config.durable_dir}")
        if self.config.export:
            self.host.save_into(self.config.export)

    def _source(self, agreed: r.Generation) -> Source:
        """Where the shards of another number of replicas are."""
        return in_memory(agreed.memory) if agreed.memory else in_directory(self.config.durable_dir, agreed.recut)

    def load_checkpoint(self, call: Call, model: list[Any]) -> Any:
        durable = self.durable
        if durable is not None and (durable.constants or not frozen_parameters(model)):
            return 0, 0  # everything is in the durable generation
        with self.host.fields.loading():
            return call()

    def build_iterators(self, call: Call) -> Any:
        """Data begin where the job stands: a spare waits here for the agreed generation."""
        fields = self.host.fields
        if self.config.export:
            fields.put({"do_train": True, "do_valid": False, "do_test": False})
            return None, None, None  # nothing is trained, so no data are needed
        if not self.standby:
            with self._begun_with():
                other = self.other_width
                return self._data.build(call, fields, self.durable if other is None else other.small)
        if self.rehearses:
            self._end_rehearsal(call)
        while True:
            agreed = self._agreed()
            if self._begun is not None:
                self.host.begun = self._begun
            try:
                return self._data.build(call, fields, agreed)
            except VaultError as err:
                if not self.session.refuse(agreed, err, self._patience):
                    raise

    @contextlib.contextmanager
    def _begun_with(self) -> Iterator[None]:
        """A durable copy that has changed in memory since it was read is told of, and the start begins anew: so it does
        where what a rank reads itself cannot be read, once it is known whether others can."""
        try:
            yield
        except (VaultError, CannotRead) as err:
            if self.durable is not None:
                patience = self.config.build_deadline if isinstance(err, CannotRead) else self._patience
                self.session.refuse(self.durable, err, patience)
            raise

    def _end_rehearsal(self, call: Call) -> None:
        """Wait, with all there that can be, until the coordinate is this worker's: from then on as any spare."""
        self.host.rehearse_data(call)
        self.session.step("rehearsed", 0, torch.distributed.get_rank(), numa=numa_node())
        self.session.wait_take_over()
        points.reach("take-over.rehearsed")
        self.rehearses = False
        self.host.wake_timers()
        for act in reversed(self._postponed):  # the agent is told first: all others wait for it
            act()
        self._postponed.clear()

    def _agreed(self) -> r.Generation:
        while True:
            epoch = self.session.declared_epoch
            try:
                return self.session.wait_generation(epoch)
            except Superseded:
                continue

    # ---- the loop

    def train(self, call: Call, scheduler: Any) -> Any:
        """``train`` until it has come to its end, through any number of recoveries."""
        args = self.host.args
        trainer = MegatronTrainer(
            self.host,
            self.session,
            self.communicators,
            self.config,
            self.doorbell,
            call["model"],
            call["optimizer"],
            scheduler,
            (call["train_data_iterator"], call["valid_data_iterator"]),
            functools.partial(self._data.rebuild, self.host.fields),
            self.page,
        )
        self.trainer = trainer
        call["forward_step_func"] = _ticking(call["forward_step_func"], trainer)
        can_rescue = bool(args["save"]) and torch.distributed.get_backend() != "nccl"
        if self.standby:
            points.reach("take-over.built")
            trainer.adopt_iterators(args["iteration"])
            can_rescue = True
        if self.durable is not None:
            with self._begun_with():
                trainer.resume(self.durable, self.other_width)
            if self.other_width is not None:
                self.other_width.close()
                self.other_width = None
        restarts = waits_for_nodes(args, int(os.environ["LOCAL_WORLD_SIZE"]))
        trainer.register(can_rescue and not restarts, restarts)
        if trainer.rank == 0:
            job = RunningJob(self.communicators.table_digest(), self.host.begun, dict(self.host.environment()))
            publish_job(self.store.connect, job)
        if not self.standby:
            self.communicators.prepare(self.store())  # connecting takes seconds now and then: not in a recovery
        self.phase = "training"

        def train() -> Any:
            leaving: SystemExit | None = None
            result: Any = None
            if self._userbuffers is not None:
                self._userbuffers.begin(trainer.muster, self.session.joined_epoch)
            try:
                result = call()
            except SystemExit as exit_:
                leaving = exit_
            trainer.report_all()
            if leaving is not None or not self._in_pretrain:
                self._all_through()
            if leaving is not None:
                raise leaving
            return result

        self._redo = Redo(train, functools.partial(self._recover, trainer))
        recovering = self.standby
        if not self.standby:
            try:
                trainer.take_first_generation(self.config.abort_deadline)
            except EpochClosed:
                recovering = True
        if self.config.export and not recovering:
            self._export()
        result = self._redo.train(recovering)
        self.phase = "tail"
        return result

    def _recover(self, trainer: MegatronTrainer, error: BaseException | None) -> Callable[[], Any] | None:
        """Until this rank can train again. What it has to do instead, when no spare is left: save.

        Raises the error that is this rank's own.
        """
        away = time.perf_counter()
        declared = self._rejoin(trainer, error)
        self._series.recovered(time.perf_counter() - away)
        forget_strategies(self.host.context)
        if declared.purpose == "save":
            return functools.partial(self._save_and_leave, declared.epoch)
        return None

    def enter(self, call: Call) -> Any:
        """All that the loop does, `through` at its end."""
        self._in_pretrain = True
        return call()

    def through(self) -> None:
        """Nobody leaves before all ranks are through with everything: the last checkpoint may need them again."""
        if self._redo is not None:
            self._redo.do(self._all_through)

    def _all_through(self) -> None:
        """This rank has done everything; until all have. Raises Superseded when an epoch begins instead."""
        trainer, epoch = self.trainer, self.session.joined_epoch
        assert trainer is not None
        if self.config.state_hash:
            self.session.tell(r.StateHash(0, trainer.rank, trainer.digests()))
        self._finish(epoch)

    def _finish(self, epoch: int) -> None:
        self.session.step("finished", epoch, self.iteration)
        self.session.wait_all_finished(epoch)

    @property
    def _patience(self) -> float:
        """Seconds until somebody that is gone must have been declared."""
        return self.config.lease + 5.0 + self.config.form_deadline

    def _rejoin(self, trainer: MegatronTrainer, error: BaseException | None) -> r.Declare:
        c = self.config
        # A peer that has been aborted already posts steps without data (NCCL's prims_simple.h: an aborted kernel's
        # waitPeer breaks off, its postPeer goes on), so this rank may read garbage before it hears of the epoch's end.
        own = c.lease if torch.distributed.get_backend() == "nccl" else _OWN_ERROR_S
        try:
            if error is not None:
                trainer.look_at_device()
                _drop_frames(error)
            declared = rejoin(
                self.session,
                self.communicators,
                trainer,
                self.store,
                Patience(c.build_deadline, self._patience, own),
                is_communication_error,
                error,
            )
        except UnexplainedError as given_up:
            # This rank's own, or what broke the recovery with nobody to declare another: as it would end any worker.
            raise error or given_up.__cause__ or given_up from None
        self.standby = False
        self._rejoined = True
        return declared

    def _export(self) -> None:
        """`deadpool export`: write Megatron's own checkpoint of the durable generation, then end."""
        try:
            self._save()
        except (OSError, RuntimeError) as err:
            raise UserError(f"--deadpool-export {self.config.export}: the checkpoint cannot be written: {err}") from err
        self._finish(self.session.joined_epoch)
        raise SystemExit(0)

    def _save_and_leave(self, epoch: int) -> None:
        """No spare is left: write Megatron's own checkpoint of the agreed generation, then end.

        Raises EpochClosed when another epoch begins: somebody else has to do it again.
        """
        self._save()
        args = self.host.args
        self.session.tell(r.ShardReady(epoch, args["iteration"], str(args["save"])))
        if self.session.wait_newer(epoch, self.config.build_deadline):
            raise EpochClosed
        raise SystemExit(0)

    def _save(self) -> None:
        forget_strategies(self.host.context)
        self.host.timers("interval-time", log_level=0).start()  # saving pauses it
        self.host.save(self.host.args["iteration"])
        self.host.finalize()

    # ---- one iteration

    def train_step(self, call: Call, iteration: int) -> Any:
        trainer = self.trainer
        assert trainer is not None
        self.iteration = iteration
        start = time.perf_counter()
        trainer.begin(iteration)
        result = call()
        # losses and gradients' norm, in the same places in all loops and versions
        trainer.end(iteration, result[0], result[5], time.perf_counter() - start)
        return result

    def backward_step(self, call: Call) -> Any:
        if self.trainer is not None:
            self.trainer.tick(backward=True)
        return call()

    def decide_exit(self, call: Call, iteration: int) -> Any:
        """The last call of every iteration, which saves what is due. ``iteration``: from 1, as it is counted there."""
        if self._rejoined:
            self._rejoined = False
            self._pay_what_is_owed(iteration)
        return call()

    def _pay_what_is_owed(self, iteration: int) -> None:
        """An asynchronous checkpoint went down with the lost node: save the state of now in its place."""
        assert self.trainer is not None
        args = self.host.args
        if args["save"] and self.trainer.once.owed(iteration, args["save_interval"]):
            self.host.save(iteration)

    def evaluated(self, call: Call) -> Any:
        result = call()
        if self.trainer is not None:
            self.trainer.look()
        return result

    def evaluate(self, call: Call, iteration: int) -> Any:
        trainer = self.trainer
        if trainer is None or self._redo is None:
            return call()
        others = trainer.replays_of(call["data_iterator"], iteration)
        # (after training upstream's own, which knows no ticks: a long evaluation would look stuck)
        call["forward_step_func"] = _ticking(call["forward_step_func"], trainer)

        def evaluate() -> Any:
            points.reach("evaluation.before")
            for replay in others:
                replay.rewind(iteration)
            trainer.at_rest.begin()
            with trainer.once.quiet_if(trainer.once.done("evaluation", iteration)):
                result = call()
            trainer.at_rest.end()
            trainer.once.tell("evaluation", iteration)
            points.reach("evaluation.after")
            return result

        return self._redo.do(evaluate)

    def again(self, call: Call) -> Any:
        """What ranks do together after ``train`` and in no other hook."""
        return call() if self._redo is None else self._redo.do(call)

    def save_once(self, call: Call, iteration: int) -> Any:
        trainer = self.trainer
        if trainer is None or self._redo is None:
            return call()

        def save() -> Any:
            if trainer.once.done("save", iteration):
                return None
            points.reach("save.before")
            trainer.look()
            trainer.once.save_begins(iteration)
            result = call()
            points.reach("save.after")
            if not self.host.args["async_save"]:
                trainer.once.save_ends()
            return result

        return self._redo.do(save)

    def finalize(self, call: Call) -> Any:
        """Asynchronous checkpoints that are written by now become complete."""
        trainer = self.trainer
        if trainer is None or self._redo is None:
            return call()

        def finalize() -> Any:
            result = call()
            trainer.once.save_ends()
            return result

        return self._redo.do(finalize)

    def put_back(self, totals: dict[str, Any]) -> bool:
        """A loop that was just entered begins its averages for the log: ours go on where the generation was. Whether
        there are any."""
        if self.trainer is None or not self.trainer.small_state.logged_before:
            return False
        totals.clear()
        totals.update(self.trainer.small_state.log)
        return True

    def training_log(self, call: Call, iteration: int) -> Any:
        trainer = self.trainer
        if trainer is None:
            return call()
        state, totals = trainer.small_state, call["total_loss_dict"]
        points.reach("log.before")
        trainer.look()
        self._series.spare(self.host)
        with trainer.once.quiet_if(trainer.once.done("log", iteration)):
            result = call()
        trainer.look()  # upstream reduces some of its averages only there
        trainer.once.tell("log", iteration)
        points.reach("log.after")
        state.log = dict(totals)
        state.logged_before = True
        self._series.write(self.host, trainer, iteration)
        return result


def _ticking(forward_step: Any, trainer: MegatronTrainer) -> Any:
    """``forward_step_func`` with a tick before each microbatch."""
    if hasattr(forward_step, "deadpool_ticks"):
        return forward_step

    @functools.wraps(forward_step)
    def ticking(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            trainer.tick()
            start = time.perf_counter_ns()
            result = forward_step(*args, **kwargs)
            trainer.forward_took(time.perf_counter_ns() - start)
            return result
        trainer.evaluate()
        return forward_step(*args, **kwargs)

    ticking.deadpool_ticks = True  # type: ignore[attr-defined]
    return ticking


def _drop_frames(error: BaseException) -> None:
    """Let go of the broken step's activations and pending works, which its traceback keeps alive."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
