"""The agent's side of its drainer: starts the process, gives it orders, hears its answers."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import msgspec

from .orders import DEAF_TO, Answer, Cancel, Describe, Done, Drain, Order, Seal, Stage, Staged


class DrainerProcess:
    """One drainer, started when it is first needed and again when it died.

    Args:
        on_answer: called with each `Staged` and `Done`, from a thread of this object; must not block. Every `Drain` and
            `Seal` is answered by exactly one `Done`, also when the process dies.
    """

    def __init__(self, on_answer: Callable[[Answer], None]) -> None:
        self._on_answer = on_answer
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._told: dict[tuple[type, int], Stage | Describe] = {}
        self._waiting: dict[tuple[str, bool], Order] = {}
        self._closed = False

    def tell(self, order: Stage | Describe) -> None:
        """Of a coordinate that runs here. Returns at once, as everything else here does."""
        with self._lock:
            if self._told.get((type(order), order.rank)) == order:
                return
            self._told[type(order), order.rank] = order
            if self._process is not None:
                self._send(order)
            else:
                self._start()

    def give(self, order: Drain | Seal) -> None:
        """Order a drain or a seal."""
        name = order.name if isinstance(order, Drain) else order.manifest.name
        with self._lock:
            self._waiting[name, isinstance(order, Seal)] = order
            if self._process is None:
                self._start()
            self._send(order)

    def cancel(self, order: Cancel) -> None:
        """Give something up; its `Done` still comes."""
        with self._lock:
            if self._process is not None:
                self._send(order)

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

    def _start(self) -> None:
        if self._closed:
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)  # inherited, until the process ignores them
        try:
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "deadpool_megatron.durable.drainer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        threading.Thread(target=self._listen, args=(process,), name="drainer", daemon=True).start()
        for order in self._told.values():
            self._send(order)

    def _send(self, order: Order) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(OSError):  # it is dead: the listener answers for it
            process.stdin.write(msgspec.json.encode(order) + b"\n")
            process.stdin.flush()

    # ---- the listener

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)
        for line in process.stdout:
            answer = decoder.decode(line)
            if isinstance(answer, Done):
                with self._lock:
                    self._waiting.pop((answer.name, answer.sealed), None)
            self._on_answer(answer)
        code = process.wait()
        with self._lock:
            if self._process is process:
                self._process = None
            left, self._waiting = list(self._waiting), {}
            closed = self._closed
        if not closed:
            for name, sealed in left:
                self._on_answer(Staged(name))
                self._on_answer(Done(name, sealed, (), f"the drainer of this node ended ({code})", unsure=sealed))
