"""Who waits for a communication right now, and how to get them out.

`Work.wait` of torch is wrapped once: the wrapper notes the work this thread is about to wait for, looks at the
poison flag and calls the native wait. That is the whole cost of a call (docs/measurements/comm-percall.md).

Shutting down Gloo's connections frees most waits, not all: when a connection ends, Gloo's pair tells the operations
that have not begun to transmit, but forgets the one being transmitted (`Pair::signalException` looks at `op.buf`
only, half-sent and half-received messages sit in `op.ubuf`). Such a send, receive, broadcast root, gather ... waits
for its time-out. Those are taken out by the calls torch itself has for it but does not bind to Python:
`SendWork::abort` / `RecvWork::abort` for point-to-point, `Work::finish` for a collective, whose pool thread stays
behind (it reads a closed connection and ends at the operation time-out, touching no tensor any more).
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from deadpool_megatron.comm.inplace import Memory, bindings, pointee
from deadpool_megatron.comm.reports import CommunicatorAborted

_NO_TIMEOUT = timedelta(0)
_SEND = "_ZTIN4c10d16ProcessGroupGloo8SendWorkE"
_RECV = "_ZTIN4c10d16ProcessGroupGloo8RecvWorkE"
_ASYNC = "_ZTIN4c10d16ProcessGroupGloo9AsyncWorkE"
_SEND_ABORT = "_ZN4c10d16ProcessGroupGloo8SendWork5abortEv"
_RECV_ABORT = "_ZN4c10d16ProcessGroupGloo8RecvWork5abortEv"
_FINISH = "_ZN4c10d4Work6finishENSt15__exception_ptr13exception_ptrE"
_MAX_BASES = 8


class Poison:
    """The flag every wait looks at. Plain attribute: one read on the hot path."""

    __slots__ = ("set",)

    def __init__(self) -> None:
        self.set = False

    def error(self) -> CommunicatorAborted:
        return CommunicatorAborted("communicators aborted: this epoch is over, re-form before the next operation")


class Release:
    """Takes a thread out of a Gloo wait through torch's C++ symbols. `available` is False where they are hidden."""

    def __init__(self) -> None:
        self._types: dict[int, Callable[[int], object]] = {}
        try:
            self._memory = Memory()
            path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
            library = ctypes.CDLL(path)
            finish = library[_FINISH]
            no_exception = ctypes.c_uint64(0)  # std::exception_ptr{nullptr}, passed by reference in the C++ ABI
            for type_info, call in (
                (_SEND, library[_SEND_ABORT]),
                (_RECV, library[_RECV_ABORT]),
                (_ASYNC, lambda this: finish(this, ctypes.byref(no_exception))),
            ):
                self._types[ctypes.addressof(ctypes.c_char.in_dll(library, type_info))] = _on_pointer(call)
            self.available = True
        except (OSError, AttributeError, ValueError):
            self.available = False

    def __call__(self, work: Any) -> bool:
        """End the wait for `work`, whoever waits. False if its C++ type is none that this can end."""
        this = pointee(work)
        vtable = self._memory.words(this, 1)
        info = self._memory.words(vtable[0] - 8, 1) if vtable else ()
        for _ in range(_MAX_BASES):  # dynamic_cast by hand: follow single inheritance to a type known here
            if not info:
                return False
            if (call := self._types.get(info[0])) is not None:
                call(this)
                return True
            info = self._memory.words(info[0] + 16, 1)
        return False


def _on_pointer(call: Callable[..., object]) -> Callable[[int], object]:
    return lambda this: call(ctypes.c_void_p(this))


class Waits:
    """Wraps `Work.wait`; knows which threads are inside."""

    def __init__(self, poison: Poison) -> None:
        self._poison = poison
        self._inside: dict[int, Any] = {}
        self._release = Release()
        self.can_force = self._release.available

    def install(self) -> None:
        """Wrap torch's `Work.wait`, once per process."""
        native: Callable[[Any, timedelta], bool] = bindings.Work.wait
        inside, poison, ident = self._inside, self._poison, threading.get_ident

        def wait(self: Any, timeout: timedelta = _NO_TIMEOUT) -> bool:
            """torch's Work.wait; raises CommunicatorAborted when the communicators are aborted."""
            me = ident()
            inside[me] = self  # before the look at the flag: abort sets the flag, then looks here
            try:
                if poison.set:
                    raise poison.error()
                done = native(self, timeout)
            except RuntimeError as error:
                if poison.set and not isinstance(error, CommunicatorAborted):
                    raise poison.error() from error
                raise
            finally:
                inside.pop(me, None)
            if poison.set:
                raise poison.error()  # taken out by force: the result is not one
            return done

        wait.__wrapped__ = native  # type: ignore[attr-defined]
        bindings.Work.wait = wait

    def clear_out(self, grace: float, deadline: float) -> tuple[int, int, int]:
        """With the flag set and the connections ended, get every thread out. Blocks until `deadline` at most.

        Waits get `grace` seconds to end by themselves: a collective that ends by itself has left its tensors alone
        for certain. Then they are forced. `deadline` is on `time.monotonic`.
        Returns (found inside, forced, still inside).
        """
        found = dict(self._inside)
        force_at = time.monotonic() + grace
        forced: dict[int, Any] = {}
        while self._inside and (now := time.monotonic()) < deadline:
            if now >= force_at and self._release.available:
                for thread, work in list(self._inside.items()):
                    if forced.get(thread) is not work:
                        self._release(work)
                        forced[thread] = work
            time.sleep(0.001)
            found.update(self._inside)
        return len(found), len(forced), len(self._inside)
