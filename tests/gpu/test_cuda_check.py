"""The promise on a CUDA device: a spare's check finds the known product, and copies over the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_device_computes_what_is_known_and_what_it_copies_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deadpool_megatron.megatron import self_check
    from deadpool_megatron.vault import Scratch

    monkeypatch.setenv("LOCAL_RANK", "0")
    torch.cuda.init()
    state, scratch = torch.cuda.get_rng_state(), Scratch(str(tmp_path / "scratch"))
    assert self_check.check(scratch.path) == "" and scratch.copied
    assert "on cuda:0 is wrong" in self_check.check(scratch.path, add=1)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    scratch.close()
