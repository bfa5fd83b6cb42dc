"""Upstream's own functions build the data of a spare from the same sizes as those of the processes before it."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from emulated import emulated_process, in_emulation  # noqa: F401

ITERS, BATCH, VALIDATION = 3, 2, [7, 5]


@in_emulation
def _data_of_a_spare(directory: Path, several: bool) -> None:
    import torch
    from megatron.core import parallel_state
    from megatron.core.datasets.utils import Split
    from megatron.training import global_vars, training

    from deadpool_megatron.megatron import data_position
    from deadpool_megatron.megatron.lm.run_args import RunArgs

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    command_line = {
        **{"full_validation": True, "multiple_validation_sets": several, "eval_iters": ITERS, "eval_interval": 5},
        **{"train_iters": 10, "train_samples": None, "global_batch_size": BATCH, "micro_batch_size": 1},
        **{"eval_global_batch_size": BATCH, "eval_micro_batch_size": 1, "phase_transition_iterations": None},
        **{"skip_train": False, "perform_rl_step": False, "dataloader_type": "single", "num_workers": 0},
        **{"hybrid_context_parallel": False, "start_eval_at_iter": None, "iteration": 0},
        **{"consumed_train_samples": 0, "consumed_valid_samples": 0, "num_floating_point_operations_so_far": 0},
    }
    sizes: list[Any] = []

    class Data(torch.utils.data.Dataset[int]):
        def __init__(self, split: Any, size: int) -> None:
            self.split, self._size = split, size

        def __len__(self) -> int:
            return self._size

        def __getitem__(self, index: int) -> int:
            return index

    def provider(wanted: Any) -> Any:
        sizes.append(wanted)
        sets = [Data(Split.valid, size) for size in VALIDATION]
        return Data(Split.train, 20), sets if several else sets[0], Data(Split.test, wanted[2])

    def process() -> tuple[data_position.DataPosition, RunArgs]:
        args: Any = SimpleNamespace(**command_line)
        global_vars._GLOBAL_ARGS = args
        return data_position.DataPosition(), RunArgs(args)

    provider.is_distributed = True  # type: ignore[attr-defined]
    call: Any = functools.partial(training.build_train_valid_test_data_iterators, provider)
    data, fields = process()
    chunks = 1 if several else 2  # upstream itself fails with two of both
    for _ in range(chunks):
        data.build(call, fields, None)
    fields.training_begins()
    counted = fields.read(4) | {"consumed_train_samples": 8}
    assert counted["eval_iters"] == (VALIDATION if several else VALIDATION[0])
    before = list(sizes)
    assert before[0][2] == ITERS * BATCH

    at: Any = "a generation"
    data_position._saved_args = lambda at: counted
    data, fields = process()
    sizes.clear()
    for _ in range(chunks):
        train, _, _ = data.build(call, fields, at)
        assert fields._args.eval_iters == counted["eval_iters"]
    assert sizes == before
    assert next(train).tolist() == [8], "the position is the generation's"
    sizes.clear()
    data.rebuild(fields, at)
    assert sizes == before and fields._args.eval_iters == counted["eval_iters"]


@pytest.mark.parametrize("several", [True, False])
def test_full_validation_leaves_a_spare_its_test_data(several: bool, tmp_path: Path) -> None:
    _data_of_a_spare(tmp_path, several)
