"""Microbatches can be drawn again from where a generation began, untouched by what was done to them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("megatron.core")

from deadpool_megatron.megatron.replay import ReplayIterator


class Counting:
    """A source that says how often it was asked."""

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self) -> Iterator[dict[str, int]]:
        return self

    def __next__(self) -> dict[str, int]:
        self.drawn += 1
        return {"n": self.drawn - 1}


def test_a_rewound_iteration_gets_the_same_microbatches_and_then_new_ones() -> None:
    source = Counting()
    replay = ReplayIterator(source)
    replay.mark(0, 0)
    first = [next(replay)["n"] for _ in range(4)]
    replay.mark(1, 0)
    next(replay)
    replay.rewind(0)
    assert [next(replay)["n"] for _ in range(4)] == first == [0, 1, 2, 3]
    assert [next(replay)["n"] for _ in range(2)] == [4, 5]
    assert source.drawn == 6, "nothing is drawn twice from the source"


def test_a_recovery_may_go_back_more_than_one_iteration() -> None:
    replay = ReplayIterator(Counting())
    for generation in range(4):
        replay.mark(generation, generation - 2)
        next(replay)
    replay.rewind(1)
    assert next(replay)["n"] == 1
    replay.rewind(3)
    assert next(replay)["n"] == 3


def test_what_a_batch_function_takes_out_of_a_microbatch_is_there_again() -> None:
    replay = ReplayIterator(Counting())
    replay.mark(0, 0)
    next(replay).pop("n")
    replay.rewind(0)
    again = next(replay)
    assert again == {"n": 0}
    again.clear()
    replay.rewind(0)
    assert next(replay) == {"n": 0}


def test_what_is_behind_the_oldest_mark_is_forgotten() -> None:
    class Batch(dict[str, int]):
        pass

    batches = [Batch(n=i) for i in range(6)]
    alive = [weakref.ref(b) for b in batches]
    source = (batches.pop(0) for _ in range(6))
    replay = ReplayIterator(source)
    for generation in range(6):
        replay.mark(generation, generation - 2)
        next(replay)
    assert len(replay._drawn) <= 3
    with pytest.raises(KeyError):
        replay.rewind(1)
    assert alive[0]() is None


def test_a_generation_that_is_opened_again_after_a_rewind_begins_where_it_did() -> None:
    replay = ReplayIterator(Counting())
    replay.mark(3, 3)
    next(replay)
    replay.mark(4, 3)
    next(replay)
    replay.rewind(3)
    replay.mark(3, 1)
    assert next(replay)["n"] == 0
    replay.mark(4, 2)
    assert next(replay)["n"] == 1


def test_a_rewind_to_a_mark_that_was_never_made_is_an_error() -> None:
    replay = ReplayIterator(Counting())
    with pytest.raises(KeyError):
        replay.rewind(2)


def test_the_end_of_the_data_is_the_end_of_the_replay_and_can_be_replayed() -> None:
    replay = ReplayIterator(iter([{"n": 0}]))
    replay.mark(0, 0)
    assert list(replay) == [{"n": 0}]
    replay.rewind(0)
    assert list(replay) == [{"n": 0}]


def test_a_renewed_iterator_draws_from_its_new_source_and_can_go_back_to_its_beginning_only() -> None:
    replay = ReplayIterator(iter(range(100)))
    replay.mark(5, 5)
    assert [next(replay) for _ in range(3)] == [0, 1, 2]
    assert replay.remembers(5) and not replay.remembers(2)
    replay.renew(iter("abc"), 2)
    assert replay.remembers(2) and not replay.remembers(5)
    assert [next(replay), next(replay)] == ["a", "b"]
    replay.rewind(2)
    assert [next(replay) for _ in range(3)] == ["a", "b", "c"]


def _seeding() -> Iterator[int]:
    """As torch's DataLoader: a seed is taken when the iteration begins, which a generator does at its first draw."""
    yield int(torch.randint(0, 1 << 30, ()))
    yield from range(1, 100)


def test_what_a_draw_does_to_the_random_numbers_is_done_again() -> None:
    torch.manual_seed(7)
    replay = ReplayIterator(_seeding())
    replay.mark(0, 0)
    begin = torch.get_rng_state()
    drawn = [next(replay), next(replay)]
    after = torch.rand(3)
    replay.rewind(0)
    torch.set_rng_state(begin)
    assert [next(replay), next(replay)] == drawn
    assert torch.equal(torch.rand(3), after)


def test_what_a_spare_draws_ahead_leaves_the_random_numbers_alone() -> None:
    # Those it stands for drew for the first time long ago.
    replay = ReplayIterator(_seeding())
    replay.mark(5, 5)
    assert not replay.started
    torch.manual_seed(7)
    begin = torch.get_rng_state()
    replay.prime()
    assert replay.started and torch.equal(torch.get_rng_state(), begin)
    replay.rewind(5)
    next(replay)
    assert torch.equal(torch.get_rng_state(), begin)
    assert next(replay) == 1
