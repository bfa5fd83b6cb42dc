"""What abort and re-form tell their caller: the reports they return and the errors they raise."""

from dataclasses import dataclass

from torch.distributed import DistError


class CommunicatorError(RuntimeError):
    """Base of every error of this package."""


class CommunicatorAborted(CommunicatorError):
    """The process groups are poisoned: this epoch's communication is over until `Communicators.reform` succeeds."""


class ReformError(CommunicatorError):
    """Groups could not be re-formed (deadline, peer lost, aborted, tables differ). They stay poisoned; a reform
    with a higher epoch may follow."""


def is_communication_error(error: BaseException) -> bool:
    """May a lost peer have caused this? c10d raises RuntimeError and its subclasses (DistBackendError ...)."""
    if isinstance(error, DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "Gloo", "NCCL", "nccl", "onnection", "ommunicator", "timed out", "Timed out")
    )


@dataclass(frozen=True, slots=True)
class AbortReport:
    """What one `Communicators.abort` did. Times in seconds."""

    already_poisoned: bool
    connections_closed: int  # Gloo connections shut down
    groups_quiet: int  # groups left alone, because nothing is under way in them on this rank
    waits_interrupted: int  # threads found inside `Work.wait`
    waits_forced: int  # operations that the end of their connections had not ended, and that were taken out by force
    waits_stuck: int  # those still inside when the deadline passed. Zero, or the operation time-out is what frees them
    nccl_aborted: int
    nccl_stuck: int  # NCCL backends whose abort had not returned at the deadline (it goes on in its own thread)
    seconds: float


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What became of one group."""

    group: str  # description and name
    why: str  # what stood against keeping it; empty when it was kept

    @property
    def method(self) -> str:
        """What was done with it, as in `methods`."""
        return "swapped" if self.why else "kept"


@dataclass(frozen=True, slots=True)
class ReformReport:
    """What one `Communicators.reform` did. Times in seconds."""

    epoch: int
    each: tuple[GroupReport, ...]  # all groups of this rank, in order of creation
    seconds: float
    slowest_group: str
    slowest_seconds: float

    @property
    def groups(self) -> int:
        """Groups of this rank."""
        return len(self.each)

    @property
    def reformed(self) -> int:
        """Those that were not kept as they were."""
        return sum(group.method != "kept" for group in self.each)

    def __str__(self) -> str:
        """The line of the log: how many, and which groups by which method, by what stood against keeping them."""
        text = f"epoch {self.epoch}: {self.reformed} of {self.groups} groups re-formed in {self.seconds:.3f} s"
        if self.reformed:
            text += f" (slowest: {self.slowest_group}, {self.slowest_seconds:.3f} s)"
        for method in ("swapped", "kept"):
            mine = [group for group in self.each if group.method == method]
            reasons = dict.fromkeys(group.why for group in mine)
            parts = [
                (why and f"{why}: ") + ", ".join(group.group for group in mine if group.why == why) for why in reasons
            ]
            text += f"; {len(mine)} {method}" + (f" ({'; '.join(parts)})" if mine else "")
        return text
