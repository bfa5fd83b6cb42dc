"""The hooks in Megatron's training loop, installed at run time: an unmodified pretrain_gpt.py needs nothing more.

Every hook replaces a module global that upstream looks up at call time:

========================================  ===============================================================
``training.arguments``                    ``add_megatron_arguments``: the group ``deadpool`` in ``--help``
``training.yaml_arguments``               ``load_yaml``: our settings in the namespace of ``--yaml-cfg`` too
``training.training``                     ``initialize_megatron``: checks before anything is built
                                          ``load_checkpoint``: fields of ``args`` that come out of one are state;
                                          left out where a durable generation has everything
                                          ``build_train_valid_test_data_iterators``: a spare's data position
                                          ``cyclic_iter``: one whose position can be told
                                          ``train``: the loop that recovers and goes on
                                          ``pretrain``: nobody leaves before everybody is through
                                          ``train_step``: a generation opens and ends
                                          ``training_log``: printed averages survive a re-entry
                                          ``checkpoint_and_decide_exit``: the count of operations so far
                                          ``evaluate``: its numbers are looked at before they are printed
                                          ``evaluate_and_print_results``, ``save_checkpoint_and_time``,
                                          ``maybe_finalize_async_save``: done once for an iteration, and again
                                          after a recovery where they come after ``train``; so is
                                          ``print_datetime``
``core.pipeline_parallel.schedules``      ``backward_step``: ticks; forward ticks wrap ``forward_step_func``
``core.transformer.moe.fused_a2a``        methods of ``Buffer``, ``HybridEPBuffer``: hosts meet before they launch
``training.initialize``                   ``_initialize_tp_communicators``: userbuffers made inside of a node
========================================  ===============================================================
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deadpool_megatron import config as settings
from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.pulse import PulsePage
from deadpool_megatron.cluster.agent.workers import ADOPTED
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.comm import Communicators, is_communication_error
from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.adapters import current
from deadpool_megatron.megatron.data_position import DataPosition
from deadpool_megatron.megatron.description import describe_job
from deadpool_megatron.megatron.frozen import frozen_parameters
from deadpool_megatron.megatron.muster import Muster, meet_before_launches
from deadpool_megatron.megatron.redo import Redo
from deadpool_megatron.megatron.replay import Passes
from deadpool_megatron.megatron.reset import forget_strategies
from deadpool_megatron.megatron.run_args import RunArgs
from deadpool_megatron.megatron.standby import publish_job
from deadpool_megatron.megatron.trainer import EpochClosed, MegatronTrainer
from deadpool_megatron.megatron.userbuffers import Userbuffers
from deadpool_megatron.megatron.writers import Series
from deadpool_megatron.recovery import Patience, Session, Superseded, UnexplainedError, rejoin
from deadpool_megatron.support import check_arguments, check_environment, not_looked_at, not_on_a_gpu
from deadpool_megatron.vault import VaultError

_OWN_ERROR_S = 0.5  # from an error of this rank's own until it is told, in case the epoch's end comes with it


@dataclass(slots=True)
class Hooks:
    """All hooks of one worker process.

    Args:
        session: the line to the agent.
        communicators: this process's groups.
        config: the job's settings.
        doorbell: the eventfd the agent listens to.
        store: makes (or returns) the client of the rendezvous store for re-forming.
        connect: makes another one.
        standby: this process is a spare taking over a coordinate.
        page: where the agent sees the progress.
    """

    session: Session
    communicators: Communicators
    config: settings.DeadpoolConfig
    doorbell: int
    store: Callable[[], torch.distributed.Store]
    connect: Callable[[], torch.distributed.Store]
    standby: bool
    page: PulsePage
    trainer: MegatronTrainer | None = None
    phase: str = "setup"
    iteration: int = -1
    durable: r.Generation | None = None
    _data: DataPosition = field(default_factory=DataPosition)
    _run_args: RunArgs | None = None
    _redo: Redo | None = None
    _userbuffers: Userbuffers | None = None
    _in_pretrain: bool = False
    _rejoined: bool = False
    _groups: str = ""
    _series: Series = field(default_factory=Series)

    def install(self) -> None:
        """Put the hooks in place. Raises UserError for a megatron-core that is not supported."""
        import megatron.core
        from megatron.core.datasets import utils as dataset_utils
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.transformer.moe import fused_a2a
        from megatron.training import arguments, initialize, training, yaml_arguments

        current().check_seams(str(megatron.core.__version__))
        if not (Path(str(dataset_utils.__file__)).parent / "Makefile").exists():
            # The wheel has the dataset helpers compiled, but upstream runs `make` for them and exits when it fails.
            dataset_utils.compile_helpers = lambda: None
        self._replace(arguments, "add_megatron_arguments", self._add_arguments)
        self._replace(yaml_arguments, "load_yaml", self._load_yaml)
        self._replace(training, "initialize_megatron", self._initialize)
        self._replace(training, "load_checkpoint", self._load_checkpoint)
        self._replace(training, "build_train_valid_test_data_iterators", self._build_iterators)
        self._replace(training, "cyclic_iter", lambda _, loader: Passes(loader))
        self._replace(training, "pretrain", self._pretrain)
        megatron.training.pretrain = training.pretrain  # the name that scripts import
        self._replace(training, "train", self._train)
        self._replace(training, "train_step", self._train_step)
        self._replace(training, "training_log", self._training_log)
        self._replace(training, "print_datetime", self._again)
        self._replace(training, "evaluate", self._evaluated)
        self._replace(training, "evaluate_and_print_results", self._evaluate)
        self._replace(training, "save_checkpoint_and_time", self._save_once)
        self._replace(training, "maybe_finalize_async_save", self._finalize_async_save)
        self._replace(training, "checkpoint_and_decide_exit", self._checkpoint_and_decide_exit)
        self._replace(schedules, "backward_step", self._backward_step)
        self._replace(initialize, "_initialize_tp_communicators", self._make_userbuffers)
        meet_before_launches(fused_a2a, self._muster)

    def _replace(self, module: Any, name: str, hook: Callable[..., Any]) -> None:
        original = getattr(module, name)

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        setattr(module, name, replaced)

    def _muster(self) -> Muster | None:
        return self.trainer.muster if self.trainer is not None else None

    def learn_groups(self, table_digest: str) -> None:
        """For a spare: the digest of the table of groups of those that train."""
        self._groups = table_digest

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
        from megatron.training import global_vars

        args = global_vars._GLOBAL_ARGS
        if args is not None and args.exit_signal_handler:
            os.kill(os.getpid(), args.exit_signal)

    # ---- set-up

    def _add_arguments(self, original: Any, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return settings.add_arguments(original(parser))

    def _load_yaml(self, original: Any, path: str) -> Any:
        """``--yaml-cfg``: upstream drops the namespace of the command line for the file's."""
        namespace = original(path)
        settings.carry_over(self.config, namespace)
        return namespace

    def _initialize(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        if self.standby:
            points.reach("take-over.building")
        check_environment(os.environ)
        check_arguments(get_args(), int(os.environ["LOCAL_WORLD_SIZE"]))
        if self.standby:
            # A checkpoint to load would be read by collectives; the spare's state comes from a vault.
            get_args().load = get_args().pretrained_checkpoint = None
        result = original(*args, **kwargs)
        self._run_args = RunArgs(get_args())
        unproven = not_on_a_gpu(vars(get_args()))
        if not self.standby and torch.distributed.get_rank() == 0:
            if unproven:
                print(f"deadpool: not run on a GPU yet: {', '.join(unproven)}; see deadpool check", flush=True)
            if flags := not_looked_at(sys.argv[1:]):
                print(f"deadpool: nobody has looked at what a lost node does to {', '.join(flags)}", flush=True)
        if self.standby and self.communicators.table_digest() == self._groups:
            # All groups of the job are there: they can form while the model is built and the lost shard comes.
            self.session.stand_by(torch.distributed.get_rank())
        if self.config.durable_dir:
            self.session.describe("job", torch.distributed.get_rank(), describe_job(get_args()))
        if self.config.resume != "none" and not self.standby:
            self._resumes(get_args())
        return result

    def _make_userbuffers(self, original: Any) -> None:
        if "transformer_engine_torch" not in sys.modules:
            original()  # says what is missing
            return
        self._userbuffers = Userbuffers(original, self.connect, self.config.form_deadline)
        self._userbuffers.meet_before_launches(self._muster)
        if self.standby:
            self._userbuffers.promise()
        else:
            self._userbuffers.make(self.session.joined_epoch)

    def _resumes(self, megatron_args: Any) -> None:
        """The agent says which durable generation there is, once it has brought this rank's shard into its vault."""
        agreed = self.session.wait_generation(self.session.joined_epoch)
        if agreed.generation >= 0:
            self.durable = agreed
        elif self.config.export:
            raise UserError(f"--deadpool-export: there is no durable generation in {self.config.durable_dir}")
        if self.config.export:
            megatron_args.save, megatron_args.async_save = self.config.export, False

    def _load_checkpoint(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        assert self._run_args is not None
        model = next(iter(inspect.signature(original).bind(*args, **kwargs).arguments.values()))
        durable = self.durable
        if durable is not None and (durable.constants or not frozen_parameters(model)):
            return 0, 0  # everything is in the durable generation
        with self._run_args.loading():
            return original(*args, **kwargs)

    def _build_iterators(self, original: Any, provider: Any) -> Any:
        """Data begin where the job stands: a spare waits here for the agreed generation."""
        from megatron.training import get_args

        if self.config.export:
            get_args().do_train, get_args().do_valid, get_args().do_test = True, False, False
            return None, None, None  # nothing is trained, so no data are needed
        if not self.standby:
            with self._begun_with():
                return self._data.build(original, provider, get_args(), self.durable)
        while True:
            agreed = self._agreed()
            try:
                return self._data.build(original, provider, get_args(), agreed)
            except VaultError as err:
                if not self.session.refuse(agreed, err, self._patience):
                    raise

    @contextlib.contextmanager
    def _begun_with(self) -> Iterator[None]:
        """A durable copy that has changed in memory since it was read is told of, and the start begins anew."""
        try:
            yield
        except VaultError as err:
            if self.durable is not None:
                self.session.refuse(self.durable, err, self._patience)
            raise

    def _agreed(self) -> r.Generation:
        while True:
            epoch = self.session.declared_epoch
            try:
                return self.session.wait_generation(epoch)
            except Superseded:
                continue

    # ---- the loop

    def _train(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """``train`` until it has come to its end, through any number of recoveries."""
        from megatron.training import get_args

        bound = inspect.signature(original).bind(*args, **kwargs)
        a = bound.arguments
        megatron_args = get_args()
        assert self._run_args is not None
        trainer = MegatronTrainer(
            self.session,
            self.communicators,
            self.config,
            self.doorbell,
            megatron_args,
            self._run_args,
            a["model"],
            a["optimizer"],
            a["opt_param_scheduler"],
            a["config"],
            (a["train_data_iterator"], a["valid_data_iterator"]),
            functools.partial(self._data.rebuild, megatron_args),
            self.page,
        )
        self.trainer = trainer
        a["forward_step_func"] = _ticking(a["forward_step_func"], trainer)
        can_rescue = bool(megatron_args.save) and torch.distributed.get_backend() != "nccl"
        if self.standby:
            points.reach("take-over.built")
            trainer.adopt_iterators(megatron_args.iteration)
            can_rescue = True
        if self.durable is not None:
            with self._begun_with():
                trainer.resume(self.durable)
        trainer.register(can_rescue)
        if trainer.rank == 0:
            publish_job(self.connect, self.communicators.table_digest())
        if not self.standby:
            self.communicators.prepare(self.store())  # connecting takes seconds now and then: not in a recovery
        self.phase = "training"

        def train() -> Any:
            leaving: SystemExit | None = None
            result: Any = None
            if self._userbuffers is not None:
                self._userbuffers.begin(trainer.muster, self.session.joined_epoch)
            try:
                result = original(*bound.args, **bound.kwargs)
            except SystemExit as exit_:
                leaving = exit_
            trainer.report_all()
            if leaving is not None or not self._in_pretrain:
                self._all_through()
            if leaving is not None:
                raise leaving
            return result

        self._redo = Redo(train, functools.partial(self._recover, trainer, bound.arguments))
        recovering = self.standby
        if not self.standby:
            try:
                trainer.take_first_generation(self.config.abort_deadline)
            except EpochClosed:
                recovering = True
        if self.config.export and not recovering:
            self._export(bound.arguments)
        result = self._redo.train(recovering)
        self.phase = "tail"
        return result

    def _recover(
        self, trainer: MegatronTrainer, a: dict[str, Any], error: BaseException | None
    ) -> Callable[[], Any] | None:
        """Until this rank can train again. What it has to do instead, when no spare is left: save.

        Raises the error that is this rank's own.
        """
        away = time.perf_counter()
        declared = self._rejoin(trainer, error)
        self._series.recovered(time.perf_counter() - away)
        forget_strategies(a["checkpointing_context"])
        if declared.purpose == "save":
            return functools.partial(self._save_and_leave, a, declared.epoch)
        return None

    def _pretrain(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Nobody leaves before all ranks are through with everything: the last checkpoint may need them again."""
        self._in_pretrain = True
        result = original(*args, **kwargs)
        if self._redo is not None:
            self._redo.do(self._all_through)
        return result

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
        except UnexplainedError:
            raise error if error is not None else UserError("the recovery was given up") from None
        self.standby = False
        self._rejoined = True
        return declared

    def _export(self, a: dict[str, Any]) -> None:
        """`deadpool export`: write Megatron's own checkpoint of the durable generation, then end."""
        try:
            self._save(a)
        except (OSError, RuntimeError) as err:
            raise UserError(f"--deadpool-export {self.config.export}: the checkpoint cannot be written: {err}") from err
        self._finish(self.session.joined_epoch)
        raise SystemExit(0)

    def _save_and_leave(self, a: dict[str, Any], epoch: int) -> None:
        """No spare is left: write Megatron's own checkpoint of the agreed generation, then end.

        Raises EpochClosed when another epoch begins: somebody else has to do it again.
        """
        args = self._save(a)
        self.session.tell(r.ShardReady(epoch, args.iteration, str(args.save)))
        if self.session.wait_newer(epoch, self.config.build_deadline):
            raise EpochClosed
        raise SystemExit(0)

    def _save(self, a: dict[str, Any]) -> Any:
        from megatron.training import get_args, get_timers, training

        args = get_args()
        get_timers()("interval-time", log_level=0).start()  # saving pauses it
        _save_checkpoint(a, args.iteration, args.num_floating_point_operations_so_far, {})
        training.maybe_finalize_async_save(blocking=True, terminate=True)
        return args

    # ---- one iteration

    def _train_step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self.trainer
        assert trainer is not None
        iteration = inspect.signature(original).bind(*args, **kwargs).arguments["iteration"]
        self.iteration = iteration
        start = time.perf_counter()
        trainer.begin(iteration)
        result = original(*args, **kwargs)
        # losses and gradients' norm, in the same places in all versions
        trainer.end(iteration, result[0], result[5], time.perf_counter() - start)
        return result

    def _backward_step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.trainer is not None:
            self.trainer.tick(backward=True)
        return original(*args, **kwargs)

    def _checkpoint_and_decide_exit(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """The last call of every iteration, and the one that is told ``train``'s running count of operations."""
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        trainer = self.trainer
        if trainer is None:
            return original(*args, **kwargs)
        trainer.small_state.flops = bound["num_floating_point_operations_so_far"]
        if self._rejoined:
            self._rejoined = False
            self._pay_what_is_owed(bound)
        return original(*args, **kwargs)

    def _pay_what_is_owed(self, a: dict[str, Any]) -> None:
        """An asynchronous checkpoint went down with the lost node: save the state of now in its place."""
        from megatron.training import get_args

        assert self.trainer is not None
        args = get_args()
        if args.save and self.trainer.once.owed(a["iteration"], args.save_interval):
            flops = a["num_floating_point_operations_so_far"]
            _save_checkpoint(a, a["iteration"], flops, a["checkpointing_context"])

    def _evaluated(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if self.trainer is not None:
            self.trainer.look()
        return result

    def _evaluate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self.trainer
        if trainer is None or self._redo is None:
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        iteration = bound.arguments["iteration"]
        others = trainer.replays_of(bound.arguments["data_iterator"], iteration)
        # (after training upstream's own, which knows no ticks: a long evaluation would look stuck)
        bound.arguments["forward_step_func"] = _ticking(bound.arguments["forward_step_func"], trainer)

        def evaluate() -> Any:
            points.reach("evaluation.before")
            for replay in others:
                replay.rewind(iteration)
            trainer.at_rest.begin()
            with trainer.once.quiet_if(trainer.once.done("evaluation", iteration)):
                result = original(*bound.args, **bound.kwargs)
            trainer.at_rest.end()
            trainer.once.tell("evaluation", iteration)
            points.reach("evaluation.after")
            return result

        return self._redo.do(evaluate)

    def _again(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """What ranks do together after ``train`` and in no other hook: `print_datetime` has a barrier."""
        act = functools.partial(original, *args, **kwargs)
        return act() if self._redo is None else self._redo.do(act)

    def _save_once(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self.trainer
        if trainer is None or self._redo is None:
            return original(*args, **kwargs)
        from megatron.training import get_args

        iteration = inspect.signature(original).bind(*args, **kwargs).arguments["iteration"]

        def save() -> Any:
            if trainer.once.done("save", iteration):
                return None
            points.reach("save.before")
            trainer.look()
            trainer.once.save_begins(iteration)
            result = original(*args, **kwargs)
            points.reach("save.after")
            if not get_args().async_save:
                trainer.once.save_ends()
            return result

        return self._redo.do(save)

    def _finalize_async_save(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self.trainer
        if trainer is None or self._redo is None:
            return original(*args, **kwargs)

        def finalize() -> Any:
            result = original(*args, **kwargs)
            trainer.once.save_ends()
            return result

        return self._redo.do(finalize)

    def _training_log(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Upstream's first call after entering ``train`` starts new averages; ours go on where the generation was."""
        trainer = self.trainer
        if trainer is None:
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        totals = bound.arguments["total_loss_dict"]
        state = trainer.small_state
        if bound.arguments.get("is_first_iteration") and state.logged_before:
            totals.clear()
            totals.update(state.log)
            bound.arguments["is_first_iteration"] = False
        iteration = bound.arguments["iteration"]
        points.reach("log.before")
        trainer.look()
        with trainer.once.quiet_if(trainer.once.done("log", iteration)):
            result = original(*bound.args, **bound.kwargs)
        trainer.look()  # upstream reduces some of its averages only there
        trainer.once.tell("log", iteration)
        points.reach("log.after")
        state.log = dict(totals)
        state.logged_before = True
        self._series.write(trainer, iteration)
        return result


def _save_checkpoint(a: dict[str, Any], iteration: int, flops: float, context: dict[str, Any]) -> None:
    """As upstream does it in ``train``, whose arguments ``a`` are; through our hook."""
    from megatron.training import training

    training.save_checkpoint_and_time(
        iteration,
        a["model"],
        a["optimizer"],
        a["opt_param_scheduler"],
        flops,
        context,
        train_data_iterator=a["train_data_iterator"],
    )


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
