"""What a worker does from the moment its training step breaks to the moment it trains again.

::

    step breaks -> declared? -> unwind -> Arrived -> Generation -> restore, ready -+-> formed -> synchronize, prove
                                             |                                     |
                                             '---> Form -> groups form, in a thread '

Groups form beside the transfer and the restoring of state, since they need only that every rank is out of the broken
epoch. A newer epoch at any point starts again at "unwind". The same code runs in survivors and in spares; a spare has
nothing to unwind and no live state, and may have arrived before (`Session.stand_by`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch.distributed import Store

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.comm import Communicators, ReformError
from deadpool_megatron.recovery.session import Session, Superseded
from deadpool_megatron.vault import VaultError

__all__ = ["Patience", "Trainer", "UnexplainedError", "rejoin"]


class UnexplainedError(Exception):
    """The training step raised and no failure was declared in time: the error is this worker's own."""


class Trainer(Protocol):
    """What recovery needs of the training framework. All of it runs on the training thread."""

    @property
    def rank(self) -> int:
        """The coordinate."""

    @property
    def live_generation(self) -> int | None:
        """The generation the live state is, None when it is torn (or was never there)."""

    @property
    def live_epoch(self) -> int:
        """In which that state was computed; a restored one is of its version's epoch."""

    def unwind(self) -> None:
        """Drop what the broken step left behind: handles, gradients, started timers, pending works."""

    def restore(self, agreed: r.Generation) -> None:
        """Make unique state and small state those of the agreed generation. No communication."""

    def synchronize(self) -> None:
        """Bring back the reconstructible state (16-bit parameters) by collectives on the new communicators."""

    def prove(self) -> None:
        """Compare all ranks, by collectives; raises what ends the job when their state differs and stays different."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker waits for others, in seconds."""

    declare: float
    newer_epoch: float


def rejoin(
    session: Session,
    communicators: Communicators,
    trainer: Trainer,
    store: Callable[[], Store],
    patience: Patience,
    is_communication_error: Callable[[BaseException], bool],
    error: BaseException | None,
) -> r.Declare:
    """Take part in the recovery this worker is in, until it can train again.

    Args:
        store: makes (or returns) the client of the rendezvous store.
        is_communication_error: tells an error a lost peer may have caused from one that is the worker's own.
        error: what broke the step, None in a spare.

    Returns:
        The declaration of the epoch that was joined.

    Raises:
        UnexplainedError: nothing was declared within the patience.
    """
    if error is not None and not session.closed and is_communication_error(error):
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:500]
        session.tell(r.PeerError(session.joined_epoch, 0, trainer.rank, text))
    declared = session.wait_declared(patience.declare)
    if declared is None:
        raise UnexplainedError
    while True:
        epoch = declared.epoch
        try:
            communicators.abort(epoch - 1, left=True)
            points.reach("recovery.aborted")
            trainer.unwind()
            points.reach("recovery.unwound")
            session.arrive(epoch, trainer.rank, trainer.live_generation, trainer.live_epoch)
            agreed = session.wait_generation(epoch)
            points.reach("recovery.agreed")
            try:
                trainer.restore(agreed)
            except VaultError as err:
                # Bytes that are not those that were written are never trained on: another copy, or an older generation.
                if session.refuse(agreed, err, patience.newer_epoch):
                    raise Superseded(session.declared_epoch) from None
                raise UnexplainedError from err
            points.reach("recovery.restored-local")
            session.step("ready", epoch)
            session.wait_form(epoch)
            points.reach("recovery.re-forming")
            report = communicators.reform(epoch, store)
            session.step("formed", epoch, report.groups, report.reformed)
            points.reach("recovery.re-formed")
            trainer.synchronize()
            points.reach("recovery.synchronized")
            session.joined_epoch = epoch
            session.step("restored", epoch)
            trainer.prove()
            points.reach("recovery.compared")
            return declared
        except Superseded:
            pass
        except (ReformError, RuntimeError) as err:
            if not session.wait_newer(epoch, 0.0):
                session.tell(r.PeerError(epoch, 0, trainer.rank, f"{type(err).__name__}: {err}"[:500]))
                if not session.wait_newer(epoch, patience.newer_epoch):
                    raise UnexplainedError from err
        newer = session.wait_declared(patience.newer_epoch)
        assert newer is not None
        declared = newer
