"""The gate before the optimizer's step: on a device the host waits for the gradients, then looks at the epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.mark.parametrize("ended", [False, True])
def test_the_host_waits_for_the_gradients_whoever_has_read_their_norm(
    monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    pytest.importorskip("megatron.core")
    from deadpool_megatron.megatron.trainer import MegatronTrainer
    from deadpool_megatron.recovery import EpochClosed

    seen: list[str] = []
    poison = SimpleNamespace(poisoned=False)

    def wait() -> None:
        """The abort comes while the host waits for the device."""
        seen.append("wait")
        poison.poisoned = ended

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=wait))
    trainer: Any = object.__new__(MegatronTrainer)
    trainer._trace, trainer._graphed, trainer._on_device, trainer._blocked = None, False, True, 0.0
    trainer._session, trainer._communicators = SimpleNamespace(closed=False), poison
    trainer._snapshotter = SimpleNamespace(gate=lambda: seen.append("gate"))
    trainer.live_generation = 7
    step = trainer._gated(lambda: seen.append("step"))
    if ended:
        with pytest.raises(EpochClosed):
            step()
        assert seen == ["gate", "wait"] and trainer.live_generation == 7
    else:
        step()
        assert seen == ["gate", "wait", "step"] and trainer.live_generation is None
