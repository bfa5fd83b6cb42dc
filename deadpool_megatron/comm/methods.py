"""How each group gets its backend for a new epoch, agreed by its members. Pure.

    kept       the backend and its connections stay as they are: nothing changed, and nothing is under way in it
    swapped    a new backend moves in, in place; always possible

Every member posts a `Word` on each of its groups. The group's first member reads them and posts the `Verdict`: so there
is one decision, whatever messages are late, and the store moves a few bytes for each member of each group.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec

type Pair = tuple[int, int]  # two members, by their ranks in the group, the lower one first


class Messages(msgspec.Struct, frozen=True, array_like=True):
    """What went from one member to another: NCCL connects two of them at their first message."""

    everybody: bool = False  # an all-to-all
    batched: tuple[Pair, ...] = ()  # over the communicator of the group
    alone: tuple[Pair, ...] = ()  # outside of batches: torch makes a communicator for each pair


class Word(msgspec.Struct, frozen=True, array_like=True):
    """What one member says of one group."""

    connected: int  # epoch of its connections; members that differ have no connections to one another
    operations: int  # operations begun on these connections
    objection: str  # what stands against keeping the group; empty: nothing does
    used: bool = False
    """Something was sent over all of it: a communicator that is made at the first use is there. A spare cannot know."""
    messages: Messages = Messages()
    """Those that this member has sent or received."""


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What becomes of one group."""

    why: str  # what stands against keeping it; empty when it is kept
    used: bool  # of some member: the new communicator is made at once
    messages: Messages = Messages()
    """Those that one of the two has not told of: a spare, or who was not that far yet."""

    def peers(self, member: int, size: int, told: Messages) -> tuple[list[int], list[int]]:
        """Whom this member, which has ``told`` that, is to be connected with: in batches, alone."""
        batched, alone = (
            sorted({sum(pair) - member for pair in (*said, *unsaid) if member in pair})
            for said, unsaid in ((told.batched, self.messages.batched), (told.alone, self.messages.alone))
        )
        return [each for each in range(size) if each != member] if self.messages.everybody else batched, alone


def verdict(words: Sequence[Word]) -> Verdict:
    """On a group whose members said this."""
    said = [word.messages for word in words]
    unsaid = Messages(
        any(each.everybody for each in said),
        _told_once([pair for each in said for pair in each.batched]),
        _told_once([pair for each in said for pair in each.alone]),
    )
    return Verdict(_against_keeping(words), any(word.used for word in words), unsaid)


def _told_once(pairs: list[Pair]) -> tuple[Pair, ...]:
    return tuple(sorted(pair for pair, times in Counter(pairs).items() if times == 1))


def _against_keeping(words: Sequence[Word]) -> str:
    if objection := next((word.objection for word in words if word.objection), ""):
        return objection
    if len({word.connected for word in words}) > 1:
        return "connections of different epochs"
    if len({word.operations for word in words}) > 1:
        return "one member is ahead"
    return ""


# As they lie in the store; a rank's words are by name of the group. Decoding raises msgspec.DecodeError.
encode = msgspec.json.Encoder().encode
decode_verdict = msgspec.json.Decoder(Verdict).decode
decode_words = msgspec.json.Decoder(dict[str, Word]).decode
