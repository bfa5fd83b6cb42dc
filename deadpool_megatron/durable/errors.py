"""What can go wrong with the durable tier, by name. Every message is one line for the user."""

from __future__ import annotations


class DurableError(RuntimeError):
    """The durable tier cannot do what was asked: what is wrong, where, what to do."""


class Damaged(DurableError):
    """A manifest or a file of a durable generation is missing, cut off or changed."""


class Unreachable(DurableError):
    """The file system, or the network to it, has failed; what is there may be whole."""


class Unreadable(DurableError):
    """There are durable generations, and none that was asked for can be used: nothing begins from zero beside them."""


class NoRoom(DurableError):
    """This node has no memory for what is durable, which may be whole."""


class NotFit(DurableError):
    """A durable generation is of another model or layout than this job."""


class Cancelled(DurableError):
    """The generation that is being drained is not wanted any more."""
