"""Everything that can go wrong with a vault, by name."""

from __future__ import annotations

from collections.abc import Mapping


class VaultError(RuntimeError):
    """A vault cannot do what was asked. The message is one line: what is wrong, where, what to do.

    ``broken``: it may pass, as a connection that ends does, and says nothing of what was asked for.
    ``own``: the fault is of the process that asked.
    ``changed``: what has come is not what was written. Once, that may be the memory or the link of who has read it.
    ``gone``: whoever had it has found so itself, and offers it no more.
    """

    broken = False
    own = False
    changed = False
    gone = False


class VaultFull(VaultError):
    """There is no room for an arena; the message has the bytes needed and the bytes there."""

    own = True


class OwnFault(VaultError):
    """Something of this process's has failed: no descriptor or thread was left, or a mistake of ours."""

    broken = True
    own = True


def as_vault_error(err: Exception) -> VaultError:
    """``err``, or what stands for it where errors of vaults are told on."""
    return err if isinstance(err, VaultError) else OwnFault(f"{type(err).__name__}: {err}")


class NotHeld(VaultError):
    """The vault asked does not hold that version of that rank's shard, or not completely."""


class GivenUp(NotHeld):
    """The vault asked has read its copy again, and that has changed in memory."""

    gone = True


class ChecksumMismatch(VaultError):
    """Bytes of a shard are not those that were written; they must not be used."""

    changed = True


class Unreadable(VaultError):
    """None of those that should have a copy could give what was asked for.

    Attributes:
        reasons: by (host, port), what has failed last with each of them.
    """

    def __init__(self, message: str, reasons: Mapping[tuple[str, int], VaultError]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)
        self.broken = any(each.broken or isinstance(each, ChecksumMismatch) for each in reasons.values())


class Refused(VaultError):
    """The other agent refused: not a member of this job, a stale epoch, or no room. `code` says which."""

    code = "refused"

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = type(self).code if code is None else code


class Busy(Refused):
    """A transfer that was cut off has not left the memory yet that this one goes to."""

    broken = True
    own = True
    code = "busy"


class StaleEpoch(Refused):
    """The caller is of an older epoch than the vault: it has been replaced and may not write any more."""

    code = "stale-epoch"


class DeadlinePassed(VaultError):
    """The other agent did not answer, or sent nothing more, within the deadline."""

    broken = True


class TransferFailed(VaultError):
    """The connection to the other agent was lost or carried something that is not our protocol."""

    broken = True


class Malformed(TransferFailed):
    """A frame was changed on its way, repeated, out of place or no frame at all. The connection is given up."""


class DirectFailed(TransferFailed):
    """The other agent's memory could not be read directly; its control connection may still be good."""


class LandingLost(DirectFailed):
    """A direct read did not end in time and may still land: the memory it goes to must not be used again."""
