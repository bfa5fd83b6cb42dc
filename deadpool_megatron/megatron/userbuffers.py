"""Userbuffers of Transformer Engine (``--tp-comm-overlap``): the ranks of a node make theirs among themselves.

Upstream's ``initialize_ub`` meets over groups of the whole job, in which the survivors of a loss would have to take
part. Buffers are shared by tensor-parallel ranks only, which have to be on one node, so here the ranks of a node meet
over groups of their own, which end when the buffers are there::

    node at the start           survivors                  spare
    -----------------           ---------                  -----
    initialize_megatron:        keep theirs                initialize_megatron: only promised, for layers that ask
      made                                                 state restored, groups formed
    train                       train                      train: all of the node meet, made

What works on them waits for the others in their memory, past all that aborts: see `muster`. A node's buffers are made
together, so they are lost together: a worker whose neighbour is lost ends too.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.muster import Muster, preceded

_BASE = "transformer_engine.pytorch.module.base"
_NEVER_S = str(30 * 86400)
# Where Transformer Engine looks up the functions of its compiled module that launch such kernels.
_LAUNCHERS = ("transformer_engine_torch", "transformer_engine.pytorch.ops.fused.userbuffers_backward_linear")


class Userbuffers:
    """Of one worker.

    Args:
        make: upstream's `_initialize_tp_communicators`.
        connect: makes a client of the rendezvous store.
        deadline_s: until the ranks of the node must have met.

    Raises UserError for a Transformer Engine whose buffers cannot be made like that.
    """

    def __init__(self, make: Callable[[], None], connect: Callable[[], dist.Store], deadline_s: float) -> None:
        from megatron.core.parallel_state import get_tensor_model_parallel_world_size
        from megatron.core.utils import is_te_min_version

        self._make = make
        self._connect = connect
        self._deadline_s = deadline_s
        self._rank = dist.get_rank()
        node, domain = int(os.environ["LOCAL_WORLD_SIZE"]), get_tensor_model_parallel_world_size()
        self._node = _block(self._rank, node)
        self._domain = _block(self._rank, domain)
        self._made = False
        if not is_te_min_version("2.4.0"):
            raise UserError("--tp-comm-overlap is supported with Transformer Engine 2.4 and newer; leave it out")
        if sys.modules["transformer_engine_torch"].ubuf_built_with_mpi():
            raise UserError(
                "--tp-comm-overlap is not supported with a Transformer Engine that was built with NVTE_UB_WITH_MPI=1: "
                "a spare cannot join the job's MPI; build it without"
            )

    def make(self, epoch: int) -> None:
        """Together with the other ranks of the node. Blocks."""
        # A kernel that has waited so long goes on with garbage, and says so in a line of output only (110 s without
        # this; userbuffers.cu). An abort of what its neighbour waits for comes sooner.
        os.environ.setdefault("UB_TIMEOUT", _NEVER_S)
        base: Any = sys.modules[_BASE]
        native = base.torch
        base.torch = _Torch(_OfNode(self._connect(), f"userbuffers/{epoch}", self._rank, self._node, self._deadline_s))
        try:
            self._make()
        finally:
            base.torch = native
        self._made = True

    def promise(self) -> None:
        """Layers want to know that there are some."""
        base: Any = sys.modules[_BASE]
        base._ub_initialized = True

    def begin(self, muster: Muster, epoch: int) -> None:
        """Before training: make what was promised. Raises what ``muster`` raises."""
        muster.depend_on(self._node)
        if not self._made:
            muster.meet(self._node)
            self.make(epoch)

    def meet_before_launches(self, muster: Callable[[], Muster | None]) -> None:
        """Wrap what launches kernels that wait for one another, graphs with such kernels in them among it; ``muster()``
        is None before training."""

        def meet(*_: Any, **__: Any) -> None:
            if (met := muster()) is not None:
                met.meet(self._domain)

        def gemm(native: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(native)
            def launch(*args: Any, comm_overlap: Any = None, **kwargs: Any) -> Any:
                if comm_overlap is not None:
                    meet()
                return native(*args, comm_overlap=comm_overlap, **kwargs)

            return launch

        always = functools.partial(preceded, before=meet)
        for module in filter(None, map(sys.modules.get, _LAUNCHERS)):
            for name, wrap in (("generic_gemm", gemm), ("bulk_overlap_ag_with_external_gemm", always)):
                if name in vars(module):  # the second one is there since 2.9
                    setattr(module, name, wrap(getattr(module, name)))
        torch.cuda.CUDAGraph.replay = always(torch.cuda.CUDAGraph.replay)


def _block(rank: int, size: int) -> range:
    """The ranks beside ``rank``, in blocks of ``size``."""
    return range(rank - rank % size, rank - rank % size + size)


class _Torch:
    """``torch`` in the module of ``initialize_ub``: with another ``torch.distributed``, and the rest the same."""

    def __init__(self, distributed: _OfNode) -> None:
        self.distributed = distributed

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _OfNode:
    """What ``initialize_ub`` uses of ``torch.distributed``, in a world that is one node. Its groups are Gloo's, over
    the loopback interface, known to nobody else, and end with it.

    Args:
        prefix: of the keys in ``store``.
        rank: this one.
        ranks: of the node.
        deadline_s: until all of them must have come.
    """

    def __init__(self, store: dist.Store, prefix: str, rank: int, ranks: Sequence[int], deadline_s: float) -> None:
        self._store = dist.PrefixStore(f"{prefix}/{ranks[0]}", store)
        self._rank = rank - ranks[0]
        self._size = len(ranks)
        self._timeout = timedelta(seconds=deadline_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def new_group(self, **_: Any) -> dist.ProcessGroup:
        return self._group("node", range(self._size))

    def new_subgroups_by_enumeration(
        self, ranks_per_subgroup_list: list[list[int]], **_: Any
    ) -> tuple[dist.ProcessGroup, list[dist.ProcessGroup]]:
        mine = next(ranks for ranks in ranks_per_subgroup_list if self._rank in ranks)
        group = self._group(f"domain-{mine[0]}", mine)
        return group, [group]

    def get_rank(self, group: dist.ProcessGroup) -> int:
        return int(group.rank())

    def get_world_size(self, group: dist.ProcessGroup) -> int:
        return int(group.size())

    def get_process_group_ranks(self, group: dist.ProcessGroup) -> list[int]:
        first = self._rank - group.rank()
        return list(range(first, first + group.size()))

    def _group(self, name: str, ranks: Sequence[int]) -> dist.ProcessGroup:
        store = dist.PrefixStore(name, self._store)
        rank, size = ranks.index(self._rank), len(ranks)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = self._timeout
        kind = dist.ProcessGroup.BackendType.GLOO
        group = dist.ProcessGroup(store, rank, size)
        group._set_default_backend(kind)
        group._register_backend(torch.device("cpu"), kind, dist.ProcessGroupGloo(store, rank, size, options))
        return group
