"""Who waits for a communication right now; how they learn that it is over.

`Work.wait` of torch is wrapped once: the wrapper notes the work this thread is about to wait for, looks at the
poison flag and calls the native wait. That is all a wait costs more (docs/measurements/comm-percall.md).
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from deadpool_megatron.comm.inplace import bindings
from deadpool_megatron.comm.release import Release
from deadpool_megatron.comm.reports import CommunicatorAborted

_NO_TIMEOUT = timedelta(0)
_LOOK_EVERY_S = 0.002


class Poison:
    """The flag every wait looks at. Plain attribute: one read on the hot path."""

    __slots__ = ("set",)

    def __init__(self) -> None:
        self.set = False

    def error(self) -> CommunicatorAborted:
        return CommunicatorAborted("communicators aborted: this epoch is over, re-form before the next operation")


class Waits:
    """Wraps `Work.wait`; knows which threads are inside."""

    def __init__(self, poison: Poison) -> None:
        self._poison = poison
        self._inside: dict[int, Any] = {}
        self.release = Release()
        self.can_force = self.release.available
        self._longest = _NO_TIMEOUT

    def install(self) -> None:
        """Wrap torch's `Work.wait`, once per process."""
        native: Callable[[Any, timedelta], bool] = bindings.Work.wait
        inside, poison, ident, waits = self._inside, self._poison, threading.get_ident, self

        def wait(self: Any, timeout: timedelta = _NO_TIMEOUT) -> bool:
            """torch's Work.wait; raises CommunicatorAborted when the communicators are aborted."""
            me = ident()
            inside[me] = self  # before the look at the flag: abort sets the flag, then looks here
            try:
                if poison.set:
                    raise poison.error()
                done = native(self, timeout or waits._longest)
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

    def at_most(self, seconds: float) -> None:
        """A wait that names no time-out of its own ends after so long. Only where all works are Gloo's.

        Left to itself torch waits for a one-way Gloo operation as long as its group was given to *form*, whatever
        time-out operations have. (Works of NCCL are not for the host to wait for: a time-out would make it.)
        """
        self._longest = timedelta(seconds=seconds)

    @property
    def anybody(self) -> bool:
        """A thread is inside a wait now."""
        return bool(self._inside)

    def clear_out(self, gloo_backends: list[Any], grace: float, deadline: float) -> tuple[int, int, int]:
        """With the flag set and the connections ended, get every thread out. Blocks until `deadline` at most.

        Operations get `grace` seconds to end by themselves: one that does has left its tensors alone for certain.
        Then they are forced, those that C++ code waits for (functional collectives, DDP) as well. `deadline` is on
        `time.monotonic`. Returns (threads found inside, operations forced, threads still inside).
        """
        found = dict(self._inside)
        force_at = time.monotonic() + grace
        if not self.release.available:
            gloo_backends = []
        busy: dict[int, Any] = {}
        forced: dict[int, Any] = {}
        while (now := time.monotonic()) < deadline:
            before, busy = (
                busy,
                {this: backend for backend in gloo_backends for this in self.release.busy(backend) or ()},
            )
            found.update(inside := dict(self._inside))
            if not inside and busy.keys() <= forced.keys():
                break
            if now >= force_at and self.release.available:
                for this in busy.keys() & before.keys() - forced.keys():  # seen twice: not just about to end
                    self.release.end_collective(busy[this], this)
                    forced[this] = None
                for thread, work in inside.items():
                    if forced.get(thread) is not work and self.release.end_wait(work):
                        forced[thread] = work
            time.sleep(_LOOK_EVERY_S)
        return len(found), len(forced), len(self._inside)
