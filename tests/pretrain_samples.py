"""The example, with a record of the samples this process draws: ``SAMPLES/rank-R`` has iteration and number of each."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.training import get_args

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"


def _recorded(kind: Any) -> None:
    draw = kind.__getitem__

    def __getitem__(self: Any, number: int | None) -> Any:
        args = get_args()
        iteration = max(args.iteration, getattr(args, "curr_iteration", 0))  # the first draw comes before the loop
        with (Path(os.environ["SAMPLES"]) / f"rank-{torch.distributed.get_rank()}").open("a") as file:
            file.write(f"{iteration} {number}\n")
        return draw(self, number)

    kind.__getitem__ = __getitem__


for each in {GPTDataset, MockGPTDataset}:
    if "__getitem__" in vars(each):
        _recorded(each)
runpy.run_path(str(EXAMPLE), run_name="__main__")
