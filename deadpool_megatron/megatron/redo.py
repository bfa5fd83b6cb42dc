"""What upstream's ``pretrain`` does from ``train`` on: done again after each recovery, until all of it is done.

After ``train`` come the last checkpoint, evaluations, and the end of checkpoints that are still being written. A node
that is lost in one of them is as lost as one in training: the job goes back to a generation, so training's last
iterations are done again, and after them everything that had been done since, by all ranks in upstream's order. What
must not happen twice (lines, checkpoints) is `once.Once`'s matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deadpool_megatron.megatron.trainer import EpochClosed
from deadpool_megatron.recovery import Superseded


class Redo:
    """Of one rank; used by the training thread.

    Args:
        train: upstream's ``train``, to its end.
        recover: makes this rank train again after the error that broke an epoch (None: there was none). Returns what is
            to be done in the place of training, if anything. Raises the error itself when it is this rank's own.
    """

    def __init__(
        self, train: Callable[[], Any], recover: Callable[[BaseException | None], Callable[[], Any] | None]
    ) -> None:
        self._train = train
        self._recover = recover
        self._acts: list[Callable[[], Any]] = []
        self._acting = False

    def train(self, recovering: bool) -> Any:
        """What ``train`` returns. ``recovering``: this rank is in a recovery now, as a spare is."""
        return self._through([self._train], recovering)

    def do(self, act: Callable[[], Any]) -> Any:
        """What ``act`` returns, which upstream does after ``train`` or as a part of something that is done here."""
        if self._acting:
            return act()
        self._acts.append(act)
        return self._through([act], False)

    def _through(self, todo: list[Callable[[], Any]], recovering: bool) -> Any:
        error: BaseException | None = None
        result: Any = None
        while True:
            if recovering:
                instead = self._recover(error)
                error = None
                todo = [instead] if instead is not None else [self._train, *self._acts]
            recovering = self._acting = True
            try:
                for each in todo:
                    result = each()
                return result
            except (EpochClosed, Superseded):
                pass
            except Exception as err:  # noqa: BLE001 - whatever broke: `recover` decides whose error it was
                error = err
            finally:
                self._acting = False
