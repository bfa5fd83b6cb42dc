"""Machines that names of recipes say, where no file says what a cluster has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# Fields of `Cluster`, by NVIDIA's data sheets: dense BF16; host memory and network of a DGX or HGX node, for the GBs
# of a compute tray with four devices; adapters of 400 Gb/s, 800 for the 300s, one a device. The utilisation is assumed.
_MACHINES: Final[Mapping[str, Mapping[str, float]]] = {
    "h100": {"gpu_memory": 80, "host_memory": 2048, "pcie": 50, "network": 400, "tflops": 989},
    "b200": {"gpu_memory": 180, "host_memory": 2048, "pcie": 50, "network": 400, "tflops": 2250},
    "b300": {"gpu_memory": 270, "host_memory": 2048, "pcie": 100, "network": 800, "tflops": 2250},
    "gb200": {"gpu_memory": 186, "host_memory": 960, "pcie": 200, "network": 200, "tflops": 2500},
    "gb300": {"gpu_memory": 279, "host_memory": 960, "pcie": 200, "network": 400, "tflops": 2500},
}
_UTILISATION: Final = 0.4
USUAL: Final = "h100"


def machine(name: str) -> dict[str, Any] | None:
    """What one has, for the section ``cluster`` of a run's file; None where it is not known here."""
    known = _MACHINES.get(name)
    return None if known is None else {**known, "utilisation": _UTILISATION}
