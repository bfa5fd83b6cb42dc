"""How each group gets its backend for a new epoch, agreed by its members. Pure.

    kept       the backend and its connections stay as they are: nothing changed, and nothing is under way in it
    swapped    a new backend moves in, in place; always possible

Every member posts a `Word` on each of its groups. The group's first member reads them and posts the `Verdict`: so there
is one decision, whatever messages are late, and the store moves a few bytes for each member of each group.
"""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

Method = Literal["kept", "swapped"]


@dataclass(frozen=True, slots=True)
class Word:
    """What one member says of one group."""

    connected: int
    """Epoch of its connections; members that differ have no connections to one another."""
    operations: int
    """Operations begun on these connections."""
    objection: str
    """What stands against keeping the group; empty: nothing does."""
    used: bool = False
    """Something was sent over all of it: a communicator that is made at the first use is there. A spare cannot know."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one group."""

    why: str
    """What stands against keeping it; empty when it is kept."""
    used: bool
    """Of some member: the new communicator is made at once."""


def verdict(words: Sequence[Word]) -> Verdict:
    """On a group whose members said this."""
    return Verdict(_against_keeping(words), any(word.used for word in words))


def _against_keeping(words: Sequence[Word]) -> str:
    if objection := next((word.objection for word in words if word.objection), ""):
        return objection
    if len({word.connected for word in words}) > 1:
        return "connections of different epochs"
    if len({word.operations for word in words}) > 1:
        return "one member is ahead"
    return ""


def pack_verdict(given: Verdict) -> str:
    """For the store."""
    return json.dumps(astuple(given), separators=(",", ":"))


def unpack_verdict(data: bytes) -> Verdict:
    """Raises ValueError or TypeError for what `pack_verdict` did not make."""
    return Verdict(*json.loads(data))


def pack_words(words: dict[str, Word]) -> str:
    """One rank's words, by name of the group, for the store."""
    return json.dumps({name: astuple(word) for name, word in words.items()}, separators=(",", ":"))


def unpack_words(data: bytes) -> dict[str, Word]:
    """Raises ValueError or TypeError for what `pack_words` did not make."""
    return {name: Word(*fields) for name, fields in json.loads(data).items()}
