"""What comes after training is done again after a recovery, by every rank in the same order."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from deadpool_megatron.recovery import EpochClosed, Redo, Superseded


class _Rank:
    """Fails at given calls; notes what it does."""

    def __init__(self, *fails: tuple[str, BaseException]) -> None:
        self.done: list[str] = []
        self._fails = list(fails)
        self.instead: Callable[[], Any] | None = None
        self.redo = Redo(self.act("train"), self._recover)

    def act(self, name: str) -> Callable[[], str]:
        def do() -> str:
            self.done.append(name)
            if self._fails and self._fails[0][0] == name:
                raise self._fails.pop(0)[1]
            return f"result of {name}"

        return do

    def _recover(self, error: BaseException | None) -> Callable[[], Any] | None:
        self.done.append(f"recover({error or ''})")
        if isinstance(error, ValueError):
            raise error
        return self.instead


def test_a_loss_in_the_last_save_goes_back_and_does_all_that_came_since_again() -> None:
    rank = _Rank(("evaluate", EpochClosed()), ("save", RuntimeError("peer")))
    assert rank.redo.train(False) == "result of train"
    assert rank.redo.do(rank.act("evaluate")) == "result of evaluate"
    assert rank.redo.do(rank.act("save")) == "result of save"
    since = ["train", "evaluate", "save"]
    assert rank.done == [
        *("train", "evaluate", "recover()", "train", "evaluate"),
        *("save", "recover(peer)", *since),
    ]


def test_losses_on_the_way_back_go_back_once_more() -> None:
    rank = _Rank(("save", RuntimeError("one")), ("train", Superseded(3)), ("save", RuntimeError("two")))
    rank.redo.do(rank.act("save"))
    assert rank.done == [
        *("save", "recover(one)", "train", "recover()", "train", "save", "recover(two)", "train", "save"),
    ]


def test_what_a_rank_does_within_training_is_no_act_of_its_own() -> None:
    rank = _Rank(("train", RuntimeError("peer")))
    inner = rank.act("save")
    redo = Redo(lambda: (rank.act("train")(), rank.redo.do(inner)), rank._recover)
    rank.redo = redo
    redo.train(False)
    assert rank.done == ["train", "recover(peer)", "train", "save"]


def test_a_spare_recovers_first_and_an_own_error_or_a_leaving_rank_ends_it() -> None:
    rank = _Rank(("save", ValueError("own")))
    assert rank.redo.train(True) == "result of train"
    with pytest.raises(ValueError, match="own"):
        rank.redo.do(rank.act("save"))
    assert rank.done == ["recover()", "train", "save", "recover(own)"]
    leaving = _Rank(("train", SystemExit(0)))
    with pytest.raises(SystemExit):
        leaving.redo.train(False)
    assert leaving.done == ["train"]


def test_what_is_to_be_done_in_the_place_of_training_is_done_alone() -> None:
    rank = _Rank(("save", RuntimeError("peer")))
    rank.instead = rank.act("rescue")
    assert rank.redo.do(rank.act("save")) == "result of rescue"
    assert rank.done == ["save", "recover(peer)", "rescue"]


@pytest.mark.parametrize("error", [RuntimeError, EpochClosed])
def test_nothing_holds_what_the_broken_step_left_while_the_rank_recovers(error: type[BaseException]) -> None:
    class Activations:
        pass

    left: list[weakref.ref[Activations]] = []

    def train() -> str:
        activations = Activations()
        if not left:
            left.append(weakref.ref(activations))
            raise error
        return "trained"

    def recover(error: BaseException | None) -> None:
        while error is not None:  # as `hooks._drop_frames`
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        assert left[0]() is None

    assert Redo(train, recover).train(False) == "trained"
