"""Communicators that can be aborted from another thread and re-formed in place under a new epoch.

Knows none of our other packages. `Communicators.install` before `init_process_group`; then Megatron makes its groups
as ever.
"""

from deadpool_megatron.comm.communicators import Communicators
from deadpool_megatron.comm.nccl import warm_up
from deadpool_megatron.comm.reports import ReformError, is_communication_error
from deadpool_megatron.comm.store_clients import StoreClients

__all__ = ["Communicators", "ReformError", "StoreClients", "is_communication_error", "warm_up"]
