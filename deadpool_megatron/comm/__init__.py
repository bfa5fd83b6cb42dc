"""Communicators that can be aborted from another thread and re-formed in place under a new epoch.

Knows none of our other packages. `Communicators.install` before `init_process_group`; then Megatron makes its groups
as ever.
"""

from deadpool_megatron.comm.communicators import Communicators
from deadpool_megatron.comm.nccl import warm_up
from deadpool_megatron.comm.reports import (
    AbortReport,
    CommunicatorAborted,
    CommunicatorError,
    ReformError,
    ReformReport,
    is_communication_error,
)

__all__ = [
    "AbortReport",
    "CommunicatorAborted",
    "CommunicatorError",
    "Communicators",
    "ReformError",
    "ReformReport",
    "is_communication_error",
    "warm_up",
]
