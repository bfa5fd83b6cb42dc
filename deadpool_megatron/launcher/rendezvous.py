"""Does the rendezvous store still answer? Whoever has started the coordinator, which hosts it, asks.

A store that hangs would stop a recovery for good, as would a coordinator that does. One that has died is started again.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import threading
from typing import Final

from deadpool_megatron.cluster.link.awake import AwakeClock

# Of torch's TCPStore (TCPStoreBackend.hpp): VALIDATE with its magic number, then GETNUMKEYS, whose answer is a number.
_QUESTION: Final = struct.pack("<BIB", 0, 0x3C85F7CE, 7)
_LOOK_S: Final = 0.5
_ANSWER_S: Final = 2.0
_PATIENCE: Final = 3.0  # leases: a coordinator that wakes sooner has stood still, and goes on by itself
_LEAST_S = 10.0  # for a busy machine's sake


def ask(port: int, within_s: float) -> bytes:
    """What the store at this port of this machine says; empty when it hangs up. Raises OSError, TimeoutError."""
    with socket.create_connection(("127.0.0.1", port), within_s) as connection:
        connection.settimeout(within_s)
        connection.sendall(_QUESTION)
        return connection.recv(8)


class StoreWatch:
    """Asks twice in a lease, in a thread, from the first answer on: before it, torch may still be imported.

    Ends the process that has the store when that has not answered for three leases (ten seconds at least) in which this
    one ran.

    Args:
        port: where the store listens.
        lease_s: of the job.

    Attributes:
        why: once it has ended the process, in words; empty before.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, lease_s: float) -> None:
        self.why = ""
        self._pidfd = os.pidfd_open(process.pid)
        self._port = port
        self._every_s = lease_s / 2
        self._patience_s = max(_PATIENCE * lease_s, _LEAST_S)
        self._lock = threading.Lock()
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="deadpool-store-watch", daemon=True).start()

    def end(self) -> None:
        """The process has ended, or is none of ours any more."""
        with self._lock:
            if not self._over.is_set():
                self._over.set()
                os.close(self._pidfd)

    def _watch(self) -> None:
        clock = AwakeClock(_LOOK_S + 2 * _ANSWER_S + _LOOK_S)
        heard: float | None = None
        due = 0.0
        while not self._over.wait(_LOOK_S):
            now = clock.now()
            if now < due:
                continue
            try:
                if ask(self._port, _ANSWER_S) or heard is not None:
                    heard, due = now, now + self._every_s
            except TimeoutError:
                pass
            except OSError:  # refused: it has died, which is seen elsewhere; or nothing is left here to ask with
                heard = None
            if heard is not None and (silent := clock.now() - heard) > self._patience_s + self._every_s:
                self._end_it(f"the coordinator, or the rendezvous store in it, has not answered for {silent:.0f} s")
                return

    def _end_it(self, why: str) -> None:
        with self._lock:
            if not self._over.is_set():
                self.why = why
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
