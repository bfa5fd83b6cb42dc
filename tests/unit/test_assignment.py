"""Who sits where: every assignment is a bijection, and spares are chosen as said."""

from __future__ import annotations

import doctest

from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.records import SlotAddress


def test_the_examples_in_the_documentation_hold() -> None:
    assert doctest.testmod(placing).failed == 0 < doctest.testmod(placing).attempted


def test_ranks_are_numbered_as_torchrun_numbers_them() -> None:
    assert placing.initial(3, 2) == [SlotAddress(rank // 2, rank % 2) for rank in range(6)]


def test_a_replacement_changes_the_lost_nodes_slots_and_no_other() -> None:
    before = placing.initial(4, 2)
    after = placing.replace_nodes(before, {1: 4, 3: 5})
    assert [rank for rank in range(8) if before[rank] != after[rank]] == [2, 3, 6, 7]
    assert [s.local for s in after] == [s.local for s in before] and len(set(after)) == 8
    assert placing.nodes_of(after) == [0, 4, 2, 5]
    assert placing.ranks_of(after, 4) == {0: 2, 1: 3} and placing.ranks_of(after, 1) == {}


def test_spares_are_taken_in_the_order_given_and_only_when_there_are_enough() -> None:
    assert placing.choose_spares({3, 1}, [7, 5, 6]) == {1: 7, 3: 5}
    assert placing.choose_spares({3, 1}, [7]) is None
    assert placing.choose_spares(set(), []) == {}


def test_a_rescue_deals_the_lost_coordinates_out_to_extra_slots_of_the_survivors() -> None:
    before = placing.initial(3, 2)
    after = placing.rescue(before, {1}, 2)
    assert after is not None and after[2] == SlotAddress(0, 2) and after[3] == SlotAddress(2, 2)
    assert after[:2] == before[:2] and after[4:] == before[4:]


def test_a_rescue_of_a_rescue_uses_no_slot_twice() -> None:
    after = placing.rescue(placing.initial(4, 2), {0}, 2)
    assert after is not None
    again = placing.rescue(after, {0, 1}, 2)
    assert again is not None and len(set(again)) == 8 and set(placing.nodes_of(again)) == {2, 3}
    for rank, slot in enumerate(after):
        if slot.node in (2, 3):
            assert again[rank] == slot, "a survivor's coordinate has moved"


def test_nobody_rescues_when_nobody_survives() -> None:
    assert placing.rescue(placing.initial(2, 1), {0, 1}, 1) is None
    assert placing.rescue(placing.initial(3, 1), {0}, 1, (), {(1, 0), (2, 0)}) is None


def test_a_rescue_uses_spares_before_survivors_take_more_and_passes_over_who_has_no_room() -> None:
    before = placing.initial(3, 2)
    assert placing.rescue(before, {0, 1, 2}, 2, [5]) == [SlotAddress(5, local) for local in range(6)]
    after = placing.rescue(before, {0, 1}, 2, [5])
    assert after == [*(SlotAddress(5, 0), SlotAddress(5, 1), SlotAddress(2, 2), SlotAddress(5, 2)), *before[4:]]
    assert placing.rescue(before, {0}, 2, [5], {(5, 0)}) == [SlotAddress(1, 2), SlotAddress(2, 2), *before[2:]]
    after = placing.rescue(before, {0}, 2, [5], {(1, 2)})  # of a node that was to have rank 2, and has rank 3
    assert after == [SlotAddress(5, 0), SlotAddress(5, 1), SlotAddress(2, 2), *before[3:]]
