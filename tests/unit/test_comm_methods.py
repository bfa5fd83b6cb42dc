"""How a group's members agree on keeping, reconfiguring or swapping: nobody's objection is overruled."""

import dataclasses

import pytest

from deadpool_megatron.comm.methods import (
    NOT_USED,
    Decision,
    Word,
    decide,
    pack_decision,
    pack_words,
    unpack_decision,
    unpack_words,
)

QUIET = Word(made=1, connected=2, operations=7, against_keeping="", against_reconfiguring="", handle="h")


def said(**changes: object) -> Word:
    return dataclasses.replace(QUIET, **changes)


def test_a_group_nobody_objects_to_is_kept() -> None:
    assert decide([QUIET, QUIET, said(handle="other")]) == Decision("kept", "")


@pytest.mark.parametrize(
    ("word", "why"),
    [
        (said(against_keeping="busy"), "busy"),
        (said(operations=8), "one member is ahead"),
        (said(connected=1), "connections of different epochs"),
    ],
)
def test_one_member_is_enough_to_have_it_re_formed(word: Word, why: str) -> None:
    for at in range(3):
        words = [said(handle=f"h{i}") for i in range(3)]
        words[at] = dataclasses.replace(word, handle=f"h{at}")
        assert decide(words) == Decision("reconfigured", why, ("h0", "h1", "h2"))


@pytest.mark.parametrize(
    ("word", "why"),
    [
        (said(against_keeping="busy", against_reconfiguring="spoilt"), "busy, spoilt"),
        (said(against_keeping="busy", against_reconfiguring=NOT_USED), "busy"),
        (said(against_keeping="spare", against_reconfiguring="spare"), "spare"),
        (said(against_keeping="busy", made=2), "busy, backends of different epochs"),
        (said(operations=8, against_reconfiguring="store gone"), "one member is ahead, store gone"),
    ],
)
def test_one_member_is_enough_to_have_it_swapped(word: Word, why: str) -> None:
    assert decide([QUIET, word]) == Decision("swapped", why)
    assert decide([word, QUIET]) == Decision("swapped", why)


def test_words_and_decisions_survive_the_store_and_others_are_refused() -> None:
    words = {"0": QUIET, "tp": said(against_keeping="busy")}
    assert unpack_words(pack_words(words).encode()) == words
    decision = Decision("reconfigured", "busy", ("a", "b"))
    assert unpack_decision(pack_decision(decision).encode()) == decision
    for broken in (b"", b"[]", b'["dropped","",[]]', b"{}"):
        with pytest.raises((ValueError, TypeError)):
            unpack_decision(broken)
    with pytest.raises((ValueError, TypeError)):
        unpack_words(b'{"0":[1,2]}')
