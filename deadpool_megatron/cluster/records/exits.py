"""Exit codes of `deadpool launch`: which end a job came to."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


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
    NEIGHBOUR_LOST = 83  # of a worker whose kernels wait for a worker of its node that is gone
    DEPOSED = 126  # of a coordinator's process: somebody else leads now; no script's code gets here
    INTERRUPTED = 130
    TERMINATED = 143  # by SIGTERM


_SIGNALS: Final = 128  # and the number of one that has ended the agent
# What a person does next, by the code that a job may end with; docs/operations.md has a heading for each.
ADVICE: Final = {
    Exit.FAILED: "mend what the line and the log that it names say, and start the job again",
    Exit.USAGE: "nothing was trained: change what the line says",
    Exit.UNEQUAL: "restart from a checkpoint without the nodes that it names, and test their memory",
    Exit.PREEMPTED: "start it again with --deadpool-resume auto",
    Exit.NO_SPARE_SAVED: "restart with --load of that directory, on sound nodes; without Transformer Engine and apex "
    "add --no-load-optim, since Megatron cannot load its optimizer there",
    Exit.NO_SPARE: "restart with more spares from what is durable, if a line says so (--deadpool-resume auto), else "
    "from Megatron's last checkpoint",
    Exit.GENERATION_LOST: "restart from Megatron's last checkpoint, with more --deadpool-redundancy",
    Exit.RECOVERY_FAILED: "look at the network (the peer_error events say who saw what), then restart from what is "
    "durable (--deadpool-resume auto) or from Megatron's last checkpoint",
    Exit.REPEATED_ERROR: "mend the script or the data: the same error comes again at the same iteration",
    Exit.FENCED: "look at this node before it is used again; the same command then brings it back as a spare",
    Exit.INTERRUPTED: "start it again when you like, from what is durable or from Megatron's last checkpoint",
    Exit.TERMINATED: "somebody has sent SIGTERM (a batch system, at the end of the time?): start it again from what is "
    "durable or from Megatron's last checkpoint; with --deadpool-on-preempt the job makes its state durable first",
}


def of_script(code: int) -> int:
    """How a job ends whose script has ended with this code: with the same, unless that means something else here."""
    ours = code in (*ADVICE, Exit.NEIGHBOUR_LOST) and code != Exit.USAGE
    return Exit.FAILED if ours or not 0 < code < Exit.DEPOSED else code


def what_to_do(code: int) -> str:
    """One line on the end of a job: what to do, and where the documentation says more. Empty when it ended well."""
    if code == Exit.OK:
        return ""
    known = code if code in ADVICE else Exit.FAILED  # a script's own code
    if code > _SIGNALS and code not in ADVICE:
        known = Exit.FENCED
    return f"exit code {code}; what to do: {ADVICE[Exit(known)]} (docs/operations.md#exit-{known:d})"
