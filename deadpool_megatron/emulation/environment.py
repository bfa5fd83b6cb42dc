"""Environment variables that go with the emulation."""

from __future__ import annotations


def environment() -> dict[str, str]:
    """Variables for a process that trains under the emulation.

    torch.compile would compile for a device that is not there; one thread a process, since many share few cores;
    CUDA_DEVICE_MAX_CONNECTIONS is checked by Megatron.
    """
    return {"TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
