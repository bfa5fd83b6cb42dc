"""What Megatron does for an iteration besides training it, done once although the iteration may be repeated.

A recovery goes back to the start of an iteration, perhaps of one whose line is printed, whose evaluation is over or
whose checkpoint is written. What has been done is told to the coordinator (`SideEffect`) and comes back with the agreed
generation: repeated lines and evaluations are computed again, since averages and data positions depend on them, but not
printed or written again; a checkpoint that is there is not written again. An asynchronous checkpoint that the failure
caught before it was complete cannot be finished without the lost node: the survivors drop it, and the next iteration's
state is saved in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.megatron.host import Host
from deadpool_megatron.recovery import Session


def _nothing(*args: Any, **kwargs: Any) -> None: ...


class Once:
    """One rank's account. Iterations are Megatron's: 1 is the first."""

    def __init__(
        self, host: Host, session: Session, check: Callable[[], None], rank: int, world_size: int, first: int
    ) -> None:
        """``first``: the iteration the job started with, the same on every rank and on a spare. ``check``: raises when
        the epoch has ended; what is told or printed then may be garbage, and would keep back the right line later."""
        self._host = host
        self._session = session
        self._check = check
        self._rank = rank
        self._tells = rank == world_size - 1  # the rank whose lines Megatron prints
        self._first = first
        self._done: dict[r.SideEffectKind, int] = {}
        self._saving: int | None = None

    def agreed(self, done: dict[r.SideEffectKind, int]) -> None:
        """A recovery: what had been done before it, the same on every rank."""
        self._done = dict(done)
        self._saving = None

    def done(self, act: r.SideEffectKind, iteration: int) -> bool:
        """It has been done, before the last recovery."""
        return iteration <= self._done.get(act, -1)

    def tell(self, act: r.SideEffectKind, iteration: int) -> None:
        """It is done now. Raises what ``check`` raises."""
        self._check()
        if act == "log" and iteration % self._host.args["log_interval"]:
            return
        if self._tells and not self.done(act, iteration):
            self._session.tell(r.SideEffect(0, self._rank, self._session.joined_epoch, iteration, act))

    @contextlib.contextmanager
    def quiet_if(self, done: bool) -> Iterator[None]:
        """With ``done``, upstream prints and writes nothing: its print and its writers are out of reach meanwhile.
        Else it does so while the epoch lasts."""
        before = [(holder, name, getattr(holder, name)) for holder, name in self._host.outlets()]
        for holder, name, call in before:
            setattr(holder, name, self._while_the_epoch_lasts(call, done))
        try:
            yield
        finally:
            for place in before:
                setattr(*place)

    def _while_the_epoch_lasts(self, call: Any, done: bool) -> Any:
        if isinstance(call, property):
            return property(self._while_the_epoch_lasts(call.fget, done))
        if done:
            return _nothing

        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check()
            return call(*args, **kwargs)

        return checked

    # ---- checkpoints

    def save_begins(self, iteration: int) -> None:
        """A checkpoint is being written, in the background perhaps."""
        self._saving = iteration

    def save_ends(self) -> None:
        """No checkpoint is being written any more."""
        queue = self._host.async_saves
        if self._saving is not None and not (queue and queue.get_num_unfinalized_calls()):
            points.reach("save.finalized")
            self.tell("save", self._saving)
            self._saving = None

    def owed(self, iteration: int, interval: int | None) -> bool:
        """A checkpoint was due before ``iteration``, the first after a recovery, and is not there."""
        if not interval or not self._session.joined_epoch:
            return False
        due = iteration // interval * interval
        return due > max(self._first, self._done.get("save", -1)) and due != iteration
