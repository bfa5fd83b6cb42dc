"""Waiting for a state to come about, without a clock: what never does is ended by the limit of the test (conftest)."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["until"]


def until[T](find: Callable[[], T], what: str | Callable[[], str] = "", look_every_s: float = 0.01) -> T:
    """Poll until ``find`` gives something, and give it back.

    Args:
        what: is waited for: shown when the test's limit, or anything else, ends the wait. What takes long to say is
            called for then.
    """
    try:
        while not (found := find()):
            time.sleep(look_every_s)
    except BaseException as err:
        if text := what() if callable(what) else what:
            err.add_note(f"while waiting for {text}")
        raise
    return found
