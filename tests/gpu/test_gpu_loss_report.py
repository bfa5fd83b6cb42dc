"""The promise on a CUDA device: losses are told exactly and in order, and nobody waits for them."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_losses_are_told_in_order_once_the_device_has_them() -> None:
    from deadpool_megatron.megatron.loss_report import LossReport

    report, told = LossReport(), []
    losses = [torch.tensor([0.1 * n], device="cuda") for n in range(4)]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(3.0 * torch.cuda.get_device_properties(0).clock_rate * 1000))
    over = torch.cuda.current_stream().record_event()
    for loss in losses:
        report.add({"lm loss": loss + 1}, told.append)
        report.poll()
    assert not told and not over.query()
    report.flush()
    assert told == [{"lm loss": float(loss + 1)} for loss in losses]
