"""Ranks of a node launch together or not at all: `megatron.muster`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from deadpool_megatron.cluster.agent.pulse import shared_page
from deadpool_megatron.emulation.graphs import CUDAGraph
from deadpool_megatron.megatron.muster import _EPOCH_SHIFT, Muster, meet_before_replays
from waiting import until


class EpochClosed(BaseException):
    """As of the trainer."""


class Rank:
    """One of two ranks of a node of two, the second node of the job, on a thread of its own."""

    def __init__(self, fd: int, local: int) -> None:
        self.epoch, self.closed, self.launched = 0, False, 0
        self.muster = Muster(fd, 2 + local, 2, lambda: self.epoch, self._check)
        self.left: list[BaseException] = []
        self._thread: threading.Thread | None = None

    def _check(self) -> None:
        if self.closed:
            raise EpochClosed

    def launch(self, times: int) -> None:
        def run() -> None:
            try:
                for _ in range(times):
                    self.muster.meet([2, 3])
                    self.launched += 1
            except EpochClosed as closed:
                self.left.append(closed)
                self.muster.leave()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def through(self) -> None:
        assert self._thread is not None
        self._thread.join()


@pytest.fixture
def ranks() -> tuple[Rank, Rank]:
    fd = shared_page("muster")
    return Rank(fd, 0), Rank(fd, 1)


def _waits(rank: Rank, times: int) -> Callable[[], bool]:
    """It has come for the launch after so many."""
    return lambda: rank.muster._times == times + 1 and rank.launched == times


def test_who_comes_first_waits_for_the_other_at_every_launch(ranks: tuple[Rank, Rank]) -> None:
    one, other = ranks
    one.launch(3)
    for times in range(3):
        until(_waits(one, times))
        until(lambda: one.muster.waiting)
        other.launch(1)
        other.through()
    one.through()
    assert one.launched == other.launched == 3
    assert not one.muster.waiting and not other.muster.waiting


def test_nobody_launches_what_the_other_has_left(ranks: tuple[Rank, Rank]) -> None:
    one, other = ranks
    one.launch(5)
    other.launch(2)
    other.through()
    until(_waits(one, 2))
    other.closed = True
    other.muster.leave()
    assert one.launched == 2 and not one.left, "it does not know yet that the epoch is over"
    one.closed = True
    one.through()
    assert one.left and one.launched == other.launched == 2


def test_who_has_come_launches_with_the_other_though_the_epoch_is_over(ranks: tuple[Rank, Rank]) -> None:
    one, other = ranks
    one.launch(1)
    until(_waits(one, 0))
    one.closed = True  # the other may have seen it come
    other.launch(1)
    one.through()
    other.through()
    assert one.launched == other.launched == 1


def test_a_new_epoch_begins_from_the_start_and_what_was_left_before_counts_no_more(ranks: tuple[Rank, Rank]) -> None:
    one, other = ranks
    for rank, times in ((one, 4), (other, 4)):
        rank.launch(times)
    for rank in ranks:
        rank.through()
        rank.muster.leave()
    one.epoch = 2  # the other is still on its way there
    one.launch(2)
    until(lambda: one.muster._in_epoch == 2)
    one.closed = True
    other.epoch = 2
    other.launch(1)
    other.through()
    other.muster.leave()
    one.through()
    assert (one.launched, other.launched) == (5, 5) and one.left, "the second one is begun by nobody"


def test_a_worker_is_bereft_when_a_neighbour_is_replaced_and_it_is_not(ranks: tuple[Rank, Rank]) -> None:
    one, other = ranks
    assert not one.muster.bereft([3]), "it has launched nothing with anybody yet"
    one.launch(1)
    other.launch(1)
    one.through()
    other.through()
    assert one.muster.bereft([3]) and other.muster.bereft([0, 2])
    assert not one.muster.bereft([2, 3]) and not one.muster.bereft([0, 1])


def test_who_depends_on_another_is_bereft_with_it_before_they_have_launched_anything(ranks: tuple[Rank, Rank]) -> None:
    one, _ = ranks
    one.muster.depend_on(range(2, 4))
    assert one.muster.bereft([3]) and not one.muster.bereft([2, 3])


def test_a_graph_that_works_on_such_a_buffer_is_launched_together_too(
    ranks: tuple[Rank, Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = ranks
    replayed: list[CUDAGraph] = []
    graph, dispatcher = CUDAGraph(), SimpleNamespace(_hybrid_ep_buffer=None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(CUDAGraph, "replay", replayed.append)
    monkeypatch.setattr("torch.distributed.get_process_group_ranks", lambda group: group)
    meet_before_replays(dispatcher, lambda: one.muster)
    graph.replay()
    assert replayed == [graph] and one.muster._times == 0, "there is no buffer yet"
    dispatcher._hybrid_ep_buffer = SimpleNamespace(group=[2, 3])
    thread = threading.Thread(target=graph.replay, daemon=True)
    thread.start()
    until(lambda: one.muster.waiting)
    assert len(replayed) == 1
    other.launch(1)
    thread.join()
    assert len(replayed) == 2


def test_launches_of_months_are_counted(ranks: tuple[Rank, Rank]) -> None:
    one, other = ranks
    for rank in ranks:
        rank.muster._in_epoch, rank.muster._times = 0, 2**32
        rank.launch(1)
    one.through()
    other.through()
    assert one.muster._word() < 1 << _EPOCH_SHIFT
