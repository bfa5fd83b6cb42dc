"""How a group's members agree on keeping or swapping: nobody's objection is overruled."""

import msgspec
import pytest

from deadpool_megatron.comm.methods import (
    Messages,
    Verdict,
    Word,
    decode_verdict,
    decode_words,
    encode,
    verdict,
)

QUIET = Word(connected=2, operations=7, objection="")


def test_a_group_nobody_objects_to_is_kept() -> None:
    assert verdict([QUIET, QUIET, QUIET]) == Verdict("", False)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"objection": "busy"}, "busy"),
        ({"objection": "spare", "operations": -1}, "spare"),
        ({"operations": 8}, "one member is ahead"),
        ({"connected": 1}, "connections of different epochs"),
    ],
)
def test_one_member_is_enough_to_have_it_swapped(changes: dict[str, object], why: str) -> None:
    for at in range(3):
        words = [QUIET] * 3
        words[at] = msgspec.structs.replace(QUIET, **changes)
        assert verdict(words).why == why


def test_a_group_that_one_member_has_used_is_connected_on_all() -> None:
    spare = Word(connected=0, operations=-1, objection="spare")
    survivor = Word(connected=0, operations=-1, objection="not Gloo", used=True)
    for words in ([spare, survivor], [survivor, spare]):
        given = verdict(words)
        assert given.used and decode_verdict(encode(given)) == given
    assert not verdict([spare, msgspec.structs.replace(survivor, used=False)]).used


def test_members_agree_on_whom_each_is_connected_with_and_a_spare_learns_it() -> None:
    """Member 1 is a spare's, and member 3 had not come to the message that 2 has sent it when the epoch ended."""
    told = [
        Messages(batched=((0, 1), (0, 3))),
        Messages(),
        Messages(batched=((1, 2), (2, 3)), alone=((1, 2), (2, 3))),
        Messages(batched=((0, 3),), alone=((2, 3),)),
    ]
    given = verdict([msgspec.structs.replace(QUIET, messages=each) for each in told])
    assert given.messages == Messages(
        False, ((0, 1), (1, 2), (2, 3)), ((1, 2),)
    )  # what both have told is not told again
    assert decode_verdict(encode(given)) == given
    assert [given.peers(member, 4, each) for member, each in enumerate(told)] == [
        ([1, 3], []),
        ([0, 2], [2]),
        ([1, 3], [1, 3]),
        ([0, 2], [2]),
    ]


def test_a_group_with_an_all_to_all_of_one_member_is_connected_throughout() -> None:
    told = [Messages(alone=((0, 2),)), Messages(everybody=True), Messages(alone=((0, 2),), batched=((0, 2),))]
    given = verdict([msgspec.structs.replace(QUIET, messages=each) for each in told])
    assert [given.peers(member, 3, each) for member, each in enumerate(told)] == [
        ([1, 2], [2]),
        ([0, 2], []),
        ([0, 1], [0]),
    ]


def test_words_survive_the_store_and_others_are_refused() -> None:
    words = {"0": QUIET, "tp": msgspec.structs.replace(QUIET, objection="busy")}
    assert decode_words(encode(words)) == words
    for broken in (b"", b'{"0":[1,2]}', b"[]"):
        with pytest.raises(msgspec.DecodeError):
            decode_words(broken)
