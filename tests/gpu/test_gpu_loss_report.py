"""The promise on a CUDA device: losses are told exactly and in order, and nobody waits for them."""

from __future__ import annotations

import time

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
    torch.cuda._sleep(int(0.5 * torch.cuda.get_device_properties(0).clock_rate * 1000))
    start = time.perf_counter()
    for loss in losses:
        report.add({"lm loss": loss + 1}, told.append)
        report.poll()
    assert time.perf_counter() - start < 0.2 and not told
    report.flush()
    assert told == [{"lm loss": float(loss + 1)} for loss in losses]
