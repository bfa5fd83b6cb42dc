"""What decisions lead to. Parts of the core yield effects; one loop in `Core` carries them out, in order.

An effect is carried out before the part that yields it goes on: after ``yield Declare(...)`` the epoch is a new one.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import msgspec

# ---- what leaves the core


@dataclass(frozen=True, slots=True)
class Send:
    """Send a record to one node, or to all that are in the job when ``node`` is None."""

    node: int | None
    record: msgspec.Struct


@dataclass(frozen=True, slots=True)
class Emit:
    """Write an event."""

    event: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Keep:
    """Put these parts of the state where a coordinator that starts again finds them, before anything is sent."""

    parts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over."""

    code: int
    message: str


Action = Send | Emit | Keep | Finish


# ---- verdicts, which the core follows


@dataclass(frozen=True, slots=True)
class Persist:
    """What changes in a job's life has changed, or these parts of the state: it becomes a `Keep`."""

    parts: tuple[str, ...] = ("now", "members")


@dataclass(frozen=True, slots=True)
class Declare:
    """A new epoch begins."""

    reason: str


@dataclass(frozen=True, slots=True)
class DeclareSoon:
    """The same, with what else ends within a moment (`JobSpec.gather_s`): processes die by the dozen of one cause."""

    reason: str


@dataclass(frozen=True, slots=True)
class StartOver:
    """Nothing is committed that the job could go on from: it begins anew."""

    reason: str


@dataclass(frozen=True, slots=True)
class Resize:
    """The nodes hold fewer data-parallel replicas than there are, or more: the job begins anew with as many, from what
    is durable."""

    reason: str


@dataclass(frozen=True, slots=True)
class Lose:
    """These nodes are out of the job."""

    nodes: set[int]
    cause: str


@dataclass(frozen=True, slots=True)
class LetGo:
    """A node that is drained, and has nothing left to give, may be taken away."""

    node: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The job ends; well, with code 0."""

    code: int
    message: str


@dataclass(frozen=True, slots=True)
class EndIfFinished:
    """Every active node may be through with training: if so, the job finishes."""


Effect = Action | Persist | Declare | DeclareSoon | StartOver | Resize | Lose | LetGo | Stop | EndIfFinished
type Answer[T] = Generator[Effect, None, T]
type Effects = Answer[None]


def emit(event: str, **fields: Any) -> Emit:
    """An event; the core adds the epoch."""
    return Emit(event, fields)
