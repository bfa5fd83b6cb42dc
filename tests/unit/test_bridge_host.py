"""What of Megatron-Bridge is judged, reset and guarded, on objects shaped as its own; its own are in test_bridge.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from deadpool_megatron.megatron.bridge.settings import refusals


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
