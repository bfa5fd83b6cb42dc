"""examples/pretrain_gpt.py with data sets so small that a run goes through them several times (``cyclic``)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.training import get_args

import pretrain_external as external


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """``count`` samples from number ``first`` on."""

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        args = get_args()
        return external.sample(self._first + int(index), args.seq_length, args.vocab_size)


def datasets(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test."""
    return Samples(0, 21), Samples(1 << 20, 18), None


if __name__ == "__main__":
    external.example.build_datasets = datasets
    external.example.main()
