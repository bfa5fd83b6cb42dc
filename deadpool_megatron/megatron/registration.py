"""Buffers of parameters and gradients are registered with no communicator, ``--use-nccl-ub`` or not.

Upstream registers them where the model is built, by collectives over the data-parallel group, in which a spare would be
alone. A registration is gone with its communicator, and (so `megatron.training` says where it deregisters its pools) an
abort of one with symmetric windows, which Megatron makes, ends the process: each recovery would. It spares NCCL copies
and multiprocessors, and is no part of what is computed.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


def register_nothing(module: Any) -> None:
    """Wrap what makes the buffers in Megatron's ``param_and_grad_buffer``."""
    kind = module._ParamAndGradBuffer
    native = kind.__init__
    signature = inspect.signature(native)

    @functools.wraps(native)
    def init(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.arguments["nccl_ub"] = False
        native(*given.args, **given.kwargs)

    kind.__init__ = init
