"""What a training loop does from ``train`` on: done again after each recovery, until all of it is done.

After ``train`` come the last checkpoint, evaluations, and the end of checkpoints that are still being written. A node
that is lost in one of them is as lost as one in training: the job goes back to a generation, so training's last
iterations are done again, and after them everything that had been done since, by all ranks in upstream's order. What
must not happen twice (lines, checkpoints) is `once.Once`'s matter.

What comes next is decided apart from doing it: by generators that yield what is to be called, and are sent what it
returned and what it raised. (Not thrown: the frames of a broken step are cleared, which would end a generator there.)
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from deadpool_megatron.recovery.session import EpochClosed, Superseded

Call = Callable[[], Any]
Calls = Generator[Call, tuple[Any, BaseException | None], Any]


class Redo:
    """Of one rank; used by the training thread.

    Args:
        train: upstream's ``train``, to its end.
        recover: makes this rank train again after the error that broke an epoch (None: there was none). Returns what is
            to be done in the place of training, if anything. Raises the error itself when it is this rank's own.
    """

    def __init__(self, train: Call, recover: Callable[[BaseException | None], Call | None]) -> None:
        self._train = train
        self._recover = recover
        self._acts: list[Call] = []
        self._acting = False

    def train(self, recovering: bool) -> Any:
        """What ``train`` returns. ``recovering``: this rank is in a recovery now, as a spare is."""
        return _do(self.training(recovering))

    def do(self, act: Call) -> Any:
        """What ``act`` returns, which upstream does after ``train`` or as a part of something that is done here."""
        return act() if self._acting else _do(self.doing(act))

    def training(self, recovering: bool) -> Calls:
        """The calls that `train` makes."""
        return self._through([self._train], recovering)

    def doing(self, act: Call) -> Calls:
        """The calls that `do` makes, of an act that is part of no other."""
        self._acts.append(act)
        return self._through([act], False)

    def _through(self, todo: list[Call], recovering: bool) -> Calls:
        error: BaseException | None = None
        while True:
            if recovering:
                instead, raised = yield partial(self._recover, error)
                if raised is not None:
                    raise raised
                todo = [instead] if instead is not None else [self._train, *self._acts]
            recovering = self._acting = True
            result, raised = None, None
            for each in todo:
                result, raised = yield each
                if raised is not None:
                    break
            self._acting = False
            if raised is None:
                return result
            if not isinstance(raised, EpochClosed | Exception):
                raise raised
            # (`recover` decides whose error it was; its frames hold what the broken step left, so nothing else has it)
            error = raised if not isinstance(raised, EpochClosed | Superseded) else None
            raised = None


def _do(calls: Calls) -> Any:
    """Make the calls; what their generator returns."""
    try:
        call = next(calls)
        while True:
            try:
                result = call()
            except BaseException as err:  # noqa: BLE001 - whatever it is, the generator decides about it
                call = calls.send((None, err))
            else:
                call = calls.send((result, None))
    except StopIteration as end:
        return end.value
