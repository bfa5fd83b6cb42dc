"""What a number or a host on a command line may be: types for argparse, the same for all commands.

Each raises ArgumentTypeError, of which argparse makes the user's line. Digits are those of ASCII, without underscores:
Python reads more as a number than a person means.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import Final, NoReturn

MOST: Final = 10**9
_WHOLE: Final = re.compile(r"[+-]?[0-9]+")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


class Parser(ArgumentParser):
    """Answers a value that an option cannot have in one line, without all that the command takes."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with code 2."""
        what = message.removeprefix("argument ")
        if what.startswith("-"):
            print(f"deadpool: {what}", file=sys.stderr)
            sys.exit(2)
        super().error(message)


def digits(text: str) -> int:
    """A whole number as written. Raises ValueError."""
    if not _WHOLE.fullmatch(text):
        raise ValueError(text)
    return int(text)


def count(least: int = 0, most: int = MOST) -> Callable[[str], int]:
    """A type: whole numbers from ``least`` to ``most``."""

    def parsed(text: str) -> int:
        try:
            value = digits(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if not least <= value <= most:
            raise ArgumentTypeError(f"must be {least} to {most}, not {value}")
        return value

    return parsed


def number(least: float = 0.0, most: float = MOST) -> Callable[[str], float]:
    """A type: numbers from ``least`` to ``most``; no infinity, and nothing that is no number."""

    def parsed(text: str) -> float:
        if not _NUMBER.fullmatch(text):
            raise ArgumentTypeError(f"must be a number, not {text!r}")
        if not least <= (value := float(text)) <= most:
            raise ArgumentTypeError(f"must be {least:g} to {most:g}, not {text}")
        return value

    return parsed


def host_name(text: str) -> str:
    """A type: the name of a host, or an IPv4 address. Whether there is one is for who connects to it."""
    labels = text.removesuffix(".").split(".")
    if len(text) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise ArgumentTypeError(f"must be the name of a host or an IPv4 address, not {text!r}")
    if labels[-1].isdigit() and not (len(labels) == 4 and all(n.isdigit() and int(n) < 256 for n in labels)):
        raise ArgumentTypeError(f"must be the name of a host or an IPv4 address, not {text!r}")
    return text
