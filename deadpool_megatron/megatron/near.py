"""Where a worker's device is, so that its shards can lie near it."""

from __future__ import annotations

import torch

from deadpool_megatron import emulation
from deadpool_megatron.vault import numa_node_of_device, numa_node_of_process


def numa_node() -> int:
    """The NUMA node of this rank's device, or of the processors this process is bound to; -1 when neither says one."""
    if torch.cuda.is_available() and not emulation.is_installed():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        at = [int(getattr(device, name, -1)) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
        node = numa_node_of_device(f"{at[0]:04x}:{at[1]:02x}:{at[2]:02x}.0") if min(at) >= 0 else -1
        if node >= 0:
            return node
    return numa_node_of_process()
