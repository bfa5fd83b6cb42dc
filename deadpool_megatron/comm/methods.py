"""How each group gets its backend for a new epoch, agreed by its members. Pure.

    kept          the backend and its connections stay as they are: nothing changed, and nothing is under way in it
    reconfigured  torch's own `reconfigure` (from 2.14 on) makes new connections in the same backend
    swapped       a new backend moves in, in place; always possible, and what a spare's groups need

Every member posts a `Word` on each of its groups, the group's first member reads them and posts the `Decision`: so
there is one, whatever messages are late, and the store moves a few bytes for each member of each group.
"""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

Method = Literal["kept", "reconfigured", "swapped"]

NOT_USED = "not used"
"""Against reconfiguring: the strategy is another."""


@dataclass(frozen=True, slots=True)
class Word:
    """What one member says of one group. A reason says what stands against a method; empty: nothing does."""

    made: int
    """Epoch whose store the backend was made with; members that differ would meet in different places."""
    connected: int
    """Epoch of its connections; members that differ have no connections to one another."""
    operations: int
    """Operations begun on these connections."""
    against_keeping: str
    against_reconfiguring: str
    handle: str
    """torch's reconfigure handle, empty without one."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What all members do with one group."""

    method: Method
    why: str
    """What stood against the methods before this one; empty for "kept"."""
    handles: tuple[str, ...] = ()
    """In group order; only with "reconfigured"."""


def decide(words: Sequence[Word]) -> Decision:
    """The method for a group whose members, in group order, said this."""
    keeping = next((word.against_keeping for word in words if word.against_keeping), "")
    if not keeping and len({word.connected for word in words}) > 1:
        keeping = "connections of different epochs"
    if not keeping and len({word.operations for word in words}) > 1:
        keeping = "one member is ahead"
    if not keeping:
        return Decision("kept", "")
    reconfiguring = next((word.against_reconfiguring for word in words if word.against_reconfiguring), "")
    if not reconfiguring and len({word.made for word in words}) > 1:
        reconfiguring = "backends of different epochs"
    if not reconfiguring:
        return Decision("reconfigured", keeping, tuple(word.handle for word in words))
    return Decision("swapped", keeping if reconfiguring in (keeping, NOT_USED) else f"{keeping}, {reconfiguring}")


def pack_words(words: dict[str, Word]) -> str:
    """One rank's words, by name of the group, for the store."""
    return json.dumps({name: astuple(word) for name, word in words.items()}, separators=(",", ":"))


def unpack_words(data: bytes) -> dict[str, Word]:
    """Raises ValueError or TypeError for what `pack_words` did not make."""
    return {name: Word(*fields) for name, fields in json.loads(data).items()}


def pack_decision(decision: Decision) -> str:
    """One decision for the store."""
    return json.dumps(astuple(decision), separators=(",", ":"))


def unpack_decision(data: bytes) -> Decision:
    """Raises ValueError or TypeError for what `pack_decision` did not make."""
    method, why, handles = json.loads(data)
    if method not in ("kept", "reconfigured", "swapped"):
        raise ValueError(f"unknown method {method!r}")
    return Decision(method, why, tuple(handles))
