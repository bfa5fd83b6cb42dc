"""What Transformer Engine keeps from one iteration to the next outside of parameters, buffers and optimizers.

Only delayed scaling has such state: for each module and direction the scales and the history of amaxes of what it
casts. Current, blockwise, MXFP8 and NVFP4 scaling have none. Source: transformer_engine/pytorch/quantization.py,
DelayedScalingRecipeState and FP8GlobalStateManager.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch

from deadpool_megatron.compat import UserError

_DIRECTIONS: Final = ("scaling_fwd", "scaling_bwd")
_TENSORS: Final = ("scale", "amax_history")
# Where a module notes its place in the global buffer of what recomputation needs.
_RECOMPUTE_PLACE: Final = "global_fp8_buffer_pos_fwd_recompute"


def _is_delayed(config: Any) -> bool:
    return bool(getattr(config, "fp8", None)) and getattr(config, "fp8_recipe", None) == "delayed"


def prepare_scaling(model: list[Any], config: Any) -> None:
    """Make the scales and histories that the first forward pass would make, with the values it would give them.

    Raises UserError for attention in FP8, which has state of its own and has never been run.
    """
    for name in ("fp8_dot_product_attention", "fp8_multi_head_attention"):
        if getattr(config, name, False):
            raise UserError(f"{name} of the model's config is not supported with --deadpool yet; leave it out")
    if not _is_delayed(config):
        return
    import transformer_engine.pytorch as te
    from megatron.core.fp8_utils import get_fp8_context

    with torch.no_grad(), get_fp8_context(config):
        for chunk in model:
            for module in chunk.modules():
                if isinstance(module, te.Linear | te.LayerNormLinear):
                    module.init_fp8_metadata(num_gemms=1)
                elif isinstance(module, te.GroupedLinear):
                    module.init_fp8_metadata(num_gemms=module.num_gemms)
                elif isinstance(module, te.LayerNormMLP):
                    module.init_fp8_metadata(num_gemms=2)


def scaling_state(module: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Of one module: the name, and dictionary and key, of each tensor of its delayed scaling. They change in place."""
    meta = getattr(module, "fp8_meta", None) or {}
    for direction in _DIRECTIONS:
        state = vars(meta[direction]) if direction in meta else {}
        for key in _TENSORS:
            if isinstance(state.get(key), torch.Tensor):
                yield f"{direction}.{key}", state, key


def forget_recomputation(model: list[Any], config: Any) -> None:
    """Drop what the broken iteration's forward passes have put aside for their recomputation."""
    if not _is_delayed(config):
        return
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.quantization_state.fp8_tensors_recompute_buffer = []
    for chunk in model:
        for module in chunk.modules():
            getattr(module, "fp8_meta", {}).pop(_RECOMPUTE_PLACE, None)


def is_quantized(tensor: torch.Tensor) -> bool:
    """A tensor of Transformer Engine whose data are FP8 or FP4: parameters (``--fp8-param-gather``), moments."""
    return hasattr(tensor, "_quantizer")


def plain_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor itself, or the data and scales of a quantized one.

    They are updated in place. The transposed copy of FP8 data is left out: it is made from them when it is needed.
    """
    if not is_quantized(tensor):
        yield "", tensor
        return
    fields: dict[str, object] = tensor.get_metadata()
    for name, value in sorted(fields.items()):
        if isinstance(value, torch.Tensor) and name != "data_transpose":
            yield f".{name}", value
