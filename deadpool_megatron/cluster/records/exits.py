"""Exit codes of `deadpool launch`: which end a job came to."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What the exit code of the launcher says."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNEQUAL = 73
    PREEMPTED = 74
    NO_SPARE_SAVED = 75
    NO_SPARE = 76
    GENERATION_LOST = 77
    RECOVERY_FAILED = 78
    REPEATED_ERROR = 79
    FENCED = 80
    DEPOSED = 82  # of a coordinator's process: somebody else leads now
    NEIGHBOUR_LOST = 83  # of a worker whose kernels wait for a worker of its node that is gone
    INTERRUPTED = 130
