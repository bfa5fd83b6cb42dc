"""Microbatches can be drawn again from where a generation began, untouched by what was done to them."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("megatron.core")

from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training.datasets import data_samplers
from megatron.training.training import cyclic_iter

from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.replay import Passes, ReplayIterator
from deadpool_megatron.megatron.trainer import _under_rerun
from deadpool_megatron.snapshot import capture_host_rng, restore_host_rng


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


def test_a_loader_with_a_position_of_its_own_is_refused() -> None:
    class Energon(Counting):
        save_state = Counting.__next__

    with pytest.raises(UserError, match=r"^data loader Energon is not supported"):
        _under_rerun(RerunDataIterator(Energon()))
    assert isinstance(_under_rerun(RerunDataIterator(Counting())), ReplayIterator)


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
    assert replay.position == 0
    torch.manual_seed(7)
    begin = torch.get_rng_state()
    replay.seek(3)
    assert replay.position == 3 and torch.equal(torch.get_rng_state(), begin)
    replay.rewind(5)
    next(replay)
    assert replay.position == 4 and torch.equal(torch.get_rng_state(), begin)
    assert next(replay) == 1


# ---- loaders that begin again at their end


class Numbers(Dataset[int]):
    """Samples that say which they are, and what the random numbers were."""

    def __init__(self, random: bool) -> None:
        self._random = random

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> int:
        return 1000 * index + (int(torch.randint(0, 1000, ())) + random.randrange(7) if self._random else 0)


MICRO_BATCH, REPLICAS = 2, 2
SAMPLERS = ["random", "random-sharded", "random-seeded", "full-validation-0", "full-validation-1"]


def _loader(sampler: str, consumed: int, workers: int) -> DataLoader[int]:
    """As upstream's ``build_pretraining_data_loader`` makes one."""
    data: Dataset[int] = Numbers(random=sampler == "random-seeded")
    if sampler == "random-seeded":
        data = data_samplers.RandomSeedDataset(data, 1234)
    rank = int(sampler[-1]) if sampler.startswith("full") else 1
    if sampler.startswith("full"):
        batches = data_samplers.MegatronFullValidationSampler(21, rank, REPLICAS)  # one sample more on rank 0
    else:
        batches = data_samplers.MegatronPretrainingRandomSampler(
            data, 22, consumed, MICRO_BATCH, rank, REPLICAS, sampler.endswith("sharded")
        )
    return DataLoader(data, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_spare_takes_up_a_loader_wherever_it_stands(sampler: str, workers: int) -> None:
    torch.manual_seed(7)
    reference = cyclic_iter(_loader(sampler, 0, workers))
    survivor = ReplayIterator(Passes(_loader(sampler, 0, workers)))
    states, items = [capture_host_rng()], []
    for _ in range(2 * 11 + 3):
        items.append(next(reference).tolist())
        states.append(capture_host_rng())
    restore_host_rng(states[0])
    for k, item in enumerate(items):
        survivor.mark(k, k)
        position = survivor.position
        if not workers or k in (0, 1, 4, 5, 6, 10, 11, 12):
            spare = ReplayIterator(Passes(_loader(sampler, k * MICRO_BATCH * REPLICAS, workers)))
            spare.mark(k, k)
            restore_host_rng(states[k])
            if position:
                spare.seek(position)
            assert capture_host_rng() == states[k] and spare.position == position
            for i in range(k, min(k + 12, len(items))):
                assert next(spare).tolist() == items[i], (k, i)
                assert capture_host_rng() == states[i + 1], (k, i)
        restore_host_rng(states[k])
        assert next(survivor).tolist() == item and capture_host_rng() == states[k + 1]


def test_a_loader_without_data_says_so() -> None:
    with pytest.raises(RuntimeError, match="has no data"):
        next(Passes([]))
