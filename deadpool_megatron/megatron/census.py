"""The census: all that lives in Megatron's process, changes while it trains, and may decide what an iteration does.

Paths are as `tests/pretrain_census.py` makes them. ``how`` says what a recovery does about each:

* ``shard``: a tensor that a generation copies, or that follows from those (unique_state.py, small_state.py)
* ``small``: carried in the small state
* ``made``: made again from what is carried
* ``reset``: what a step leaves there is cleared, since it is empty or of no effect between iterations (reset.py)
* ``free``: decides no number, and may be otherwise in a process that has come later: times, counts for reports
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["CENSUS", "Entry"]


@dataclass(frozen=True, slots=True)
class Entry:
    """``pattern``: a regular expression of whole paths. ``where``: in our code, or why it is of no effect."""

    pattern: str
    how: Literal["shard", "small", "made", "reset", "free"]
    where: str

    def names(self, path: str) -> bool:
        """Whether this entry is about the value at ``path``."""
        return re.fullmatch(self.pattern, path) is not None


CENSUS: Final[tuple[Entry, ...]] = ()
