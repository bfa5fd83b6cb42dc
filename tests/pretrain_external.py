"""examples/pretrain_gpt.py with data loaders of our own: Megatron's public ``--dataloader-type external``.

The loaders are endless iterators that begin where the job stands (``args.consumed_*_samples``), as that interface wants
it. Like instruction data, each sample counts the loss of its second part ("the answer") alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import get_args

spec = importlib.util.spec_from_file_location(
    "pretrain_gpt_example", Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"
)
assert spec is not None and spec.loader is not None
example: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def sample(index: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """One sample, a function of its index."""
    generator = torch.Generator().manual_seed(index)
    text = torch.randint(0, vocabulary, (length + 1,), generator=generator)
    answer = int(torch.randint(0, length // 2, (), generator=generator))
    causal = torch.tril(torch.ones((1, length, length))) < 0.5
    return {
        "tokens": text[:-1],
        "labels": text[1:],
        "loss_mask": (torch.arange(length) >= answer).float(),
        "position_ids": torch.arange(length),
        "attention_mask": causal,
    }


def microbatches(consumed: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """This replica's microbatches from a number of consumed samples on."""
    args = get_args()
    replicas = parallel_state.get_data_parallel_world_size()
    index = seed + consumed + parallel_state.get_data_parallel_rank() * args.micro_batch_size
    while True:
        samples = [sample(index + i, args.seq_length, args.vocab_size) for i in range(args.micro_batch_size)]
        yield {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
        index += replicas * args.micro_batch_size


def loaders(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test."""
    args = get_args()
    return (
        microbatches(args.consumed_train_samples, 0),
        microbatches(args.consumed_valid_samples, 1 << 20),
        microbatches(0, 1 << 21),
    )


if __name__ == "__main__":
    example.build_datasets = loaders
    example.main()
