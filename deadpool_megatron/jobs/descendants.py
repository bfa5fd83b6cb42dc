"""Everything a command has started, found by a word in its environment.

Not by parents and children: the children of a process that was killed belong to nobody, and who is nobody's child a
moment later was never there for those who look at children. An environment is inherited, and it stays.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

import psutil

# Not DEADPOOL_...: it is none of the product's settings.
VARIABLE = "DESCENDANTS_OF"
WORD_LENGTH = 16


class Descendants:
    """The processes that were started with `environment`, directly or not, whoever their parents are by now.

    Args:
        family: whose they are, too.

    Attributes:
        environment: goes with that of whatever is started.
    """

    def __init__(self, family: Descendants | None = None) -> None:
        word = secrets.token_hex(WORD_LENGTH // 4)
        if family is not None:
            word = family.environment[VARIABLE][: WORD_LENGTH // 2] + word
        self.environment: dict[str, str] = {VARIABLE: word.ljust(WORD_LENGTH, "0")}
        self._word = f"\0{VARIABLE}={word}".encode()
        # Who ends has no environment for a moment before it is gone.
        self._seen: dict[int, psutil.Process] = {}

    def living(self) -> list[psutil.Process]:
        """Those that live now; one that has ended and was not waited for does not."""
        for pid in psutil.pids():
            # another user's process, or one that has just ended
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if pid != os.getpid() and self._word in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                    self._seen[pid] = psutil.Process(pid)
        self._seen = {pid: process for pid, process in self._seen.items() if not has_ended(process)}
        return list(self._seen.values())

    def kill(self, deadline_s: float) -> None:
        """SIGKILL for all, by their ids, until none lives or ``deadline_s`` seconds have passed."""
        end = time.monotonic() + deadline_s
        while (left := self.living()) and time.monotonic() < end:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()  # psutil compares the creation time, so a reused id is safe
            time.sleep(0.02)


def has_ended(process: psutil.Process) -> bool:
    """It is gone, or nobody has waited for it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
