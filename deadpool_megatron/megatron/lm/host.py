"""The hooks in Megatron-LM's training loop, installed at run time: an unmodified pretrain_gpt.py needs nothing more.

Every hook replaces a module global that upstream looks up at call time:

========================================  ===============================================================
``training.arguments``                    ``add_megatron_arguments``: the group ``deadpool`` in ``--help``
                                          ``validate_args``: an evaluation that the replicas divide
``training.yaml_arguments``               ``load_yaml``: our settings in the namespace of ``--yaml-cfg`` too
                                          ``validate_yaml``: as ``validate_args``
``training.training``                     ``initialize_megatron``: checks before anything is built
                                          ``load_checkpoint``: fields of ``args`` that come out of one are state;
                                          left out where a durable generation has everything
                                          ``build_train_valid_test_data_iterators``: a spare's data position
                                          ``build_train_valid_test_datasets``: those of a rehearsal, if the same
                                          ``build_train_valid_test_data_loaders``: microbatches that the replicas do
                                          not divide (`dealing`)
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
``training.global_vars``                  ``_set_tensorboard_writer``, ``_set_wandb_writer``, ``_set_one_logger``:
                                          not in a rehearsal
``training.initialize``                   ``_initialize_tp_communicators``: userbuffers made inside of a node
========================================  ===============================================================

In megatron.core, for `dealing`: ``num_microbatches_calculator._build_num_microbatches_calculator``, and, where counts
differ, ``schedules.forward_step_calc_loss``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deadpool_megatron import config as settings
from deadpool_megatron.megatron.adapters import current
from deadpool_megatron.megatron.hooks import Hooks
from deadpool_megatron.megatron.host import Call, Host
from deadpool_megatron.megatron.lm.data_sets import DataSets
from deadpool_megatron.megatron.lm.dealing import Dealing, deals
from deadpool_megatron.megatron.lm.run_args import RunArgs
from deadpool_megatron.megatron.replay import Passes
from deadpool_megatron.megatron.writers import is_over, may_be_missing


class MegatronLM(Host):
    """Settings and counters are the process's ``args``, writers and timers its global variables."""

    can_rehearse = True
    fields: RunArgs

    def __init__(self) -> None:
        self._running: Call | None = None  # of train
        self._data_sets = DataSets()
        self._dealing = Dealing(self)

    def deals(self, replicas: int) -> bool:
        return self._dealing.fixed and deals(self.args, replicas)

    # ---- the loop calls us

    def install(self, hooks: Hooks) -> None:
        import megatron.core
        from megatron.core.datasets import utils as dataset_utils
        from megatron.training import global_vars, training
        from megatron.training import initialize as setup

        self.upstream = current().upstream
        if not (Path(str(dataset_utils.__file__)).parent / "Makefile").exists():
            # The wheel has the dataset helpers compiled, but upstream runs `make` for them and exits when it fails.
            dataset_utils.compile_helpers = lambda: None

        def initialize(call: Call) -> Any:
            def initialized() -> Any:
                result = call()
                self.fields = RunArgs(_args())
                self._dealing.check(self.args)
                return result

            return hooks.initialize(initialized)

        def pretrain(call: Call) -> Any:
            result = hooks.enter(call)
            hooks.through()
            return result

        def train(call: Call) -> Any:
            self._running = call
            return hooks.train(call, call["opt_param_scheduler"])

        def training_log(call: Call) -> Any:
            """Upstream's first call after entering ``train`` starts new averages."""
            if is_over(global_vars._GLOBAL_WANDB_WRITER):  # a loss at the very end, when upstream has finished it
                global_vars._GLOBAL_WANDB_WRITER = None
            if call.get("is_first_iteration") and hooks.put_back(call["total_loss_dict"]):
                call["is_first_iteration"] = False
            return hooks.training_log(call, call["iteration"])

        def checkpoint_and_decide_exit(call: Call) -> Any:
            """The last call of every iteration, and the one that is told ``train``'s running count of operations."""
            self.fields.flops = call["num_floating_point_operations_so_far"]
            return hooks.decide_exit(call, call["iteration"])

        for name in ("_set_tensorboard_writer", "_set_wandb_writer"):
            may_be_missing(global_vars, name, lambda: hooks.standby)
        for name in ("_set_tensorboard_writer", "_set_wandb_writer", "_set_one_logger"):
            self.replace(global_vars, name, hooks.open_outlet)
        self.take_settings(hooks.config)
        self._dealing.install()
        self.replace(training, "initialize_megatron", initialize)
        self.replace(setup, "_initialize_tp_communicators", hooks.make_userbuffers)
        self.replace(training, "load_checkpoint", lambda call: hooks.load_checkpoint(call, call.first()))
        self.replace(training, "build_train_valid_test_data_iterators", hooks.build_iterators)
        self.replace(training, "build_train_valid_test_datasets", lambda call: self._data_sets.build(call, _args()))
        self.replace(training, "cyclic_iter", lambda call: Passes(call.first()))
        self.replace(training, "pretrain", pretrain)
        megatron.training.pretrain = training.pretrain  # the name that scripts import
        self.replace(training, "train", train)
        self.replace(training, "train_step", lambda call: hooks.train_step(call, call["iteration"]))
        self.replace(training, "training_log", training_log)
        self.replace(training, "print_datetime", hooks.again)
        self.replace(training, "evaluate", hooks.evaluated)
        self.replace(training, "evaluate_and_print_results", lambda call: hooks.evaluate(call, call["iteration"]))
        self.replace(training, "save_checkpoint_and_time", lambda call: hooks.save_once(call, call["iteration"]))
        self.replace(training, "maybe_finalize_async_save", hooks.finalize)
        self.replace(training, "checkpoint_and_decide_exit", checkpoint_and_decide_exit)

    def take_settings(self, config: settings.DeadpoolConfig) -> None:
        """Let upstream's parser have them."""
        from megatron.training import arguments, yaml_arguments

        self._dealing.resizes = config.when_out_of_spares == "shrink"

        def load_yaml(call: Call) -> Any:
            """Upstream drops the namespace of the command line for the file's."""
            namespace = call()
            settings.carry_over(config, namespace)
            return namespace

        self.replace(arguments, "add_megatron_arguments", lambda call: settings.add_arguments(call()))
        self.replace(yaml_arguments, "load_yaml", load_yaml)

    # ---- and we the loop

    @property
    def args(self) -> Mapping[str, Any]:
        from megatron.training import global_vars

        return {} if global_vars._GLOBAL_ARGS is None else vars(global_vars._GLOBAL_ARGS)

    @property
    def begun(self) -> float:
        from megatron.training import training

        seconds: float = training._TRAIN_START_TIME
        return seconds

    @begun.setter
    def begun(self, seconds: float) -> None:
        from megatron.training import training

        training._TRAIN_START_TIME = seconds

    @property
    def timers(self) -> Any:
        from megatron.training import get_timers

        return get_timers()

    @property
    def context(self) -> dict[str, Any]:
        assert self._running is not None
        context: dict[str, Any] = self._running["checkpointing_context"]
        return context

    @property
    def writers(self) -> tuple[Any, Any]:
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        return get_tensorboard_writer(), get_wandb_writer()

    @property
    def async_saves(self) -> Any:
        from megatron.training import async_utils

        return async_utils._async_calls_queue

    @property
    def flags(self) -> list[str]:
        return sys.argv[1:]

    def outlets(self) -> Iterable[tuple[Any, str]]:
        from megatron.training import training

        names = ("print_rank_last", "get_tensorboard_writer", "get_wandb_writer", "get_one_logger")
        return [(training, name) for name in names if hasattr(training, name)]

    def warm_up(self) -> None:
        """The flag parser reads the source of its dataclasses for their docstrings at each parse (1 s); they are
        remembered from here on."""
        from megatron.training import argument_utils, arguments

        factory = argument_utils.ArgumentGroupFactory
        original = factory._get_field_docstrings
        known: dict[type, dict[str, str]] = {}

        def remembered(self: Any, source: type) -> dict[str, str]:
            if source not in known:
                known[source] = original(self, source)
            return dict(known[source])

        factory._get_field_docstrings = remembered
        arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))

    def not_rehearsed(self) -> str:
        args = vars(_args())
        if args.get("log_progress") and args["rank"] == 0:
            return "--log-progress, whose file has a line for each start"
        last = args["rank"] == args["world_size"] - 1
        if last and args.get("enable_one_logger") and importlib.util.find_spec("one_logger"):
            return "one_logger (--no-one-logger), which is told of each start"
        return "--adlr-autoresume" if args.get("adlr_autoresume") else ""

    def rehearse_data(self, build: Call) -> None:
        self._data_sets.build_ahead(build, _args())

    def load_nothing(self) -> None:
        args = _args()
        args.load = args.pretrained_checkpoint = None

    def save_into(self, directory: str) -> None:
        args = _args()
        args.save, args.async_save = directory, False

    def save(self, iteration: int) -> None:
        from megatron.training import training

        assert self._running is not None
        train = self._running
        training.save_checkpoint_and_time(
            iteration,
            train["model"],
            train["optimizer"],
            train["opt_param_scheduler"],
            self.fields.flops,
            train["checkpointing_context"],
            train_data_iterator=train["train_data_iterator"],
        )

    def finalize(self) -> None:
        from megatron.training import training

        training.maybe_finalize_async_save(blocking=True, terminate=True)

    def unwind(self, config: Any) -> None:
        from megatron.training import async_utils, training

        config.no_sync_func = config.grad_sync_func = config.param_sync_func = None  # ``train`` wants to set them
        stats = getattr(training, "_seqlen_stats_in_iteration", None)
        if stats is not None:  # of packed sequences
            stats.zero_()
            training._seqlen_stats_active = False
        _forget_loggers()
        async_utils._async_calls_queue = None


def _forget_loggers() -> None:
    """Of ``--save-activations-interval`` and its like: they hook into the model for one forward and backward pass, and
    assert at the next one that they are out of it."""
    from megatron.training import activation_logging, dgrad_logging

    for module in (activation_logging, dgrad_logging):
        logger, module._LOGGER = module._LOGGER, None  # with what it has recorded of the broken pass
        for name in ("remove_activation_hooks", "remove_tpe_hooks", "remove_hooks"):
            if hasattr(logger, name):
                getattr(logger, name)()


def _args() -> argparse.Namespace:
    from megatron.training import get_args

    args: argparse.Namespace = get_args()
    return args
