"""The agent's side of its drainer: starts the process, gives it orders, hears its answers."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import msgspec

from .orders import DEAF_TO, Answer, Cancel, Done, Drain, Order, Seal, Stage, Staged, Unstage


class DrainerProcess:
    """One drainer, started when it is first needed and again when it died or was ended (`kill`).

    Args:
        on_answer: called with each `Staged` and `Done`, from a thread of this object; must not block. Every `Drain` and
            `Seal` is answered by exactly one `Done`, also when the process dies.
    """

    def __init__(self, on_answer: Callable[[Answer], None]) -> None:
        self._on_answer = on_answer
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()  # that its writer sends
        self._told: dict[int, Stage] = {}
        self._waiting: dict[tuple[str, bool], Order] = {}
        self._closed = False

    def tell(self, order: Stage) -> None:
        """Of a coordinate that runs here. Returns at once, as everything else here does."""
        with self._lock:
            if self._told.get(order.rank) == order:
                return
            self._told[order.rank] = order
            if self._process is not None:
                self._orders.put(order)
            else:
                self._start()

    def forget(self, rank: int) -> None:
        """Nothing of this coordinate is here any more."""
        with self._lock:
            if self._told.pop(rank, None) is not None and self._process is not None:
                self._orders.put(Unstage(rank))

    def give(self, order: Drain | Seal) -> None:
        """Order a drain or a seal."""
        name, sealed = order.name if isinstance(order, Drain) else order.manifest.name, isinstance(order, Seal)
        with self._lock:
            error = ""
            if self._process is None:
                error = self._start(order)
            else:
                self._orders.put(order)
            if not error:
                self._waiting[name, sealed] = order
        if error:
            self._on_answer(Staged(name))
            self._on_answer(Done(name, sealed, (), error))

    def cancel(self, order: Cancel) -> None:
        """Give something up; its `Done` still comes."""
        with self._lock:
            if self._process is not None:
                self._orders.put(order)

    def kill(self) -> None:
        """End a process that hangs. Its orders are answered when it is gone, and the next one starts another."""
        with self._lock:
            process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process. What was under way has no manifest and so does not count."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            process.kill()
            # A process that hangs in a dead file system cannot be waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0)

    # ---- with the lock held

    def _start(self, first: Drain | Seal | None = None) -> str:
        """Why it cannot be started; empty when it is. ``first`` comes once memory is there for what it copies out."""
        if self._closed:
            return "this node ends"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)  # inherited, until the process ignores them
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "deadpool_megatron.durable.drainer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as err:
            return f"the drainer of this node cannot be started: {err}"
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._process, self._orders = process, queue.SimpleQueue()
        for order in self._told.values():
            self._orders.put(order)
        if first is not None:
            self._orders.put(first)
        try:
            threading.Thread(target=_write, args=(process, self._orders), name="drainer-orders", daemon=True).start()
            threading.Thread(target=self._listen, args=(process, self._orders), name="drainer", daemon=True).start()
        except RuntimeError as err:
            process.kill()
            self._process = None
            return f"the drainer of this node cannot be spoken to: {err}"
        return ""

    # ---- the listener

    def _listen(self, process: subprocess.Popen[bytes], orders: queue.SimpleQueue[Order | None]) -> None:
        for answer in _answers(process):
            if isinstance(answer, Done):
                with self._lock:
                    self._waiting.pop((answer.name, answer.sealed), None)
            self._on_answer(answer)
        code = process.wait()
        orders.put(None)
        with self._lock:
            if self._process is process:
                self._process = None
            left, self._waiting = list(self._waiting), {}
            closed = self._closed
        if not closed:
            for name, sealed in left:
                self._on_answer(Staged(name))
                self._on_answer(Done(name, sealed, (), f"the drainer of this node ended ({code})", unsure=sealed))


def _answers(process: subprocess.Popen[bytes]) -> Iterator[Answer]:
    """What it says, to its end."""
    assert process.stdout is not None
    decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)
    for line in process.stdout:
        try:
            yield decoder.decode(line)
        except msgspec.MsgspecError:  # it died in the middle of a line
            process.kill()
            return


def _write(process: subprocess.Popen[bytes], orders: queue.SimpleQueue[Order | None]) -> None:
    """In a thread of its own: a drainer that does not read, because its start hangs in a file system, holds up nobody
    else. Layouts are longer than what a pipe takes."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it is dead: the listener answers for it
        while (order := orders.get()) is not None:
            process.stdin.write(msgspec.json.encode(order) + b"\n")
            process.stdin.flush()
