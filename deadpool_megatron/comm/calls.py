"""Which threads are inside of a call to a process group; nobody goes in after an abort.

Three things of NCCL's are not seen by `Work.wait`. An operation that is not asynchronous gives no Work (torch's
ProcessGroupNCCL::collective: ``return asyncOp ? work : nullptr``). A first operation makes the communicator and waits
for all members, deaf to an abort. And an abort is safe only while no thread is inside of NCCL: ncclCommAbort frees
what ncclGroupEnd still walks through. So the methods of ProcessGroup are wrapped, from the first NCCL group on. What
C++ code calls on a backend (functional collectives) is not seen.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from deadpool_megatron.comm.methods import Messages, Pair
from deadpool_megatron.comm.waits import Poison

type Call = Callable[..., Any]

_START, _END = "_start_coalescing", "_end_coalescing"
_OPERATIONS: Final = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)
_MESSAGES: Final = ("recv", "send")
_ALL_TO_ALL: Final = ("all_to_all_single", "alltoall_base")  # newer and older name
_LOOK_EVERY_S = 0.001


def _with_sizes(native: Call) -> Call:
    """An all-to-all that names the sizes of equal parts too.

    Left to itself torch, built with NCCL 2.28 or newer, does those by ncclAlltoAll, and takes the "in progress" of a
    nonblocking communicator for an error (cuda/nccl.cpp: all2all_single_equal_split). With sizes it sends the same
    bytes to the same places and waits until NCCL has taken them.
    """

    @functools.wraps(native)
    def all_to_all(
        group: Any,
        output: Any,
        input: Any,
        output_split_sizes: Sequence[int] = (),
        input_split_sizes: Sequence[int] = (),
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        size = group.size()
        if not output_split_sizes and not input_split_sizes and not (output.size(0) % size or input.size(0) % size):
            output_split_sizes, input_split_sizes = [output.size(0) // size] * size, [input.size(0) // size] * size
        return native(group, output, input, output_split_sizes, input_split_sizes, *args, **kwargs)

    return all_to_all


class Calls:
    """Wraps the operations of a class of process groups. A call costs two looks at the flag and a dictionary entry."""

    def __init__(self, poison: Poison) -> None:
        self._poison = poison
        self._inside: dict[int, Any] = {}  # thread -> device of its coalescing block, or None
        self.batched: set[int] = set()
        """Groups (id) over which batches of sends and receives have gone, which no sequence number counts."""
        self._everybody: set[int] = set()  # groups (id) with an all-to-all
        self._pairs: dict[tuple[int, bool], set[Pair]] = {}  # of a group (id), in batches or alone
        self._guarded = False

    def guard(self, kind: Any) -> None:
        """Wrap the operations of ``kind``, once."""
        if self._guarded:
            return
        self._guarded = True
        start, end = getattr(kind, _START), getattr(kind, _END)
        for name in _OPERATIONS:
            if native := getattr(kind, name, None):  # they differ between versions of torch
                native = _with_sizes(native) if name in _ALL_TO_ALL else native
                native = self._message(native) if name in _MESSAGES else native
                native = self._to_everybody(native) if name in (*_ALL_TO_ALL, "alltoall") else native
                setattr(kind, name, self._operation(native, end))
        setattr(kind, _START, self._start(start))
        setattr(kind, _END, self._end(end))

    @property
    def anybody(self) -> bool:
        """A thread is inside now."""
        return bool(self._inside)

    def messages(self, group: Any) -> Messages:
        """Those that have been sent or received over a group, in whatever epoch."""
        batched, alone = (tuple(sorted(self._pairs.get((id(group), kind), ()))) for kind in (True, False))
        return Messages(id(group) in self._everybody, batched, alone)

    def wait_outside(self, seconds: float) -> int:
        """With the flag set: until no thread is inside any more, so long at most. Returns how many still are."""
        end = time.monotonic() + seconds
        while self._inside and time.monotonic() < end:
            time.sleep(_LOOK_EVERY_S)
        return len(self._inside)

    def _look(self) -> None:
        if self._poison.set:
            raise self._poison.error()

    def _operation(self, native: Call, native_end: Call) -> Call:
        inside, ident = self._inside, threading.get_ident

        @functools.wraps(native)
        def operation(group: Any, *args: Any, **kwargs: Any) -> Any:
            me = ident()
            if me in inside:  # a coalescing block is left at its end: NCCL's group stays open in this thread else
                try:
                    return native(group, *args, **kwargs)
                except BaseException:
                    with contextlib.suppress(RuntimeError):
                        native_end(group, inside.pop(me))
                    raise
            inside[me] = None  # before the look at the flag: abort sets the flag, then looks here
            try:
                self._look()
                result = native(group, *args, **kwargs)
            finally:
                del inside[me]
                self._look()
            return result

        return operation

    def _message(self, native: Call) -> Call:
        inside, ident, pairs = self._inside, threading.get_ident, self._pairs

        @functools.wraps(native)
        def message(group: Any, tensors: Any, peer: int, *args: Any, **kwargs: Any) -> Any:
            if (me := group.rank()) != peer:
                batched = inside.get(ident()) is not None
                pairs.setdefault((id(group), batched), set()).add((min(me, peer), max(me, peer)))
            return native(group, tensors, peer, *args, **kwargs)

        return message

    def _to_everybody(self, native: Call) -> Call:
        everybody = self._everybody

        @functools.wraps(native)
        def all_to_all(group: Any, *args: Any, **kwargs: Any) -> Any:
            everybody.add(id(group))
            return native(group, *args, **kwargs)

        return all_to_all

    def _start(self, native: Call) -> Call:
        inside, ident = self._inside, threading.get_ident

        @functools.wraps(native)
        def start(group: Any, device: Any) -> None:
            me = ident()
            self.batched.add(id(group))
            inside[me] = device
            try:
                self._look()
                native(group, device)
            except BaseException:
                del inside[me]
                raise

        return start

    def _end(self, native: Call) -> Call:
        inside, ident = self._inside, threading.get_ident

        @functools.wraps(native)
        def end(group: Any, device: Any) -> Any:
            try:
                work = native(group, device)
            finally:
                inside.pop(ident(), None)
                self._look()
            return work

        return end
