"""Connections of their own between the ranks of a group, for kernels that go past the process groups of torch.

As on a device nothing aborts such a kernel, and one whose peer launches none waits for it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_WAITS = timedelta(minutes=30)
_PATH_BYTES = 256
# Of before anybody wraps them: a library calls these from C++.
_wait = torch._C._distributed_c10d.Work.wait
_broadcast = dist.ProcessGroup.broadcast


class Link:
    """The way of the kernels that work on one buffer.

    Args:
        group: the ProcessGroup whose ranks meet for it, once; it is not used any more afterwards.
    """

    def __init__(self, group: Any) -> None:
        self.rank, self.size = group.rank(), group.size()
        place = torch.zeros(_PATH_BYTES, dtype=torch.uint8)
        if self.rank == 0:
            name = tempfile.mkdtemp(prefix="deadpool-link-").encode()
            place[: len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        _wait(_broadcast(group, [place], options))
        directory = Path(bytes(place.tolist()).rstrip(b"\0").decode())
        store = dist.FileStore(str(directory / "store"), self.size)
        self._gloo = dist.ProcessGroupGloo(store, self.rank, self.size, _WAITS)
        _wait(self._gloo.barrier())
        if self.rank == 0:
            (directory / "store").unlink(missing_ok=True)
            directory.rmdir()

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Part ``r`` goes to rank ``r``; what comes from each rank. Rows alike, any number of them."""
        sent = torch.tensor([len(part) for part in parts])
        got = torch.empty_like(sent)
        _wait(self._gloo.alltoall_base(got, sent, [], []))
        whole = torch.cat(list(parts)).contiguous()
        out = whole.new_empty(int(got.sum()), *whole.shape[1:])
        counts = got.tolist()
        if whole.shape[1:].numel():
            # Bytes: Gloo knows not all types.
            wire_in, wire_out = (each.flatten(1).view(torch.uint8) for each in (whole[:, None], out[:, None]))
            _wait(self._gloo.alltoall_base(wire_out, wire_in, counts, sent.tolist()))
        return list(out.split(counts))
