"""Standard output and error that never raise: a full disk, or a terminal that is gone, ends no training."""

from __future__ import annotations

import io
import sys
from typing import Any


class _Raw(io.FileIO):
    """What cannot be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def never_fails() -> None:
    """Put such ones in the place of ``sys.stdout`` and ``sys.stderr``, over the same descriptors, line by line."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        stream.flush()
        raw = io.BufferedWriter(_Raw(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))
