"""What of Megatron-Bridge is judged, reset and guarded, on objects shaped as its own; its own are in test_bridge.py."""

from __future__ import annotations

import os
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from deadpool_megatron.megatron import WarmUp, standby
from deadpool_megatron.megatron.bridge import MegatronBridge
from deadpool_megatron.megatron.bridge.settings import refusals
from deadpool_megatron.megatron.bridge.state import Counters
from deadpool_megatron.megatron.lm import MegatronLM


def _config(**sections: Any) -> SimpleNamespace:
    """A ``ConfigContainer`` with what `refusals` looks at, all off."""
    off = {
        "dist": SimpleNamespace(use_decentralized_pg=False, lazy_mpu_init=None, eval_context_parallel_size=None),
        "train": SimpleNamespace(num_epochs=None),
        "validation": SimpleNamespace(skip_train=False),
        "dataset": SimpleNamespace(dataloader_type="single"),
        "logger": SimpleNamespace(log_energy=False),
        "checkpoint": SimpleNamespace(non_persistent_ckpt_type=None, custom_manager_class=None),
        "model": SimpleNamespace(),
        **dict.fromkeys(("peft", "straggler", "nvrx_straggler", "tensor_inspect")),
    }
    return SimpleNamespace(**{**off, **sections})


class EnergonDatasetConfig:
    dataloader_type = "external"


class OwnEnergon(EnergonDatasetConfig):
    pass


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({}, []),
        ({"model": SimpleNamespace(vision_cuda_graph_impl="none")}, []),
        ({"model": SimpleNamespace(vision_cuda_graph_impl="transformer_engine")}, ["model.vision_cuda_graph_impl"]),
        ({"dataset": EnergonDatasetConfig()}, ["dataset: EnergonDatasetConfig"]),
        ({"dataset": OwnEnergon()}, ["dataset: EnergonDatasetConfig"]),
    ],
)
def test_what_a_recovery_could_not_carry_is_refused_before_anything_is_built(
    sections: dict[str, Any], names: list[str]
) -> None:
    assert [name for name, _ in refusals(_config(**sections))] == names


class _State:
    """A ``GlobalState`` of which nothing but its counters is looked at."""

    def __init__(self) -> None:
        self.cfg = _config()
        self.train_state = SimpleNamespace(step=0, floating_point_operations_so_far=0)

        self._wandb_logger: Any = None

    def enters_train(self) -> None:
        self._flops_at_last_log = self.train_state.floating_point_operations_so_far


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> _State:
    from deadpool_megatron.megatron.bridge import state as module

    monkeypatch.setattr(module, "arguments", lambda state: {})
    return _State()


def test_the_count_of_operations_since_the_last_line_survives_two_losses_in_one_iteration(state: _State) -> None:
    """``train`` sets it at its entry; a generation is taken between that and the log."""
    counters = Counters(state)
    state.train_state.step, state.train_state.floating_point_operations_so_far = 4, 400
    state._flops_at_last_log = 300
    generation = counters.read(4)
    for _ in range(2):
        counters.write(generation)
        assert counters.read(4) == generation, "as it is compared after a recovery"
        state.enters_train()
        generation = counters.read(4)
        assert generation["_flops_at_last_log"] == 300
    counters.log_begins(goes_on=True)
    assert state._flops_at_last_log == 300
    state._flops_at_last_log = 500
    assert counters.read(5)["_flops_at_last_log"] == 500


def test_where_no_line_was_begun_before_a_loss_the_count_begins_as_train_says(state: _State) -> None:
    """A job that goes on from a checkpoint has trained before, and its first generation knows of no line."""
    counters = Counters(state)
    state.train_state.floating_point_operations_so_far = 400
    counters.write(counters.read(0))
    state.enters_train()
    counters.log_begins(goes_on=False)
    assert counters.read(0)["_flops_at_last_log"] == 400


def _host(state: _State) -> MegatronBridge:
    host = MegatronBridge()
    host._state = state
    return host


def test_a_run_in_a_logger_that_is_finished_is_left_and_none_begun_for_it(state: _State) -> None:
    state.cfg.logger.wandb_project, state._wandb_logger = "project", SimpleNamespace(run=object())
    _host(state)._leave_ended_run()
    assert state._wandb_logger is not None and state.cfg.logger.wandb_project == "project"
    state._wandb_logger.run = None
    _host(state)._leave_ended_run()
    assert state._wandb_logger is state.cfg.logger.wandb_project is None
    _host(state)._leave_ended_run()


def load_weights_hf_to_megatron(weights: Any, model: Any) -> Any:
    return model


def _freeze(model: Any) -> Any:
    return model


def test_a_spare_reads_no_weights_before_its_shard_comes(state: _State) -> None:
    """They are read in a hook of the model's provider, or of its config, and those that change the model stay."""
    teacher = SimpleNamespace(_pre_wrap_hooks=[partial(load_weights_hf_to_megatron, "teacher")])
    state.cfg.checkpoint.load = state.cfg.checkpoint.pretrained_checkpoint = "/some/checkpoint"
    state.cfg._checkpoint_load_required = True
    for name in ("pre_wrap_hooks", "_pre_wrap_hooks"):
        hooks = [partial(load_weights_hf_to_megatron, "model"), _freeze, partial(_freeze)]
        state.cfg.model = SimpleNamespace(**{name: hooks, "teacher": teacher})
        _host(state).load_nothing()
        assert getattr(state.cfg.model, name) is hooks and len(hooks) == 2 and hooks[0] is _freeze
    assert teacher._pre_wrap_hooks == [] and state.cfg.checkpoint.load is None


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a spare has done: what it has imported and, with the variables it had then, when its device came up."""
    done: list[str] = []
    monkeypatch.setattr(standby, "_import_all", lambda script: done.append(f"imports {script}"))
    monkeypatch.setattr(standby, "_bring_up", lambda host, whole: done.append(f"device {os.environ.get('TEST_LIMIT')}"))
    monkeypatch.setenv("TEST_LIMIT", "")  # and taken back at the end
    monkeypatch.delenv("TEST_LIMIT")
    monkeypatch.setenv("TEST_LAUNCHER", "launcher's")
    return done


ENVIRONMENT = {"TEST_LIMIT": "1", "TEST_LAUNCHER": "recipe's"}


def test_a_spares_device_comes_up_with_the_environment_of_the_job(order: list[str], state: _State) -> None:
    state.cfg.env_vars = {"TEST_LIMIT": 1, "TEST_LAUNCHER": "recipe's"}
    host = _host(state)
    assert host.environment() == ENVIRONMENT
    spare = WarmUp("script", host)
    spare.begin()
    assert order == ["imports script"]
    assert spare.learn(host.environment())
    assert order == ["imports script", "device 1"] and os.environ["TEST_LAUNCHER"] == "launcher's"


def test_a_spare_of_any_other_loop_is_as_warm_as_it_can_be_at_once(order: list[str]) -> None:
    spare = WarmUp("script", MegatronLM())
    spare.begin()
    assert order == ["imports script", "device None"] and not spare.learn(ENVIRONMENT) and len(order) == 2


def test_a_take_over_waits_for_a_device_that_comes_up_and_begins_no_other(
    order: list[str], state: _State, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may = threading.Event(), threading.Event()

    def bring_up(host: object, whole: bool) -> None:
        begun.set()
        may.wait()
        order.append("up")

    monkeypatch.setattr(standby, "_bring_up", bring_up)
    spare = WarmUp("script", _host(state))
    learns = threading.Thread(target=spare.learn, args=(ENVIRONMENT,))
    ends = threading.Thread(target=lambda: (spare.end(), order.append("taken over")))
    learns.start()
    begun.wait()
    ends.start()
    may.set()
    ends.join()
    learns.join()
    assert order == ["up", "taken over"] and not spare.learn(ENVIRONMENT) and len(order) == 2
