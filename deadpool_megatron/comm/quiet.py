"""Which groups have nothing under way, so that an abort may leave their connections alone and an epoch may keep them.

A Gloo group is quiet on this rank when no collective is queued or in progress, no point-to-point operation was ever
begun on its connections (one that is not waited for yet cannot be seen; its count can: torch counts it as an operation
but gives it no collective tag), and all its connections are up on both ends.

A group that is quiet on all members, with equal counts, has nothing in flight: Gloo's k-th collective on one member is
the k-th on all, a member's part is over only when all it has to receive has arrived, and all of them are over on all
members. No old byte can reach a later operation then.
"""

from collections.abc import Set as AbstractSet
from datetime import timedelta

import torch

from deadpool_megatron.comm.connections import GlooConnections
from deadpool_megatron.comm.inplace import bindings
from deadpool_megatron.comm.release import Release
from deadpool_megatron.comm.table import GroupRecord, backend_of

_PROOF = 3  # collectives of the self-test


class Quiet:
    """Looks at groups from any thread, without a lock.

    `available` is False where torch's counters cannot be read, or keeping groups is not ``wanted``.
    """

    def __init__(self, release: Release, connections: GlooConnections, wanted: bool = True) -> None:
        self._wanted = wanted
        self._release = release
        self._connections = connections
        self.available = wanted and release.available and self._counters_are_understood()

    def _counters_are_understood(self) -> bool:
        """Self-test on a throw-away backend."""
        gloo = bindings.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=10)
        options._threads = 1
        try:
            backend = gloo(bindings.HashStore(), 0, 1, options)
            seen = [self._release.operations(backend)]
            for _ in range(_PROOF):
                backend.allreduce([torch.ones(1)]).wait()
                seen.append(self._release.operations(backend))
        except RuntimeError:
            return False
        return seen == [(n, n) for n in range(_PROOF + 1)]

    def against(self, record: GroupRecord, established: AbstractSet[int]) -> str:
        """Why this rank cannot keep the group as it is; "" when it can. `established`: connections that are up."""
        if not record.real:
            return "spare"
        if set(record.backend_of_device.values()) != {"gloo"}:
            return "not Gloo"
        if not self.available:
            return "counters unknown" if self._wanted else "not wanted"
        backend = backend_of(record, "gloo")
        counts = self._release.operations(backend)
        if counts is None or counts[0] != counts[1]:
            return "point-to-point"
        if self._release.busy(backend) != set():
            return "busy"
        # Exactly: a socket of a connection attempt given up, or of another group, may be among those that were noted.
        if len(record.connections & established) != (len(record.ranks) - 1) * len(record.devices):
            return "disconnected"
        return ""

    def operations(self, record: GroupRecord) -> int:
        """Operations begun on a group that nothing stands against."""
        counts = self._release.operations(backend_of(record, "gloo"))
        return counts[0] if counts else -1
