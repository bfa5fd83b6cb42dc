"""Userbuffers (``--tp-comm-overlap``): GEMMs that gather their input, or add up their output, among ranks.

A device cuts them into pieces, by rings or pipelines, to hide the communication; here it comes before the product or
after it, so all methods give the same bits. As on a device the ranks' buffers are connected once, when they are made,
and their kernels then go past the process groups of torch (`link.Link`).

Sources: transformer_engine/pytorch/csrc/extensions/comm_gemm_overlap.cpp, common/comm_gemm_overlap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deadpool_megatron.emulation import graphs
from deadpool_megatron.emulation.link import Link
from deadpool_megatron.emulation.transformer_engine import enums
from deadpool_megatron.emulation.transformer_engine.formats import from_fp8
from deadpool_megatron.emulation.transformer_engine.kernels import kernel

_AG, _RS = (enums.CommOverlapType[name] for name in ("AG", "RS"))


class CommOverlapHelper:
    """How ranks meet to make buffers: by process groups, which are not used afterwards.

    Args:
        world_group: of the ranks that make buffers at the same time.
        intra_node_group: of those that share one, where these are fewer.
    """

    def __init__(self, world_group: Any, intra_node_group: Any = None) -> None:
        self.link = Link(world_group if intra_node_group is None else intra_node_group)


class CommOverlapCore:
    """A buffer (rows, columns) of 16-bit numbers, or of FP8 as bytes, that the kernels of the ranks work on."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        helper: CommOverlapHelper,
        tp_size: int,
        comm_type: Any = None,
        *,
        atomic_gemm: bool = False,
        **_: Any,
    ) -> None:
        if atomic_gemm:
            raise NotImplementedError(
                "the emulation has no atomic GEMMs: leave atomic_gemm out of --tp-comm-overlap-cfg"
            )
        rows, columns = shape
        self._link, self._size = helper.link, tp_size
        # In rings, what arrives is kept apart until all of it is added up.
        self._chunks = 2 * tp_size - 1 if self.is_p2p_overlap() and comm_type == _RS else tp_size
        self._buffer = torch.empty(rows // tp_size * self._chunks, columns, dtype=dtype)

    def is_fp8_ubuf(self) -> bool:
        return bool(self._buffer.element_size() == 1)

    def is_p2p_overlap(self) -> bool:
        return False

    def is_atomic_gemm(self) -> bool:
        return False

    def with_cublasmp(self) -> bool:
        return False

    def copy_into_buffer(self, input: Tensor, local_chunk: bool = False) -> None:
        target = self._chunk() if local_chunk else self._buffer
        if target.element_size() != input.element_size() or target.numel() != input.numel():
            raise RuntimeError(
                f"Tried to copy an invalid tensor into a Userbuffers buffer (input {tuple(input.shape)} of "
                f"{input.element_size()} bytes, buffer {tuple(target.shape)} of {target.element_size()} bytes)"
            )
        target.copy_(input.detach().reshape(target.shape))

    def get_buffer(self, local_chunk: bool = False, shape: Sequence[int] | None = None) -> Tensor:
        """A tensor on the buffer, or on this rank's chunk of it."""
        source = self._chunk() if local_chunk else self._buffer
        if shape is not None and math.prod(shape) != source.numel():
            raise RuntimeError(f"Invalid shape for a Userbuffers buffer ({tuple(shape)} of {tuple(source.shape)})")
        return source.view(source.shape if shape is None else tuple(shape))

    def get_communication_stream(self) -> tuple[Any, Any]:
        """Of what is sent and of what is received."""
        return torch.cuda.current_stream(), torch.cuda.current_stream()

    def _chunk(self) -> Tensor:
        return self._buffer.chunk(self._chunks)[self._link.rank]

    # ---- the kernels

    def all_gather(self) -> None:
        """Every rank's chunk into the buffer."""
        graphs.noted(lambda: self._buffer.copy_(torch.cat(self._link.exchange([self._chunk()] * self._size))))

    def reduce_scatter(self, product: Tensor, out: Tensor, numbers: Any = lambda part: part.float()) -> None:
        """This rank's chunk of the sum of all ranks' ``product``, in float32, into ``out``.

        Args:
            numbers: the float32 values of a part of ``product``.
        """
        product = product.reshape(self._size, -1)

        def reduce() -> None:
            parts = self._link.exchange(list(product.split(1)))
            out.copy_(torch.stack([numbers(part) for part in parts]).sum(0).reshape(out.shape))

        graphs.noted(reduce)


class CommOverlap(CommOverlapCore):
    """For bulk overlap, where GEMM and communication have nothing to do with one another, and for pipelines."""


class CommOverlapP2P(CommOverlapCore):
    """For rings, in which each rank sends chunks to the next."""

    def is_p2p_overlap(self) -> bool:
        return True


def before_gemm(comm: CommOverlapCore, comm_type: Any, bulk: bool, extra_output: Tensor | None) -> None:
    """Gather what the product is of, which is in the buffer then; in bulk something else."""
    if bulk and comm.is_p2p_overlap():
        raise RuntimeError("Operation not supported.")
    if comm_type == _AG:
        comm.all_gather()
        if extra_output is not None and not bulk:
            extra_output.copy_(comm.get_buffer(shape=extra_output.shape))


def after_gemm(comm: CommOverlapCore, comm_type: Any, bulk: bool, product: Any, extra_output: Tensor | None) -> None:
    """Add up the product, ``product`` as it is written into the buffer; in bulk what is in the buffer, in place."""
    if comm_type != _RS:
        return
    if bulk:
        if comm.is_fp8_ubuf():
            raise NotImplementedError("the emulation adds up no FP8 in bulk")
        comm.reduce_scatter(comm.get_buffer(), comm.get_buffer(local_chunk=True))
        return
    assert extra_output is not None
    if not comm.is_fp8_ubuf():
        comm.reduce_scatter(product, extra_output)
        return
    data, scale, dtype = product._data, product._scale_inv, product._fp8_dtype
    comm.reduce_scatter(data, extra_output, functools.partial(_dequantized, scale=scale, dtype=dtype))


def _dequantized(part: Tensor, scale: Tensor, dtype: int) -> Tensor:
    return from_fp8(part, dtype) * scale


@kernel
def bulk_overlap_ag_with_external_gemm(allgather_communicator: CommOverlap, send_stream: Any, recv_stream: Any) -> None:
    """Gather beside a GEMM that has been launched before."""
    allgather_communicator.all_gather()
