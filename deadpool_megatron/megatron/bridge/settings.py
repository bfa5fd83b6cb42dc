"""A run of Megatron-Bridge by the names that Megatron-LM has for its settings, and what of it cannot be carried.

Bridge keeps settings in a ``ConfigContainer``, a dataclass of dataclasses whose fields mostly have the names of
Megatron-LM's flags, and counters in a ``TrainState``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from deadpool_megatron.compat import UserError

# Parts of the container; what two of them name alike means the same.
_SECTIONS: Final = (
    *("rng", "tokenizer", "dataset", "scheduler", "profiling", "logger", "checkpoint", "validation", "train"),
    *("dist", "ddp", "optimizer", "rerun_state_machine", "model"),
)

type _Refusal = tuple[str, Callable[[Any], Any], str]
# Of the container: a setting as a user writes it, whether it is on, and why it is refused. What Megatron-LM has too is
# in `support`.
_REFUSED: Final[tuple[_Refusal, ...]] = (
    (
        "dist.use_decentralized_pg",
        lambda cfg: cfg.dist.use_decentralized_pg,
        "its process groups are none of parallel_state's",
    ),
    ("dist.lazy_mpu_init", lambda cfg: cfg.dist.lazy_mpu_init, "somebody else makes the process groups"),
    (
        "dist.eval_context_parallel_size",
        lambda cfg: cfg.dist.eval_context_parallel_size,
        "evaluation gets process groups of its own; never run",
    ),
    ("peft", lambda cfg: cfg.peft, "a spare would read the checkpoint of the base model; never run"),
    (
        "model.restore_modelopt_state",
        lambda cfg: getattr(cfg.model, "restore_modelopt_state", False),
        "a spare would read the state of Model Optimizer out of a checkpoint; never run",
    ),
    ("train.num_epochs", lambda cfg: cfg.train.num_epochs, "data sets are built in another place; never run"),
    ("validation.skip_train", lambda cfg: cfg.validation.skip_train, "nothing is trained"),
    (
        "dataset.dataloader_type: batch",
        lambda cfg: cfg.dataset.dataloader_type == "batch",
        "batches of fine-tuning have lengths of their own; never run",
    ),
    (
        "dataset: EnergonDatasetConfig",
        lambda cfg: any(each.__name__ == "EnergonDatasetConfig" for each in type(cfg.dataset).__mro__),
        "its loader keeps a position of its own, which a spare could not take up",
    ),
    (
        "model.vision_cuda_graph_impl",
        lambda cfg: getattr(cfg.model, "vision_cuda_graph_impl", "none") not in ("none", None),
        "a recovery does not drop graphs of the vision encoder; never run",
    ),
    ("straggler", lambda cfg: cfg.straggler and cfg.straggler.log_straggler, "never run"),
    (
        "nvrx_straggler",
        lambda cfg: cfg.nvrx_straggler and cfg.nvrx_straggler.enabled,
        "its collectives are not known to end with a lost node",
    ),
    ("logger.log_energy", lambda cfg: cfg.logger.log_energy, "its sums are those of one process"),
    ("tensor_inspect", lambda cfg: cfg.tensor_inspect and cfg.tensor_inspect.enabled, "it keeps state of its own"),
    (
        "checkpoint.non_persistent_ckpt_type",
        lambda cfg: cfg.checkpoint.non_persistent_ckpt_type,
        "its copies are looked for by collectives; never run",
    ),
    ("checkpoint.custom_manager_class", lambda cfg: cfg.checkpoint.custom_manager_class, "never run"),
    ("model: MegatronMIMOProvider", lambda cfg: "MIMO" in type(cfg.model).__name__, "another training loop"),
)


def refusals(cfg: Any) -> list[tuple[str, str]]:
    """Settings of Bridge's own, of a container, that are not supported, and why."""
    return [(name, why) for name, is_on, why in _REFUSED if is_on(cfg)]


def check(cfg: Any) -> None:
    """Raises UserError that names the settings of Bridge's own that are not supported."""
    found = [f"{name} ({why})" for name, why in refusals(cfg)]
    if found:
        raise UserError(
            f"not supported with --deadpool in Megatron-Bridge yet: {', '.join(found)}; leave it out, or run without "
            "--deadpool"
        )


def arguments(state: Any) -> dict[str, Any]:
    """Of a ``GlobalState``: settings and counters of now, by the names of Megatron-LM's ``args``."""
    at = state.train_state
    return values(state.cfg) | {
        **vars(at),
        "iteration": at.step,
        "num_floating_point_operations_so_far": at.floating_point_operations_so_far,
    }


def values(cfg: Any) -> dict[str, Any]:
    """Settings of a container, as set-up leaves it, by the names of Megatron-LM's ``args``."""
    out: dict[str, Any] = {}
    for section in _SECTIONS:
        out |= vars(getattr(cfg, section))
    out |= vars(getattr(cfg.model, "transformer", cfg.model))  # model configs have it apart, providers not
    straggler = cfg.straggler
    return out | {
        "world_size": int(os.environ["WORLD_SIZE"]),
        "data_parallel_size": cfg.data_parallel_size,
        "padded_vocab_size": out.get("vocab_size"),
        "num_experts": out.get("num_moe_experts"),
        "swiglu": out.get("gated_linear_unit"),
        "untie_embeddings_and_output_weights": not out.get("share_embeddings_and_output_weights", False),
        "cpu_offloading_num_layers": out.get("cpu_offloading_num_layers") if out.get("cpu_offloading") else 0,
        "num_layers_per_virtual_pipeline_stage": out.get("virtual_pipeline_model_parallel_size"),
        "te_precision_config_file": out.get("quant_recipe") is not None,
        "use_megatron_fsdp": cfg.ddp.use_megatron_fsdp or cfg.dist.use_megatron_fsdp,
        "inprocess_restart": bool(cfg.inprocess_restart and cfg.inprocess_restart.enabled),
        "enable_ft_package": bool(cfg.ft and cfg.ft.enable_ft_package),
        "log_straggler": bool(straggler and straggler.log_straggler),
        "disable_straggler_on_startup": bool(straggler and straggler.disable_straggler_on_startup),
    }
