"""The promise: losses that are on the host already are told at once."""

from __future__ import annotations

import pytest
import torch


def test_values_on_the_host_are_told_exactly_and_at_once() -> None:
    pytest.importorskip("megatron.core")
    from deadpool_megatron.megatron.loss_report import LossReport

    told: list[dict[str, float]] = []
    loss = torch.tensor([1 / 3])
    LossReport().add({"lm loss": loss, "more": 2.5}, told.append)
    assert told == [{"lm loss": float(loss), "more": 2.5}]
