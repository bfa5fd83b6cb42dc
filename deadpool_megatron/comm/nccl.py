"""NCCL backends: abort from another thread, new ones with the old options. Written from torch's sources; see
docs/measurements for what of it was run on GPUs."""

import logging
import os
import threading
import time
from typing import Any

import torch

from deadpool_megatron.comm.inplace import bindings
from deadpool_megatron.comm.table import GroupRecord

_log = logging.getLogger(__name__)

NCCL_ENVIRONMENT = {
    # An aborted communicator must not take the process with it: errors are handled here, not by the watchdog.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    # No flight-recorder dump on time-out, and no minute of sleep in the watchdog to wait for one.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
    # Re-forming with NVLS multicast objects of a dead peer is not possible.
    "NCCL_NVLS_ENABLE": "0",
}


def nccl_environment() -> dict[str, str]:
    """Variables that must be in the environment before the first NCCL communicator."""
    return dict(NCCL_ENVIRONMENT)


def set_environment() -> None:
    """Put `nccl_environment` into this process's environment, whatever the job's script exports; the log has a line for
    what it overrides. Each NCCL group reads it when it is made."""
    for name, value in NCCL_ENVIRONMENT.items():
        before = os.environ.get(name, value)
        if before != value:
            _log.warning("%s=%s is overridden with %s: a communicator could not be aborted", name, before, value)
        os.environ[name] = value


def abort_all(backends: list[Any], deadline: float) -> tuple[int, int]:
    """Abort every backend in a thread of its own (serial aborts can wait for one another across ranks), never
    shutdown or destroy: those wait for peers. Blocks until `deadline` (`time.monotonic`) at most.

    Returns (aborted, still at it); the latter go on in their threads.
    """
    threads = [threading.Thread(target=backend.abort, name="deadpool-nccl-abort", daemon=True) for backend in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    stuck = sum(thread.is_alive() for thread in threads)
    return len(threads) - stuck, stuck


def options_for(record: GroupRecord) -> Any:
    """Fresh ProcessGroupNCCL.Options with what the group's creator asked for: stream priority, config, time-out."""
    options = bindings.ProcessGroupNCCL.Options()
    asked = record.options
    if asked is not None:
        options.is_high_priority_stream = asked.is_high_priority_stream
        options.config = asked.config
    options._timeout = record.timeout
    options.global_ranks_in_group = list(record.ranks)
    options.group_name = record.name
    return options


def build(record: GroupRecord, store: Any, rank: int, device: torch.device | None) -> Any:
    """A ProcessGroupNCCL for this group, its communicator connected now if `device` is given (else at first use).
    Connecting blocks until all members have come."""
    backend = bindings.ProcessGroupNCCL(store, rank, len(record.ranks), options_for(record))
    backend._set_sequence_number_for_group()
    if device is not None:
        backend.bound_device_id = device
        backend.eager_connect_single_device(device)
    return backend
