"""CUDA emulated on the CPU, so that real Megatron runs on any machine: for tests, for the demo, never by itself.

`environment` imports neither torch nor Megatron; `install` imports torch, and patches Megatron when it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

__all__ = ["EmulationError", "environment", "find_transformer_engine", "has_transformer_engine", "install"]
__all__ += ["is_installed"]

_installed = False


class EmulationError(RuntimeError):
    """The emulation cannot be used here; the message is one line."""


def environment() -> dict[str, str]:
    """Variables for a process that trains under the emulation.

    torch.compile would compile for a device that is not there; one thread a process, since many share few cores;
    CUDA_DEVICE_MAX_CONNECTIONS is checked by Megatron; Triton's kernels run in Triton's interpreter; Transformer Engine
    looks for none of its libraries.
    """
    return {
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "NVTE_PROJECT_BUILDING": "1",
    }


def is_installed() -> bool:
    """True when this process runs under the emulation."""
    return _installed


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's Python is here, which Megatron's default implementation needs.

    Without its libraries it only fails where it is imported without the emulation, and Megatron with it. So it is
    looked for in a folder of its own too, ``emulation`` in the environment's prefix:

        pip install --no-deps --target PREFIX/emulation transformer-engine==2.20.2
    """
    return (_apart() / "transformer_engine").is_dir() or importlib.util.find_spec("transformer_engine") is not None


def find_transformer_engine() -> bool:
    """The same; a folder of its own joins ``sys.path``."""
    apart = str(_apart())
    if _apart().is_dir() and apart not in sys.path:
        sys.path.append(apart)
    return importlib.util.find_spec("transformer_engine") is not None


def _apart() -> Path:
    return Path(sys.prefix) / "emulation"


def install(*, force: bool = False) -> None:
    """Emulate CUDA in this process from now on. Must come before Megatron is imported; idempotent.

    Args:
        force: also where a real GPU is visible.

    Raises:
        EmulationError: a real GPU is visible and ``force`` is not set.
    """
    global _installed
    if _installed:
        return
    import os

    before = {name: os.environ.get(name) for name in environment()}
    os.environ.update(environment())  # before torch is imported: it reads some of them only then
    import torch

    if torch.cuda.is_available() and not force:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        raise EmulationError(
            f"{torch.cuda.device_count()} real GPU(s) are visible here: run without CPU emulation, or hide them with "
            "CUDA_VISIBLE_DEVICES="
        )
    from deadpool_megatron.emulation import (
        apex,
        children,
        collectives,
        deep_ep,
        device,
        graphs,
        kernel_packages,
        megatron,
        tensors,
        transformer_engine,
    )

    first = (device, tensors, collectives, deep_ep, children, graphs, megatron, apex)
    for part in (*first, kernel_packages, transformer_engine):
        part.install()
    _installed = True
