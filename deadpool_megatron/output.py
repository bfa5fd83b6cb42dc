"""Output that stops nobody: neither a full disk, nor a terminal that is gone or held, nor a file system that hangs.

What a command prints for a reader stops when the reader does: `until_unread`.
"""

from __future__ import annotations

import atexit
import io
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

_PATIENCE_S: Final = 1.0
_LAST_S: Final = 5.0
_MOST_LINES: Final = 1000


class Aside:
    """Does what may hang, a write above all, on a thread of its own, in order. Anybody's to call.

    Args:
        name: of the thread, which begins with the first act.
        most: acts that may wait; more are dropped.
        patience_s: `do` returns when the act is done, if that takes no longer. While one is late nobody waits.
    """

    def __init__(self, name: str, most: int, patience_s: float = 0.0) -> None:
        self._name = name
        self._most = most
        self._patience_s = patience_s
        self._acts: queue.SimpleQueue[tuple[Callable[[], object], threading.Event]] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._late = False
        self._begun: float | None = None  # when the act that is being done was

    def do(self, act: Callable[[], object]) -> bool:
        """Have it done. False: too much waits already, so it never is."""
        if self._acts.qsize() >= self._most:
            return False
        done = self._put(act)
        if self._patience_s and not self._late:
            self._late = not done.wait(self._patience_s)
        return True

    def _put(self, act: Callable[[], object]) -> threading.Event:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        done = threading.Event()
        self._acts.put((act, done))
        return done

    @property
    def held_up_s(self) -> float:
        """Seconds since the act began that is being done; 0 when none is."""
        begun = self._begun
        return 0.0 if begun is None else time.monotonic() - begun

    def settle(self, within_s: float) -> bool:
        """Wait so many seconds at most; whether all is done that was to be."""
        return self._thread is None or self._put(lambda: None).wait(within_s)

    def _run(self) -> None:
        while True:
            act, done = self._acts.get()
            self._begun = time.monotonic()
            try:
                act()
            except Exception:  # noqa: BLE001 - the boundary of a thread without which nothing is done any more
                traceback.print_exc()
            self._begun = None
            done.set()
            if self._acts.empty():
                self._late = False


class _Raw(io.FileIO):
    """What cannot be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


class Unread(BaseException):
    """Who reads stdout has had enough. No OSError, which commands answer as one of the files they were given."""


class _Read(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise Unread from None


class _Beside(io.RawIOBase):
    """The same, on a thread of its own; so is what is too much to wait for a reader who stands still."""

    def __init__(self, raw: _Raw) -> None:
        self._raw = raw
        self._aside = Aside("stderr", _MOST_LINES, _PATIENCE_S)
        atexit.register(self._aside.settle, _LAST_S)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: Any) -> int:
        line = bytes(data)
        self._aside.do(lambda: self._whole(line))
        return len(line)

    def _whole(self, line: bytes) -> None:
        while line:
            line = line[self._raw.write(line) :]


def never_fails(stands_still: bool = True) -> None:
    """Put such ones in the place of ``sys.stdout`` and ``sys.stderr``, over the same descriptors, line by line.

    Without ``stands_still`` who writes to stderr does not wait for a reader who does not read.
    """
    for name, fd in (("stdout", 1), ("stderr", 2)):
        raw = _Raw(fd, "w", closefd=False)
        _put(name, raw if stands_still or fd == 1 else _Beside(raw), line_buffering=True)


def until_unread() -> None:
    """Put one in the place of ``sys.stdout`` that raises `Unread` once nobody reads it any more."""
    _put("stdout", _Read(1, "w", closefd=False), bool(sys.stdout.line_buffering))


def _put(name: str, raw: io.RawIOBase, line_buffering: bool) -> None:
    stream = getattr(sys, name)
    stream.flush()
    out = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=line_buffering)
    setattr(sys, name, out)
