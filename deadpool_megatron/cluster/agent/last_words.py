"""What a worker has left behind when it ended with an error: the end of its log, for who does not look there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_READ: Final = 1 << 14  # bytes
_LINES: Final = 8
_COLUMNS: Final = 500
_USAGE: Final = re.compile(r"^\S+: error: ")  # argparse's line; above it is the usage, hundreds of lines in Megatron
_TRACEBACK: Final = "Traceback (most recent call last):"


def last_words(log: str) -> list[str]:
    """The lines that say why, last one last: an error of argparse, or the end of the last traceback, or of the log."""
    try:
        with open(Path(log), "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - _READ))
            text = f.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip()[:_COLUMNS] for line in text.splitlines() if line.strip()]
    for line in lines[-_LINES:]:
        if _USAGE.match(line):
            return [line]
    begins = [i for i, line in enumerate(lines) if line.endswith(_TRACEBACK)]
    if begins:  # what is printed at exit comes after it
        inside = lines[begins[-1] + 1 :]
        end = next((i for i, line in enumerate(inside) if not line.startswith((" ", "\t"))), len(inside) - 1)
        return inside[max(0, end + 1 - _LINES) : end + 1]
    return lines[-_LINES:]
