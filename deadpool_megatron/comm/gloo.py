"""Gloo backends for one epoch: one device (event loop, listener) shared by all groups of the epoch."""

import os
from datetime import timedelta
from typing import Any

from deadpool_megatron.comm.connections import GlooConnections, GlooDevice
from deadpool_megatron.comm.inplace import bindings
from deadpool_megatron.comm.table import GroupRecord


def create_devices(connections: GlooConnections) -> tuple[list[Any], frozenset[GlooDevice]]:
    """Gloo devices as torch itself would choose them (GLOO_SOCKET_IFNAME, else the address of the host name), and what
    they are to `connections`."""
    gloo = bindings.ProcessGroupGloo
    with connections.watching() as fresh:
        if names := os.environ.get("GLOO_SOCKET_IFNAME"):
            devices = [gloo.create_device(interface=name) for name in names.split(",") if name]
        else:
            devices = [gloo.create_default_device()]
    return devices, frozenset(fresh)


def build(
    record: GroupRecord, store: Any, rank: int, devices: list[Any], form_timeout_s: float, operation_timeout_s: float
) -> Any:
    """A connected ProcessGroupGloo of this group. Blocks until all members have come, `form_timeout_s` at most.

    Raises RuntimeError (torch's) on time-out or when a member is lost while connecting.
    """
    gloo = bindings.ProcessGroupGloo
    options = gloo._Options()
    options._devices = devices
    options._timeout = timedelta(seconds=form_timeout_s)
    backend = gloo(store, rank, len(record.ranks), options)
    set_operation_timeout(backend, operation_timeout_s)
    backend.options.global_ranks_in_group = list(record.ranks)
    backend.options.group_name = record.name
    backend._set_sequence_number_for_group()
    return backend


def set_operation_timeout(backend: Any, seconds: float) -> None:
    """Time-out of each later operation: the floor under everything that abort cannot free."""
    backend._set_default_timeout(timedelta(seconds=seconds))
