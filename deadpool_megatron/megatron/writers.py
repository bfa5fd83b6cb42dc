"""DeadPool's series in TensorBoard and Weights & Biases, through the writers Megatron has made, beside its own.

Megatron makes both on the last rank only; elsewhere nothing is written.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from deadpool_megatron.megatron.host import Host

if TYPE_CHECKING:
    from deadpool_megatron.megatron.trainer import MegatronTrainer

_AGAIN_S: Final = 60.0


class Series:
    """What is written for each iteration Megatron writes one for (``--tensorboard-log-interval``)."""

    def __init__(self) -> None:
        self._recoveries = 0
        self._last_s = 0.0
        self._spared: Any = None

    def spare(self, host: Host) -> None:
        """See `never_fails`. Call before anything of an iteration is written."""
        tensorboard, _ = host.writers
        if tensorboard is not None and tensorboard is not self._spared:
            self._spared = tensorboard
            never_fails(tensorboard)

    def recovered(self, seconds: float) -> None:
        """This rank was away from training for ``seconds``."""
        self._recoveries += 1
        self._last_s = seconds

    def write(self, host: Host, trainer: MegatronTrainer, iteration: int) -> None:
        """Write the series of ``iteration`` (from 1, as Megatron counts here). Costs nothing where no writer is."""
        tensorboard, wandb = host.writers
        if (tensorboard is None and wandb is None) or iteration % host.args["tensorboard_log_interval"]:
            return
        values = {f"deadpool/{name}": value for name, value in trainer.figures().items()}
        values |= {"deadpool/recoveries": self._recoveries, "deadpool/last-recovery-seconds": self._last_s}
        if tensorboard is not None:
            for name, value in values.items():
                tensorboard.add_scalar(name, value, iteration)
        if wandb is not None:
            wandb.log(values, iteration)


def never_fails(writer: Any, clock: Callable[[], float] = time.monotonic) -> None:
    """What only observes never ends training: a TensorBoard writer (torch's) drops what its disk has no room for.

    Its thread ends by the first error, and every call raises that from then on, Megatron's own too. So it begins a new
    file, a minute later.
    """
    again_at = 0.0

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal again_at
            if clock() < again_at:
                return None
            try:
                return method(*args, **kwargs)
            except Exception as err:  # noqa: BLE001 - those of the file systems that it has drivers for, too
                if not again_at:
                    print(f"deadpool: TensorBoard's file cannot be written: {err}; training goes on", file=sys.stderr)
                again_at = clock() + _AGAIN_S
                writer.file_writer = writer.all_writers = None
                return None

        return call

    for name in dir(writer):
        if name.startswith("add_") or name in ("flush", "close"):
            setattr(writer, name, guarded(getattr(writer, name)))


def may_be_missing(holder: Any, name: str, taking_over: Callable[[], bool]) -> None:
    """Let a spare go without a logger that ``name`` of ``holder`` (a function, or a property) cannot make.

    It is made inside of a take-over, for which all others wait: where the service is away, this spare would fail, and
    the next one, too. One that failed is not tried again; who begins with the job fails as ever.
    """
    what = vars(holder)[name]
    make: Callable[..., Any] = what.fget if isinstance(what, property) else what  # type: ignore[assignment]
    missing = False

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        nonlocal missing
        if missing:
            return None
        try:
            return make(*args, **kwargs)
        except Exception as err:
            if not taking_over():
                raise
            missing = True
            said = (str(err).splitlines() or [type(err).__name__])[0]
            print(f"deadpool: this spare goes without what {name} makes: {said}", file=sys.stderr, flush=True)
            return None

    setattr(holder, name, property(made) if isinstance(what, property) else made)


def is_over(wandb: Any) -> bool:
    """Weights & Biases' run of this process is finished, and writing to it is an error."""
    return wandb is not None and getattr(wandb, "run", wandb) is None
