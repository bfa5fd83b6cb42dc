"""What of Megatron-Bridge is judged, reset and guarded, on objects shaped as its own; its own are in test_bridge.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from deadpool_megatron.megatron.bridge.settings import refusals
from deadpool_megatron.megatron.bridge.state import Counters


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
