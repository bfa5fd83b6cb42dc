"""What abort and re-form tell their caller: the reports they return and the errors they raise."""

from dataclasses import dataclass


class CommunicatorError(RuntimeError):
    """Base of every error of this package."""


class CommunicatorAborted(CommunicatorError):
    """The process groups are poisoned: this epoch's communication is over until `Communicators.reform` succeeds."""


class ReformError(CommunicatorError):
    """Groups could not be re-formed (deadline, peer lost, aborted, tables differ). They stay poisoned; a reform
    with a higher epoch may follow."""


@dataclass(frozen=True, slots=True)
class AbortReport:
    """What one `Communicators.abort` did. Times in seconds."""

    already_poisoned: bool
    connections_closed: int
    """Gloo connections shut down."""
    waits_interrupted: int
    """Threads found inside `Work.wait`."""
    waits_forced: int
    """Operations that the end of their connections had not ended, and that were taken out by force."""
    waits_stuck: int
    """Those still inside when the deadline passed. Zero, or the operation time-out is what frees them."""
    nccl_aborted: int
    nccl_stuck: int
    """NCCL backends whose abort had not returned at the deadline (it goes on in its own thread)."""
    seconds: float


@dataclass(frozen=True, slots=True)
class ReformReport:
    """What one `Communicators.reform` did. Times in seconds."""

    epoch: int
    groups: int
    """Groups of this rank that were re-formed."""
    seconds: float
    forming_seconds: float
    """The part spent on rendezvous and connections."""
    slowest_group: str
    slowest_seconds: float
