"""What Transformer Engine keeps from one iteration to the next outside of parameters, buffers and optimizers.

Only delayed scaling has such state: for each module and direction the scales and the history of amaxes of what it
casts. Current, blockwise, MXFP8 and NVFP4 scaling have none. Source: transformer_engine/pytorch/quantization.py,
DelayedScalingRecipeState and FP8GlobalStateManager.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, Final

import torch

from deadpool_megatron.compat import UserError

_DIRECTIONS: Final = ("scaling_fwd", "scaling_bwd")
_TENSORS: Final = ("scale", "amax_history")
# Where a module notes its place in the global buffers of what is reduced.
_REDUCED: Final = "buffer_index_and_autocast_key"
_ATTENTION: Final = "NVTE_DPA_FP8_RECIPE"  # the recipe of attention, where it is not that of the linear layers
_OLD_FLAG: Final = "IS_FIRST_FP8_MODULE"
# Where a module notes its place in the global buffer of what recomputation needs.
_RECOMPUTE_PLACE: Final = "global_fp8_buffer_pos_fwd_recompute"


def _is_delayed(config: Any) -> bool:
    return bool(getattr(config, "fp8", None)) and getattr(config, "fp8_recipe", None) == "delayed"


def _scaled_attention(config: Any) -> bool:
    """Attention in FP8 has delayed scaling of its own, for the scores at least. Only where it is MXFP8, or none, it has
    not. Source: `init_fp8_metadata` of transformer_engine/pytorch/attention/dot_product_attention."""
    if not config.fp8 and not getattr(config, "fp4", None):
        return False
    recipe = os.environ.get(_ATTENTION) or (config.fp8_recipe if config.fp8 else None)
    return recipe not in ("mxfp8", "MXFP8BlockScaling", "F16")


def prepare_scaling(model: list[Any], config: Any) -> list[tuple[str, Any]]:
    """Make the scales and histories that the first forward pass would make, with the values it would give them.

    Returns the modules that have them, by name. Raises UserError for attention in FP8 that has some of its own, and for
    recipes of single modules that may.
    """
    for name in ("fp8_dot_product_attention", "fp8_multi_head_attention"):
        if getattr(config, name, False) and _scaled_attention(config):
            raise UserError(
                f"{name} of the model's config is supported with --deadpool in MXFP8 only, where it keeps no scales; "
                "leave it out"
            )
    modules = getattr(getattr(config, "quant_recipe", None), "configs", {})
    if "custom" in str(modules):
        raise UserError(
            "--te-precision-config-file with custom recipes is not supported with --deadpool yet: their quantizers may "
            "have state that nobody else knows of; leave them out"
        )
    if not _is_delayed(config):
        return []
    import transformer_engine.pytorch as te
    from megatron.core.fp8_utils import get_fp8_context

    scaled = []
    with torch.no_grad(), get_fp8_context(config):
        for c, chunk in enumerate(model):
            for name, module in chunk.named_modules():
                if isinstance(module, te.Linear | te.LayerNormLinear):
                    module.init_fp8_metadata(num_gemms=1)
                elif isinstance(module, te.GroupedLinear):
                    module.init_fp8_metadata(num_gemms=module.num_gemms)
                elif isinstance(module, te.LayerNormMLP):
                    module.init_fp8_metadata(num_gemms=2)
                elif isinstance(module, te.DotProductAttention):  # not used without attention in FP8, but reduced
                    module.init_fp8_metadata(num_gemms=3)
                else:
                    continue
                scaled.append((f"{c}.{name}", module))
    return scaled


def registered(scaled: list[tuple[str, Any]]) -> list[str]:
    """The modules whose amaxes are reduced at the end of each FP8 context, in the order in which they are laid out.

    A module is registered at its first forward pass. A spare has done none, and would reduce fewer than the survivors.
    Raises UserError for one that `prepare_scaling` does not know.
    """
    state = _global_state()
    if state is None or not scaled:
        return []
    places = [(module.fp8_meta[_REDUCED][0], name) for name, module in scaled if module.fp8_meta.get(_REDUCED)]
    buffers = state.global_amax_buffer
    if sum(len(amaxes) for key, amaxes in buffers.items() if key.startswith("forward")) != len(places):
        raise UserError(
            "a module that is none of Transformer Engine's layers has delayed scaling of FP8, which is not supported "
            "with --deadpool yet; use another --fp8-recipe"
        )
    return [name for _, name in sorted(places)]


def register(scaled: list[tuple[str, Any]], names: list[str]) -> None:
    """Make `registered` what it was."""
    state = _global_state()
    if state is None or not scaled:
        return
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    for buffers in (state.global_amax_buffer, state.global_amax_history_buffer, state.global_scale_buffer):
        buffers.clear()
    by_name = dict(scaled)
    for module in by_name.values():
        module.fp8_meta.pop(_REDUCED, None)
    for name in names:
        FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(by_name[name].fp8_meta)


def scaling_state(module: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Of one module: the name, and dictionary and key, of each tensor of its delayed scaling. They change in place."""
    meta = getattr(module, "fp8_meta", None) or {}
    for direction in _DIRECTIONS:
        state = getattr(meta.get(direction), "__dict__", {})
        for key in _TENSORS:
            if isinstance(state.get(key), torch.Tensor):
                yield f"{direction}.{key}", state, key


def _global_state() -> Any:
    """Transformer Engine's state of this process; None where it has not been imported."""
    if "transformer_engine.pytorch" not in sys.modules:
        return None
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    # The class itself has the fields up to 2.14 (there in other letters), an instance later on.
    return getattr(FP8GlobalStateManager, "quantization_state", FP8GlobalStateManager)


def _flag_of(state: Any) -> str:
    return "is_first_fp8_module" if isinstance(getattr(state, "is_first_fp8_module", None), bool) else _OLD_FLAG


def first_module() -> bool | None:
    """Whether the next module counts as the first in FP8, which then reduces amaxes in its backward pass.

    A layer outside of any FP8 context (the last norm) finds what the one before it has left: False in a new process,
    True after its first forward pass. So it is state: a spare that began with False would leave out a collective.
    """
    state = _global_state()
    return None if state is None else bool(getattr(state, _flag_of(state)))


def put_first_module(value: bool | None) -> None:
    """Make it what `first_module` was."""
    state = _global_state()
    if state is not None and value is not None:
        setattr(state, _flag_of(state), value)


def forget_broken_step(model: list[Any]) -> None:
    """Drop what the passes of a broken iteration have put aside for later ones of the same iteration.

    That is, by Transformer Engine: for recomputation, whether a module was the first in FP8, and the scales of delayed
    scaling; with ``--delay-wgrad-compute``, the weight gradients still to be computed.
    """
    state = _global_state()
    if state is None:
        return
    from transformer_engine.pytorch.distributed import activation_recompute_forward

    activation_recompute_forward._is_first_fp8_module.clear()
    state.fp8_tensors_recompute_buffer.clear()
    for chunk in model:
        for module in chunk.modules():
            getattr(module, "fp8_meta", {}).pop(_RECOMPUTE_PLACE, None)
            waiting = getattr(getattr(module, "wgrad_store", None), "context", None)
            while waiting is not None and not waiting.empty():
                waiting.get()


def is_quantized(tensor: torch.Tensor) -> bool:
    """A tensor of Transformer Engine whose data are FP8 or FP4: parameters (``--fp8-param-gather``), moments."""
    return hasattr(tensor, "_quantizer")


def plain_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor itself, or the data and scales of a quantized one.

    They are updated in place. Copies for the other direction are left out, which follow from the same main parameters,
    and so is what scales are padded with.
    """
    if not is_quantized(tensor):
        yield "", tensor
        return
    fields: dict[str, Any] = tensor.get_metadata()
    data = fields.get("rowwise_data")
    for name, value in sorted(fields.items()):
        if not isinstance(value, torch.Tensor) or name == "data_transpose":
            continue
        if data is None:
            yield f".{name}", value
        elif not name.startswith("columnwise"):
            yield f".{name}", _without_padding(value, data, type(tensor).__name__) if "scale" in name else value


def _without_padding(scales: torch.Tensor, data: torch.Tensor, kind: str) -> torch.Tensor:
    """Scales are padded for the device's sake, with whatever was in memory there."""
    columns = data.shape[-1]
    rows = data.numel() // max(1, columns)
    if kind.startswith("MXFP8"):
        return scales[:rows, : columns // 32]
    if kind.startswith("NVFP4"):
        return scales[:rows, : columns * 2 // 16]
    return scales[: -(-rows // 128), : -(-columns // 128)]  # 128 x 128 elements, as weights have them
