"""Xids out of the kernel's log, as the NVIDIA driver writes them there. What cannot be read is done without."""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import Final, NamedTuple

DEVICE: Final = "/dev/kmsg"
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d{1,4})(?:, (.*))?")
_AFTER = re.compile(r"caused by previous Xid (\d{1,4})")
_RECORD_BYTES: Final = 8192  # the kernel gives one record a read, none longer
_MOST_TEXT: Final = 200
_AGAIN_S: Final = 10.0  # a driver may repeat one thousands of times


class Xid(NamedTuple):
    """One line of the driver: its number, the device's PCI address, the rest; and the Xid it says it follows, or 0."""

    xid: int
    device: str
    text: str
    after: int


def parse(line: str) -> Xid | None:
    """The Xid in a line of the kernel's log; None when there is none."""
    if (found := _XID.search(line)) is None:
        return None
    text = (found[3] or "").strip()
    after = _AFTER.search(text)
    return Xid(int(found[2]), found[1], text[:_MOST_TEXT], int(after[1]) if after else 0)


class KernelLog:
    """Reads what the kernel writes from now on. Never blocks.

    Args:
        path: of the log; it takes the right to read it (CAP_SYSLOG, or kernel.dmesg_restrict = 0).

    Attributes:
        fd: to poll for; None where it cannot be read, or not any more.
    """

    def __init__(self, path: str = DEVICE) -> None:
        self.fd: int | None = None
        self._told: dict[tuple[int, str], float] = {}
        with contextlib.suppress(OSError):
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # a pipe has nothing to skip
                os.lseek(self.fd, 0, os.SEEK_END)

    def read(self) -> list[Xid]:
        """Those that are new, each of a device once in ten seconds."""
        out: list[Xid] = []
        while self.fd is not None:
            try:
                record = os.read(self.fd, _RECORD_BYTES)
            except BlockingIOError:
                break
            except BrokenPipeError:  # records were overwritten before they were read: those after them are there
                continue
            except OSError:
                record = b""
            if not record:
                self.close()
                break
            for line in record.decode(errors="replace").splitlines():
                if (xid := parse(line)) is not None and self._is_new(xid):
                    out.append(xid)
        return out

    def _is_new(self, xid: Xid) -> bool:
        now, key = time.monotonic(), (xid.xid, xid.device)
        if now - self._told.get(key, -_AGAIN_S) < _AGAIN_S:
            return False
        self._told[key] = now
        return True

    def close(self) -> None:
        """Nothing is read any more."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
