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
from typing import TYPE_CHECKING, Any, Protocol

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.recovery.session import Session, Superseded
from deadpool_megatron.vault import VaultError

if TYPE_CHECKING:  # who has no groups of torch, as the simulation, is without it
    from torch.distributed import Store

    from deadpool_megatron.comm import Communicators


class UnexplainedError(Exception):
    """The training step raised and no failure was declared in time: the error is this worker's own."""


def device_is_lost(error: BaseException | None) -> bool:
    """A kernel has failed: an assert that garbage has tripped, an illegal address.

    CUDA returns that error to every later call of this process, so only another process can go on.
    """
    import torch

    device_error: Any = getattr(torch, "AcceleratorError", ())  # newer torch; nothing is an instance of ()
    while error is not None:
        if isinstance(error, device_error):
            return True
        error = error.__cause__ or error.__context__
    return False


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

    def let_go(self) -> None:
        """Drop what keeps the communicators of the broken step from ending: captured graphs."""

    def unwind(self) -> None:
        """Drop what the broken step left behind: handles, gradients, started timers, pending works. Nothing of it runs
        on the device any more when this returns."""

    def restore(self, agreed: r.Generation) -> None:
        """Make unique state and small state those of the agreed generation. No communication."""

    def synchronize(self) -> None:
        """Bring back the reconstructible state (16-bit parameters) by collectives on the new communicators."""

    def prove(self) -> None:
        """Compare all ranks, by collectives; raises what ends the job when their state differs and stays different."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker waits for a declaration, in seconds."""

    declare: float  # no error came before it: a spare, or a step that has seen the epoch end
    peer: float  # after an error that a lost peer may have caused
    own: float  # after one that looks like the worker's own


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

    Whatever is raised after the epoch has ended is the epoch's: over NCCL an aborted collective returns garbage, and
    what the step makes of that may be any error.

    Returns:
        The declaration of the epoch that was joined.

    Raises:
        UnexplainedError: nothing was declared within the patience, or ``error`` is one of the device.
        Exception: what the trainer raised in the recovery, if no newer epoch explains it.
    """

    def explained(err: BaseException, epoch: int, by_peer: bool) -> bool:
        """Wait for an epoch newer than ``epoch``; False when none is declared, and it makes no difference."""
        if device_is_lost(err):
            return False
        if session.declared_epoch > epoch:
            return True
        if by_peer:
            text = f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"[:500]
            session.tell(r.PeerError(epoch, 0, trainer.rank, text))
        return session.wait_newer(epoch, patience.peer if by_peer else patience.own)

    if error is not None:
        by_peer = communicators.poisoned or is_communication_error(error)
        if not explained(error, session.joined_epoch, by_peer):
            raise UnexplainedError
    declared = session.wait_declared(patience.declare)
    if declared is None:
        raise UnexplainedError("no epoch was declared in time")
    while True:
        epoch = declared.epoch
        try:
            trainer.let_go()
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
                if session.refuse(agreed, err, patience.peer):
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
        except UnexplainedError:
            raise
        except Exception as err:
            # Comparing garbage ends in other errors than broken connections do.
            by_peer = isinstance(err, RuntimeError)
            if not explained(err, epoch, by_peer):
                if by_peer and not device_is_lost(err):
                    raise UnexplainedError from err
                raise
        newer = session.wait_declared(patience.peer)
        assert newer is not None
        declared = newer
