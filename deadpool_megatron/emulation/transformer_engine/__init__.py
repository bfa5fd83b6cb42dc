"""The real Python of Transformer Engine on the CPU: its compiled module ``transformer_engine_torch``, in torch."""

from __future__ import annotations

import functools
import os
import sys
from types import ModuleType
from typing import Any

from deadpool_megatron.emulation import find_transformer_engine
from deadpool_megatron.emulation.importing import after_import


def install() -> None:
    """Let Transformer Engine find the emulated extension, where it is installed. Before it or Megatron is imported."""
    if not find_transformer_engine():
        return
    # NVTE_PROJECT_BUILDING, of `emulation.environment`, leaves out the checks of the installed wheels and the loading
    # of cuDNN, cuBLAS and libtransformer_engine.so.
    os.environ.pop("NVTE_RELEASE_BUILD", None)  # undoes that
    after_import("transformer_engine.common", _loads_nothing)
    after_import("transformer_engine.pytorch.utils", _keeps_memory)
    after_import("transformer_engine.pytorch.triton.permutation", _permutes)
    after_import("transformer_engine.pytorch.graph", _first_replay_runs)
    after_import("triton.runtime.autotuner", _tunes_nothing)
    for way in ("forward", "backward"):
        change = functools.partial(_is_on_a_device, way=way)
        after_import(f"transformer_engine.pytorch.ops.fused.userbuffers_{way}_linear", change)
    from deadpool_megatron.emulation.transformer_engine import attention, extension

    after_import(
        "transformer_engine.pytorch.attention.dot_product_attention.utils", attention.keep_scales_beside_the_data
    )
    sys.modules["transformer_engine_torch"] = extension


def _loads_nothing(module: ModuleType) -> None:
    # It looks for the compiled file and puts what it finds there into sys.modules.
    module.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]


def _keeps_memory(module: ModuleType) -> None:
    """Tensors by their address alone, so that graphs do not keep their memory: here graphs may keep it."""
    import torch

    def make_weak_ref(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.detach()
        if isinstance(x, tuple | list):
            return type(x)(make_weak_ref(each) for each in x)
        if isinstance(x, dict):
            return {key: make_weak_ref(value) for key, value in x.items()}
        return x

    module.make_weak_ref = make_weak_ref  # type: ignore[attr-defined]


def _permutes(module: ModuleType) -> None:
    from deadpool_megatron.emulation.transformer_engine import permutation

    permutation.replace(module)


def _first_replay_runs(module: Any) -> None:
    """Transformer Engine captures with samples, whose results nobody wants: the first replay has everything to do."""
    from deadpool_megatron.emulation import graphs

    native = module._make_graphed_callables

    @functools.wraps(native)
    def make(*args: Any, **kwargs: Any) -> Any:
        with graphs.captured_with_samples():
            return native(*args, **kwargs)

    module._make_graphed_callables = make


def _is_on_a_device(module: Any, way: str) -> None:
    """The fuser's operations with userbuffers look at the type of the device."""
    import torch

    kind, name = getattr(module, f"Userbuffers{way.title()}Linear"), f"_functional_{way}"
    native = getattr(kind, name)

    @functools.wraps(native)
    def on_a_device(*args: Any, **kwargs: Any) -> Any:
        return native(*args, **kwargs | {"device": torch.device("cuda")})

    setattr(kind, name, staticmethod(on_a_device))


def _tunes_nothing(module: Any) -> None:
    """An autotuner measures its configurations on a device; here the last one is taken."""
    launch = ("num_warps", "num_stages", "num_ctas", "maxnreg")

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = {key: value for key, value in self.configs[-1].all_kwargs().items() if key not in launch}
        return self.fn.run(*args, **kwargs, **chosen)

    module.Autotuner.run = run
