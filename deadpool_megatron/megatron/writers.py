"""DeadPool's series in TensorBoard and Weights & Biases, through the writers Megatron has made, beside its own.

Megatron makes both on the last rank only; elsewhere nothing is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deadpool_megatron.megatron.host import Host

if TYPE_CHECKING:
    from deadpool_megatron.megatron.trainer import MegatronTrainer


class Series:
    """What is written for each iteration Megatron writes one for (``--tensorboard-log-interval``)."""

    def __init__(self) -> None:
        self._recoveries = 0
        self._last_s = 0.0

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
