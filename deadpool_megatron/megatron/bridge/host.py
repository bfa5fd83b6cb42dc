"""The hooks in Megatron-Bridge's training loop, installed at run time: a script that calls ``pretrain`` stays as it is.

Every hook replaces a module global that Bridge looks up at call time, under ``megatron.bridge``:

==============================  ==========================================================================
``training.pretrain``           ``_pretrain``: whose ``GlobalState`` it is
                                ``train``: the loop that recovers and goes on
                                ``evaluate_and_print_results``, ``barrier_and_log``: done again after a recovery
                                ``_finish_train``: nobody goes on before everybody is through
                                ``_cleanup_after_pretrain_failure``, ``_maybe_destroy_process_group``: left out, since
                                a worker's end, for whatever reason, is the agent's business
``training.inprocess_restart``  ``maybe_wrap_for_inprocess_restart``: refused before it wraps anything
``training.setup``              ``initialize_megatron``: checks before anything is built
                                ``setup_data_iterators``: a spare's data position
``training.initialize``         ``_initialize_tp_communicators``: userbuffers made inside of a node
``training.train``              ``train_step``: a generation opens and ends
                                ``training_log``: printed averages survive a re-entry
                                ``evaluate_and_print_results``, ``save_checkpoint_and_time``: done once for an iteration
                                ``checkpoint_and_decide_exit``: what is owed is saved
``training.eval``               ``evaluate``: its numbers are looked at before they are printed
``training.checkpointing``      ``load_checkpoint``: left out where a durable generation has everything
                                ``maybe_finalize_async_save``: what is complete then
``data.loaders``                ``cyclic_iter``: one whose position can be told
==============================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deadpool_megatron.compat import BRIDGES, UserError
from deadpool_megatron.config import without_ours
from deadpool_megatron.megatron.bridge.settings import arguments, check
from deadpool_megatron.megatron.bridge.state import Counters
from deadpool_megatron.megatron.hooks import Hooks
from deadpool_megatron.megatron.host import Call, Host
from deadpool_megatron.megatron.replay import Passes
from deadpool_megatron.megatron.writers import is_over, may_be_missing

_LOGGERS = ("tensorboard_logger", "wandb_logger", "mlflow_logger", "comet_logger")
_SYNCS = ("no_sync_func", "grad_sync_func", "param_sync_func")


class MegatronBridge(Host):
    """Settings, counters, writers, timers and asynchronous checkpoints belong to one ``GlobalState``."""

    brings_environment = True
    upstream = "megatron-bridge 0.6.2 or 0.7.0"

    def __init__(self) -> None:
        self._state: Any = None
        self._running: Call | None = None  # of train
        self._counters: Counters
        self._syncs: dict[str, Any] = {}  # by field of the model's config, what set-up has put there

    # ---- the loop calls us

    def install(self, hooks: Hooks) -> None:
        from megatron.core import package_info as core

        try:
            from megatron.bridge import package_info
            from megatron.bridge.data import loaders
            from megatron.bridge.training import (
                checkpointing,
                eval,
                initialize,
                inprocess_restart,
                pretrain,
                pretrain_megatron_mimo,
                setup,
            )
            from megatron.bridge.training import train as loop
            from megatron.bridge.training.state import GlobalState
            from megatron.core.datasets import utils as dataset_utils
        except ImportError as err:
            raise UserError(
                f"megatron-bridge cannot be imported with megatron-core {core.__version__}: {err}; 0.6 runs with "
                "megatron-core 0.19, 0.7 with 0.20"
            ) from None

        version = str(package_info.__version__)
        if not version.startswith(BRIDGES):
            raise UserError(f"megatron-bridge {version} is not supported: DeadPool runs with {self.upstream}")
        if not (Path(str(dataset_utils.__file__)).parent / "Makefile").exists():
            initialize.compile_helpers = lambda: None  # as in Megatron-LM, whose wheel has them compiled

        def enter(call: Call) -> Any:
            self._state = call["state"]
            check(self._state.cfg)
            return hooks.enter(call)

        def initialized(call: Call) -> Any:
            def making() -> Any:
                result = call()
                self.fields = self._counters = Counters(self._state)
                return result

            return hooks.initialize(making)

        def train(call: Call) -> Any:
            from megatron.core.utils import get_model_config

            self._running = call
            config = get_model_config(call["model"][0])
            self._syncs = {name: getattr(config, name) for name in _SYNCS}
            return hooks.train(call, call["scheduler"])

        def training_log(call: Call) -> Any:
            """``train`` begins with empty averages."""
            self._leave_ended_run()
            if not call["total_loss_dict"]:
                self._counters.log_begins(goes_on=hooks.put_back(call["total_loss_dict"]))
            return hooks.training_log(call, self._step)

        def finish(call: Call) -> Any:
            hooks.through()  # it takes down what a recovery would need
            return call()

        def another_loop(call: Call) -> Any:
            raise UserError("MegatronMIMO is not supported with --deadpool: another training loop")

        def restarts(call: Call) -> Any:
            raise UserError("inprocess_restart is not supported with --deadpool: it restarts whatever DeadPool ends")

        for name in _LOGGERS:
            may_be_missing(GlobalState, name, lambda: hooks.standby)
        self.replace(inprocess_restart, "maybe_wrap_for_inprocess_restart", restarts)
        self.replace(pretrain_megatron_mimo, "pretrain_megatron_mimo", another_loop)
        self.replace(pretrain, "_pretrain", enter)
        self.replace(setup, "initialize_megatron", initialized)
        self.replace(initialize, "_initialize_tp_communicators", hooks.make_userbuffers)
        self.replace(checkpointing, "load_checkpoint", lambda call: hooks.load_checkpoint(call, call["model"]))
        self.replace(setup, "setup_data_iterators", hooks.build_iterators)
        self.replace(loaders, "cyclic_iter", lambda call: Passes(call.first()))
        self.replace(pretrain, "train", train)
        self.replace(loop, "train_step", lambda call: hooks.train_step(call, self._step))
        self.replace(loop, "training_log", training_log)
        self.replace(eval, "evaluate", hooks.evaluated)
        for module in (loop, pretrain):
            self.replace(module, "evaluate_and_print_results", lambda call: hooks.evaluate(call, self._step))
        self.replace(loop, "save_checkpoint_and_time", lambda call: hooks.save_once(call, self._step))
        self.replace(checkpointing, "maybe_finalize_async_save", hooks.finalize)
        self.replace(loop, "checkpoint_and_decide_exit", lambda call: hooks.decide_exit(call, self._step))
        self.replace(pretrain, "barrier_and_log", hooks.again)
        self.replace(pretrain, "_finish_train", finish)
        self.replace(pretrain, "_cleanup_after_pretrain_failure", lambda _: None)
        self.replace(pretrain, "_maybe_destroy_process_group", lambda _: None)

    @property
    def _step(self) -> int:
        """Of the iteration that is about to be trained; after its step, of the next one."""
        step: int = self._state.train_state.step
        return step

    def _leave_ended_run(self) -> None:
        """After a loss at the very end, when the loop has finished it; its getter would begin another one."""
        if is_over(self._state._wandb_logger):
            self._state._wandb_logger = self._state.cfg.logger.wandb_project = None

    # ---- and we the loop

    @property
    def args(self) -> Mapping[str, Any]:
        return {} if self._state is None else arguments(self._state)

    @property
    def begun(self) -> float:
        seconds: float = self._state.start_time
        return seconds

    @begun.setter
    def begun(self, seconds: float) -> None:
        self._state.start_time = seconds

    @property
    def timers(self) -> Any:
        return self._state.timers

    @property
    def context(self) -> dict[str, Any]:
        assert self._running is not None
        context: dict[str, Any] = self._running["checkpoint_manager"].checkpointing_context
        return context

    @property
    def writers(self) -> tuple[Any, Any]:
        return self._state.tensorboard_logger, self._state.wandb_logger

    @property
    def async_saves(self) -> Any:
        return self._state.async_calls_queue

    def environment(self) -> dict[str, str]:
        return {name: str(value) for name, value in self._state.cfg.env_vars.items()}

    def arguments_for_script(self, arguments: list[str]) -> list[str]:
        return without_ours(arguments)

    def outlets(self) -> Iterable[tuple[Any, str]]:
        from megatron.bridge.training import eval
        from megatron.bridge.training.state import GlobalState
        from megatron.bridge.training.utils import train_utils

        return [
            *((GlobalState, name) for name in _LOGGERS),
            *((each, f"print_rank_{which}") for each in (train_utils, eval) for which in ("last", "0")),
        ]

    def warm_up(self) -> None:
        """All is imported: nothing else is slow."""

    def load_nothing(self) -> None:
        cfg = self._state.cfg
        cfg.checkpoint.load = cfg.checkpoint.pretrained_checkpoint = None
        cfg._checkpoint_load_required = False  # as of ``finetune``
        for model in (cfg.model, getattr(cfg.model, "teacher", None)):
            for name in ("pre_wrap_hooks", "_pre_wrap_hooks"):  # of configs, and of providers
                hooks = getattr(model, name, None) or []
                hooks[:] = [hook for hook in hooks if _named(hook) != "load_weights_hf_to_megatron"]

    def save_into(self, directory: str) -> None:
        cfg = self._state.cfg
        cfg.checkpoint.save, cfg.checkpoint.async_save, cfg.checkpoint.ckpt_format = directory, False, "torch_dist"
        for reported in ("tensorboard_dir", "wandb_project", "mlflow_experiment", "comet_project"):
            setattr(cfg.logger, reported, None)  # by the job whose generation it is

    def save(self, iteration: int) -> None:
        from megatron.bridge.training import train as loop

        assert self._running is not None
        train = self._running
        loop.save_checkpoint_and_time(
            self._state,
            train["model"],
            train["optimizer"],
            train["scheduler"],
            self._state.train_state.floating_point_operations_so_far,
            train["checkpoint_manager"],
            train_data_iterator=train["train_data_iterator"],
            pg_collection=train["pg_collection"],
        )

    def finalize(self) -> None:
        assert self._running is not None
        self._running["checkpoint_manager"].finalize_async_saves(state=self._state, blocking=True, terminate=True)

    def unwind(self, config: Any) -> None:
        for name, function in self._syncs.items():
            setattr(config, name, function)  # set-up's; ``train`` takes one of them away for its first iteration
        config.timers = self._state.timers  # an evaluation goes without
        if self._state.async_calls_queue is not None:
            self._state._async_calls_queue = None
            self._state.initialize_async_checkpoint_worker()


def _named(hook: Any) -> str:
    """A function's name, also where arguments of it are given already."""
    return str(getattr(getattr(hook, "func", hook), "__name__", ""))
