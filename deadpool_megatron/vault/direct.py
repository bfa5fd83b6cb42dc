"""Reading another agent's arena without its help: by RDMA, through nixl.

Everything is said and checked over the proven connection (`wire`) as ever. Only the payload goes another way: the
owner gives a `Window` to a slot, and who wants the bytes reads them into its own registered memory.

    owner                                     reader
      | -- Begin/Found with a window ---------> |    what nixl needs to reach the arena, and two addresses
      | -- Bytes: these entries, these sums --> |
      |            <== reads, verifies ======== |    nobody ever writes into another's vault
      | <- Taken: so many are in -------------- |

Nixl's own thread would spin, so there is none: whoever waits for an answer here makes progress meanwhile, which UCX
needs to connect and, on links without RDMA, to answer reads at all.

A window is not a lock: its owner may open the slot again while it is read. The reader finds that by the checksums and
then asks (`Taken` of less than was due, answered by `Sent`). A read that cannot be ended may still land when its memory
has long been used for something else, so that memory is given up: `LandingLost`.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np

from .arena import Arena, Slot
from .errors import DeadlinePassed, DirectFailed, LandingLost, TransferFailed, VaultError
from .frames import Frame, Window
from .wire import Channel

_AHEAD: Final = 2  # reads under way at once, so that one is verified while the next one runs
_LOOK_S: Final = 0.001  # between two looks at nixl while a connection is waited for
# nixl offers no wait that blocks, so a read is looked at; the last stays
_PAUSES_S: Final = (0.0, 2e-5, 5e-5, 1e-4, 2e-4)
_GRACE_S: Final = 1.0  # for a read to end once nobody wants it any more


class Direct:
    """One agent's nixl, over UCX. Any thread.

    Args:
        name: unlike that of any other agent of the job, ever.

    Raises VaultError when nixl or UCX cannot be had.
    """

    def __init__(self, name: str) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        try:
            from nixl import _bindings
            from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t
        except ImportError as err:
            raise VaultError(f"nixl cannot be imported: {err}") from None
        self.errors: tuple[type[Exception], ...] = tuple(
            each for each in vars(_bindings).values() if isinstance(each, type) and issubclass(each, Exception)
        )
        strict = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        try:
            config = nixl_agent_config(enable_prog_thread=False, backends=[], sync_mode=strict)
            self.nixl: Any = nixl_agent(name, config)
            self.nixl.create_backend("UCX", {})
        except Exception as err:  # noqa: BLE001 - the boundary of a native library
            where = f"UCX_TLS={os.environ.get('UCX_TLS', '')}"
            raise VaultError(f"nixl cannot start UCX ({where}): {err}; `ucx_info -d` shows what there is") from None
        self.bytes_read = 0
        self.lost: list[tuple[Arena, Any]] = []  # memory that a read may still write to, kept from being used again
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._regions: weakref.WeakKeyDictionary[Arena, tuple[int, bytes]] = weakref.WeakKeyDictionary()
        self._peers: dict[bytes, Any] = {}  # nixl's name of who told this of itself

    def region(self, arena: Arena) -> tuple[int, bytes]:
        """Number of the arena's registration, and what others need to read it. Registered at first use, for its life.

        Numbers are never used again: another arena may come to lie at the same address.
        """
        with self._lock:
            self.lost = [(memory, read) for memory, read in self.lost if not self._over(read)]
            known = self._regions.get(arena)
            if known is None:
                number = next(self._numbers)
                try:
                    memory = [(arena.address, arena.info.total_bytes, number, "")]
                    registered = self.nixl.register_memory(memory, "DRAM", ["UCX"])
                    known = number, self.nixl.get_partial_agent_metadata(registered, True, ["UCX"])
                except self.errors as err:
                    raise DirectFailed(f"{arena.path} cannot be registered for direct reads: {err}") from None
                self._regions[arena] = known
                weakref.finalize(arena, self._deregister, registered).atexit = False
            return known

    def give_up(self, memory: Arena, read: object) -> None:
        """Keep ``memory`` from being used again until ``read`` has ended after all."""
        with self._lock:
            self.lost.append((memory, read))

    def _over(self, read: Any) -> bool:
        with suppress(*self.errors):
            if self.nixl.check_xfer_state(read) == "PROC":
                return False
            read.release()
        return True

    def _deregister(self, registered: object) -> None:
        try:
            self.nixl.deregister_memory(registered, ["UCX"])
        except self.errors:
            return  # the arena is gone either way

    def window(self, arena: Arena, slot: Slot) -> Window:
        """Lets a member read ``slot``; valid while the arena lives. Raises DirectFailed."""
        number, agent = self.region(arena)
        return Window(agent, number, address(slot.small), address(slot.unique))

    def progress(self) -> None:
        """Let nixl do what is due. Does not block."""
        try:
            self.nixl.update_notifs(["UCX"])
        except self.errors:
            return  # a peer that has gone; whoever reads from it hears that

    def receive(self, channel: Channel) -> Frame:
        """As `Channel.receive`, for whoever is read from meanwhile."""
        end = time.monotonic() + channel.idle
        while not channel.readable(_LOOK_S):
            self.progress()
            if time.monotonic() > end:
                raise DeadlinePassed(f"the other agent said nothing for {channel.idle:g} s")
        return channel.receive()

    def peer(self, window: Window) -> Any:
        """Nixl's name of the owner of ``window``. Raises DirectFailed."""
        with self._lock:
            name = self._peers.get(window.agent)
            if name is None:
                try:
                    name = self._peers[window.agent] = self.nixl.add_remote_agent(window.agent)
                except self.errors as err:
                    raise DirectFailed(f"nixl does not understand how to reach the other agent: {err}") from None
            return name

    def forget(self, name: Any) -> None:
        """Give up the connection to a peer that failed; a window of it makes a new one."""
        with self._lock:
            self._peers = {told: each for told, each in self._peers.items() if each != name}
            try:
                self.nixl.remove_remote_agent(name)
            except self.errors:
                return  # nixl has dropped it by itself


def address(view: memoryview) -> int:
    """Where a writable view begins."""
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data) if view else 0


class Reader:
    """Reads through one window into one arena.

    Args:
        channel: the proven connection over which the window came; when it is shut, reading ends.
    """

    def __init__(self, direct: Direct, channel: Channel, window: Window, into: Arena) -> None:
        self.window = window
        self._direct = direct
        self._channel = channel
        self._into = into
        self._number, _ = direct.region(into)
        self._peer = direct.peer(window)

    def read(self, wanted: Sequence[tuple[int, memoryview]], took: Callable[[int], None]) -> None:
        """Fill each view with the bytes at its address at the owner; ``took(index)`` is called after each, in order.

        The views must lie in the arena. When this returns or raises nothing is under way any more, but after
        LandingLost: then the arena must not be used again. Blocks for the transfer. Raises DirectFailed, LandingLost,
        and what ``took`` raises.
        """
        running: deque[Any] = deque()
        begun = done = 0
        try:
            while done < len(wanted):
                if self._channel.ended:
                    raise TransferFailed("the connection was shut while the other agent's memory was read")
                while begun < len(wanted) and len(running) < _AHEAD:
                    running.append(self._begin(*wanted[begun]))
                    begun += 1
                self._finish(running.popleft(), lambda: not self._channel.ended)
                self._direct.bytes_read += len(wanted[done][1])
                took(done)
                done += 1
        except DirectFailed:
            self._drain(running)  # before the connection to the peer is given up
            self._direct.forget(self._peer)
            raise
        finally:
            self._drain(running)

    def _drain(self, running: deque[Any]) -> None:
        while running:
            with suppress(_Ended):
                self._finish(running.popleft(), lambda: False)

    def _begin(self, at: int, view: memoryview) -> Any:
        if not view:
            return None
        nixl = self._direct.nixl
        try:
            here = nixl.get_xfer_descs([(address(view), len(view), self._number)], "DRAM")
            there = nixl.get_xfer_descs([(at, len(view), self.window.number)], "DRAM")
            handle = nixl.initialize_xfer("READ", here, there, self._peer, b"", ["UCX"])
            nixl.transfer(handle)
        except self._direct.errors as err:
            raise _Ended(f"the other agent's memory cannot be read directly: {err}") from None
        return handle

    def _finish(self, handle: Any, wanted: Callable[[], bool]) -> None:
        """Wait for the end of a read, a second more once it is not ``wanted``. Raises _Ended, LandingLost."""
        if handle is None:
            return
        nixl, idle = self._direct.nixl, self._channel.idle
        end, looks = time.monotonic() + idle, 0
        try:
            while (state := nixl.check_xfer_state(handle)) == "PROC":
                if not wanted():
                    end = min(end, time.monotonic() + _GRACE_S)
                    wanted = lambda: True  # noqa: E731
                if time.monotonic() > end:
                    self._direct.give_up(self._into, handle)
                    raise LandingLost(f"a direct read of the other agent's memory did not end (deadline {idle:g} s)")
                time.sleep(_PAUSES_S[min(looks, len(_PAUSES_S) - 1)])
                looks += 1
        except self._direct.errors as err:
            state = str(err)
        with suppress(*self._direct.errors):
            handle.release()
        if state != "DONE":
            raise _Ended(f"the other agent's memory cannot be read directly: {state}")


class _Ended(DirectFailed):
    """A read has failed, and is over."""
