"""Kernels that nothing aborts: the ranks of a node launch one together, or none of them does.

DeepEP's and HybridEP's kernels wait for one another in memory that they share, without time-out or flag: one that a
rank launches and its neighbour does not never ends. So the ranks of a group meet before each of them, inside the node::

    rank 0   meet ---> launch   meet . . . . . . . . the neighbour has left: EpochClosed
    rank 1   meet ---> launch   (the epoch is over) leave ------^

Each has one word of the node's shared memory: the epoch, how often it has come in it, whether it has left it. Who has
come launches if all others come, whatever happens meanwhile, for they may have seen it come; who has left comes no
more. So all of the group have launched the same kernels, these end, and what they work on stands through the loss of
other nodes. Where the neighbour's process is lost itself, it does not: then this worker ends too (`Muster.bereft`).

Groups that span nodes do not meet: all processes of such a job end with the epoch (`Registered.restarts`).
"""

from __future__ import annotations

import functools
import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist

from deadpool_megatron.vault.words import Words

# What launches such kernels, by class; their constructors wait for the others too.
_LAUNCHES: Final = {
    "Buffer": ("dispatch", "combine"),
    "HybridEPBuffer": ("dispatch_with_permute", "combine_with_unpermute"),
}
_EPOCH_SHIFT: Final = 44  # times below it: months of launches
_LEFT: Final = 1
_SPINS: Final = 200
_LOOK_EVERY_S: Final = 5e-5


class Muster:
    """One worker's place in it.

    Args:
        fd: of the memory that the workers of the node share.
        rank: the coordinate.
        per_node: coordinates a node; those of a node follow one another.
        epoch: the epoch that this worker trains in, at any moment.
        check: raises what unwinds to the recovery, once a newer epoch has been declared.
    """

    def __init__(self, fd: int, rank: int, per_node: int, epoch: Callable[[], int], check: Callable[[], None]) -> None:
        self._words = Words(memoryview(mmap.mmap(fd, 0)))
        self._rank = rank
        self._per_node = per_node
        self._epoch = epoch
        self._check = check
        self._in_epoch = -1
        self._times = 0
        self._neighbours: set[int] = set()
        self.waiting = False
        """It has come and others have not: who makes no progress here waits for somebody else."""

    def meet(self, ranks: Iterable[int]) -> None:
        """Until all of these ranks have come as often in this epoch, where all are on this node. May raise what
        `check` raises, and then nobody launches."""
        self._check()
        others = {*ranks} - {self._rank}
        if any(rank // self._per_node != self._rank // self._per_node for rank in others):
            return
        self._neighbours |= others
        epoch = self._epoch()
        self._times = self._times + 1 if epoch == self._in_epoch else 1
        self._in_epoch = epoch
        came = self._word()
        self._words[self._rank % self._per_node] = came
        self.waiting = True
        try:
            self._wait([rank % self._per_node for rank in others], epoch, came)
        finally:
            self.waiting = False

    def _wait(self, places: Sequence[int], epoch: int, came: int) -> None:
        spins = 0
        while True:
            late = [word for word in map(self._words.__getitem__, places) if word & ~_LEFT < came]
            if not late:
                return
            if any(word & _LEFT and word >> _EPOCH_SHIFT == epoch for word in late):
                self._check()  # the end of the epoch may be known there first
            spins += 1
            if spins < _SPINS:
                os.sched_yield()
            else:
                time.sleep(_LOOK_EVERY_S)

    def depend_on(self, ranks: Iterable[int]) -> None:
        """Its kernels work on what it has made together with these ranks."""
        self._neighbours |= {*ranks} - {self._rank}

    def leave(self) -> None:
        """This rank launches nothing more in this epoch."""
        if self._epoch() != self._in_epoch:
            self._in_epoch, self._times = self._epoch(), 0
        self._words[self._rank % self._per_node] = self._word() | _LEFT

    def bereft(self, replaced: Sequence[int]) -> bool:
        """These ranks get new workers, a neighbour among them and this one not: kernels that it has launched may never
        end, and what they work on does not come back. Asked from another thread."""
        return self._rank not in replaced and not self._neighbours.isdisjoint(replaced)

    def _word(self) -> int:
        return self._in_epoch << _EPOCH_SHIFT | self._times << 1


def meet_before_launches(module: Any, muster: Callable[[], Muster | None]) -> None:
    """Wrap what launches such kernels in Megatron's ``fused_a2a``; ``muster()`` is None before training."""
    for name, methods in _LAUNCHES.items():
        if (kind := getattr(module, name, None)) is None:  # not installed
            continue
        kind.__init__ = preceded(kind.__init__, lambda self, group, *_, **__: _meet(muster(), group))
        for method in methods:
            if launch := getattr(kind, method, None):  # what it lacks Megatron cannot call either
                setattr(kind, method, preceded(launch, lambda self, *_, **__: _meet(muster(), self.group)))


def meet_before_replays(module: Any, muster: Callable[[], Muster | None]) -> None:
    """Wrap the launch of CUDA graphs that have HybridEP's kernels in them, which work on the buffer that Megatron's
    ``fused_a2a`` has then."""

    def meet(_: Any) -> None:
        if (buffer := module._hybrid_ep_buffer) is not None:
            _meet(muster(), buffer.group)

    torch.cuda.CUDAGraph.replay = preceded(torch.cuda.CUDAGraph.replay, meet)


def preceded(native: Callable[..., Any], before: Callable[..., None]) -> Callable[..., Any]:
    """``native``, but ``before`` gets the same arguments first."""

    @functools.wraps(native)
    def launch(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return native(*args, **kwargs)

    return launch


def _meet(muster: Muster | None, group: Any) -> None:
    if muster is not None:
        muster.meet(dist.get_process_group_ranks(group))
