"""The functions that `multi_tensor_applier` calls: (chunk size, no-op flag, lists of tensors, further arguments).

Sources: transformer_engine/pytorch/csrc/extensions/multi_tensor/*.cpp and common/multi_tensor/adam.cu. All compute in
float32 and write each result in the type of its tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deadpool_megatron.emulation.transformer_engine.formats import to_fp8
from deadpool_megatron.emulation.transformer_engine.kernels import kernel, offer

Lists = Sequence[Sequence[Tensor]]
_ADAM_W = 1


class _Adam(NamedTuple):
    """One step's settings, in the order in which the kernels take them."""

    lr: float
    beta1: float
    beta2: float
    epsilon: float
    step: int
    mode: int
    bias_correction: bool | int
    weight_decay: float

    def updated(self, grad: Tensor, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
        """The new parameter in float32; the moments are written."""
        g, p = grad.float(), param.float()
        if self.mode != _ADAM_W:
            g = g + self.weight_decay * p
        m = self.beta1 * exp_avg.float() + (1 - self.beta1) * g
        v = self.beta2 * exp_avg_sq.float() + (1 - self.beta2) * g * g
        first = 1 - self.beta1**self.step if self.bias_correction else 1.0
        second = 1 - self.beta2**self.step if self.bias_correction else 1.0
        change = (m / first) / ((v / second).sqrt() + self.epsilon)
        if self.mode == _ADAM_W:
            change = change + self.weight_decay * p
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        return p - self.lr * change


@kernel
def multi_tensor_adam(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, *settings: float) -> None:
    """Lists: gradients, parameters, first and second moments, and main parameters or nothing."""
    adam = _Adam(*settings)  # type: ignore[arg-type]
    for grad, param, exp_avg, exp_avg_sq, *main in zip(*tensor_lists, strict=True):
        new = adam.updated(grad, main[0] if main else param, exp_avg, exp_avg_sq)
        for each in (param, *main):
            each.copy_(new)


@kernel
def multi_tensor_adam_param_remainder(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, *settings: float
) -> None:
    """Lists: gradients, BF16 parameters, moments, and the lower 16 bits (int16) of the float32 main parameters.

    The upper bits are the parameter, rounded: a negative remainder has taken one from above.
    """
    adam = _Adam(*settings)  # type: ignore[arg-type]
    for grad, param, exp_avg, exp_avg_sq, remainder in zip(*tensor_lists, strict=True):
        low = remainder.int()
        high = param.view(torch.int16).int() - (low < 0).int()
        main = ((high << 16) | (low & 0xFFFF)).view(torch.float32)
        new = adam.updated(grad, main, exp_avg, exp_avg_sq).view(torch.int32)
        low = (new & 0xFFFF).to(torch.int16)
        param.view(torch.int16).copy_(((new >> 16) + (low < 0).int()).to(torch.int16))
        remainder.copy_(low)


@kernel
def multi_tensor_adam_fp8(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, *settings: float) -> None:
    """Lists: gradients, FP8 parameters (bytes), moments, main parameters, scales, amaxes, inverse scales."""
    *numbers, dtype = settings
    adam = _Adam(*numbers)  # type: ignore[arg-type]
    for grad, param, exp_avg, exp_avg_sq, main, scale, amax, scale_inv in zip(*tensor_lists, strict=True):
        new = adam.updated(grad, main, exp_avg, exp_avg_sq)
        main.copy_(new)
        amax.copy_(torch.maximum(amax, new.abs().amax()))
        param.copy_(to_fp8(new * scale, int(dtype)))
        scale_inv.copy_(1 / scale)


@kernel
def multi_tensor_adam_capturable_master(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: Tensor,
) -> None:
    """As `multi_tensor_adam`, with a gradient scale that is undone in place; a set no-op flag skips the step."""
    if bool(noop_flag.any()):
        return
    for grad in tensor_lists[0]:
        grad.copy_(grad.float() * inv_scale)
    settings = (float(lr), beta1, beta2, epsilon, int(step), mode, bias_correction, weight_decay)
    multi_tensor_adam(chunk_size, noop_flag, tensor_lists, *settings)


offer("multi_tensor_adam_capturable", multi_tensor_adam_capturable_master)


@kernel
def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: float | Tensor) -> None:
    """Lists: sources, targets. What is not finite sets the flag."""
    for source, target in zip(*tensor_lists, strict=True):
        value = source.float() * scale
        if not bool(torch.isfinite(value).all()):
            noop_flag.fill_(1)
        target.copy_(value)


offer("multi_tensor_scale_tensor", multi_tensor_scale)


@kernel
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors together, (1,), and those of each or nothing. What is not finite sets the flag."""
    norms = torch.stack([torch.linalg.vector_norm(each.float()) for each in tensor_lists[0]])
    if not bool(torch.isfinite(norms).all()):
        noop_flag.fill_(1)
    return torch.linalg.vector_norm(norms).reshape(1), (norms if per_tensor else torch.empty(0))


@kernel
def multi_tensor_unscale_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, inv_scale: Tensor, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    scaled = [[each.float() * inv_scale for each in tensor_lists[0]]]
    answer: tuple[Tensor, Tensor] = multi_tensor_l2norm(chunk_size, noop_flag, scaled, per_tensor)
    return answer
