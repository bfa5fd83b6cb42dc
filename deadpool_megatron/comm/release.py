"""Take threads out of Gloo operations that the end of their connections does not end.

When a connection ends, Gloo's pair tells the operations that have not begun to transmit, but forgets a message that is
half sent or half received (`Pair::signalException` in gloo/transport/tcp/pair.cc looks at `op.buf`; such messages sit
in `op.ubuf`). Whoever waits for one waits for the operation's time-out. torch has the calls that end such a wait, it
only does not bind them to Python:

* point-to-point: `SendWork::abort` / `RecvWork::abort`;
* a collective: `Work::finish` with an exception. Its pool thread stays behind until the time-out; it waits for a closed
  connection and touches no tensor any more. The collectives a backend is busy with are in its work queue and its
  list of works in progress, found there by the shape of those two members (a std::deque right before a
  std::vector) and by the C++ type of what is in them: so it does not matter who waits for them, and how.

All memory is read through /proc/self/mem, which cannot fault, and objects are known by their run-time type.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch

from deadpool_megatron.comm.inplace import Memory, pointee

_SEND = "_ZTIN4c10d16ProcessGroupGloo8SendWorkE"
_RECV = "_ZTIN4c10d16ProcessGroupGloo8RecvWorkE"
_ASYNC = "_ZTIN4c10d16ProcessGroupGloo9AsyncWorkE"
_SEND_ABORT = "_ZN4c10d16ProcessGroupGloo8SendWork5abortEv"
_RECV_ABORT = "_ZN4c10d16ProcessGroupGloo8RecvWork5abortEv"
_FINISH = "_ZN4c10d4Work6finishENSt15__exception_ptr13exception_ptrE"
_MESSAGE = b"communicators aborted: this operation was taken out by force"

_MAX_BASES = 8
_BACKEND_WORDS = 128  # more than sizeof(ProcessGroupGloo) in any version seen
_DEQUE_WORDS = 10  # map, map size, begin and end (each: current, first, last, node)
_DEQUE_NODE = 512  # bytes of one node of a std::deque of pointers
_MAX_QUEUE = 4096


class Release:
    """Ends waits for Gloo works. `available` is False where torch hides the symbols (then nothing is forced)."""

    def __init__(self) -> None:
        self._types: dict[int, str] = {}
        self._queue_at: int | None = None  # bytes from the start of a ProcessGroupGloo
        try:
            self._memory = Memory()
            library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
            for name in (_SEND, _RECV, _ASYNC):
                self._types[_address_of(library, name)] = name
            self._abort = {_SEND: library[_SEND_ABORT], _RECV: library[_RECV_ABORT]}
            self._finish = library[_FINISH]
            self._exception = _Exception(_MESSAGE)
            self.available = True
        except (OSError, AttributeError, ValueError):
            self.available = False

    def _type(self, this: int) -> str:
        """dynamic_cast by hand: the known type that the object at `this` is of, following single inheritance."""
        vtable = self._memory.words(this, 1)
        info = self._memory.words(vtable[0] - 8, 1) if vtable else ()
        for _ in range(_MAX_BASES):
            if not info:
                break
            if info[0] in self._types:
                return self._types[info[0]]
            info = self._memory.words(info[0] + 16, 1)
        return ""

    def end_wait(self, work: Any) -> bool:
        """End the wait for a work whose Python object the caller holds. False if it is of none of the types here."""
        kind = self._type(pointee(work))
        if kind in self._abort:
            self._abort[kind](ctypes.c_void_p(pointee(work)))
        elif kind == _ASYNC:
            self._end_collective(pointee(work))
        return bool(kind)

    def end_collective(self, backend: Any, this: int) -> None:
        """End the waits for a collective that `busy` found, if it is still there."""
        if this in (self.busy(backend) or ()):
            self._end_collective(this)

    def _end_collective(self, this: int) -> None:
        self._finish(ctypes.c_void_p(this), ctypes.byref(self._exception.copy()))

    def busy(self, backend: Any) -> set[int] | None:
        """Addresses of the collectives this ProcessGroupGloo has queued or in progress. None where that cannot be seen:
        in an unknown build of torch, or just now, since one of its threads is putting down what it has finished (it
        frees a work before it forgets its address)."""
        words = self._memory.words(pointee(backend), _BACKEND_WORDS)
        offsets = range(len(words)) if self._queue_at is None else (self._queue_at,)
        for at in offsets:
            queue = self._deque(words[at : at + _DEQUE_WORDS])
            vector = words[at + _DEQUE_WORDS : at + _DEQUE_WORDS + 3]
            if queue is None or len(vector) < 3 or not vector[0] < vector[1] <= vector[2] <= vector[0] + _DEQUE_NODE:
                continue
            running = self._memory.words(vector[0], (vector[1] - vector[0]) // 8)
            found = {this for this in (*queue, *running) if this}
            if all(self._type(this) == _ASYNC for this in found):
                self._queue_at = at
                return found
        return None

    def operations(self, backend: Any) -> tuple[int, int] | None:
        """(operations begun, collectives among them) of this ProcessGroupGloo since its connections were made. The
        second number is the tag counter, which stands right before the work queue. None where it cannot be seen."""
        self.busy(backend)  # finds the queue
        if self._queue_at is None:
            return None
        words = self._memory.words(pointee(backend) + 8 * (self._queue_at - 1), 1)
        return (backend._get_sequence_number_for_group(), words[0] >> 32) if words else None

    def _deque(self, words: tuple[int, ...]) -> list[int] | None:
        """Elements of the std::deque of pointers with these words; None if that is no such deque."""
        if len(words) < _DEQUE_WORDS:
            return None
        nodes, count, current, first, last, node, end, end_first, end_last, end_node = words
        if last - first != _DEQUE_NODE or end_last - end_first != _DEQUE_NODE or not 0 < count <= _MAX_QUEUE:
            return None
        if not (nodes <= node <= end_node < nodes + 8 * count and first <= current <= last):
            return None
        if self._memory.words(node, 1) != (first,) or self._memory.words(end_node, 1) != (end_first,):
            return None
        elements: list[int] = []
        while node < end_node:
            elements += self._memory.words(current, (last - current) // 8)
            node += 8
            current = (self._memory.words(node, 1) or (0,))[0]
            last = current + _DEQUE_NODE
        return elements + list(self._memory.words(current, max(0, end - current) // 8))


class _Exception:
    """A std::exception_ptr to a std::runtime_error, made as the C++ runtime makes them; kept for the process."""

    def __init__(self, message: bytes) -> None:
        runtime = ctypes.CDLL("libstdc++.so.6")
        allocate: Callable[..., int] = runtime["__cxa_allocate_exception"]
        allocate.restype = ctypes.c_void_p  # type: ignore[attr-defined]
        error = ctypes.c_void_p(allocate(ctypes.c_size_t(16)))  # sizeof(std::runtime_error)
        runtime["_ZNSt13runtime_errorC1EPKc"](error, message)
        runtime["__cxa_init_primary_exception"](
            error,
            ctypes.c_void_p(_address_of(runtime, "_ZTISt13runtime_error")),
            ctypes.c_void_p(_address_of(runtime, "_ZNSt13runtime_errorD1Ev")),
        )
        self._pointer = ctypes.c_uint64(0)
        runtime["_ZNSt15__exception_ptr13exception_ptrC1EPv"](ctypes.byref(self._pointer), error)
        self._copy = runtime["_ZNSt15__exception_ptr13exception_ptrC1ERKS0_"]

    def copy(self) -> ctypes.c_uint64:
        """Another exception_ptr to the same error, for a callee that takes one by value (and moves it away)."""
        other = ctypes.c_uint64(0)
        self._copy(ctypes.byref(other), ctypes.byref(self._pointer))
        return other


def _address_of(library: ctypes.CDLL, symbol: str) -> int:
    return ctypes.addressof(ctypes.c_char.in_dll(library, symbol))
