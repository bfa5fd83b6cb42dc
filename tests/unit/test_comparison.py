"""Who differs from whom, and which fields of Megatron's args are state: pure parts of what makes equal mean equal."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from deadpool_megatron.megatron.comparison import PARTS, Difference, _constant, differences
from deadpool_megatron.megatron.lm.run_args import RunArgs
from deadpool_megatron.megatron.optimizer_state import plain_fields, put_fields
from deadpool_megatron.megatron.small_state import unlike
from deadpool_megatron.snapshot import encode

PARAMETERS, JOB = PARTS.index("parameters"), 0
COUNT = {"num_floating_point_operations_so_far": 5}


def _table(ranks: int, replicas: int) -> list[list[tuple[int, int]]]:
    """All alike; ranks that are equal modulo ``ranks / replicas`` are replicas of each other."""
    stages = ranks // replicas
    return [
        [(0, 1) if p == JOB else (rank % stages, 10 * p + rank % stages) for p in range(len(PARTS))]
        for rank in range(ranks)
    ]


def test_what_is_alike_where_it_has_to_be_is_no_difference() -> None:
    assert differences(_table(8, 4)) == []


def test_the_rank_that_differs_from_most_is_named_and_two_that_differ_from_each_other_are_both() -> None:
    table = _table(6, 3)
    table[4][PARAMETERS] = (0, 99)
    assert differences(table) == [Difference("parameters", (4,))]
    table = _table(4, 2)
    table[3][PARAMETERS] = (1, 99)
    assert differences(table) == [Difference("parameters", (1, 3))]
    assert str(differences(table)[0]) == "parameters of ranks 1, 3"


def test_what_the_whole_job_has_alike_is_compared_over_all_ranks() -> None:
    table = _table(8, 2)
    table[7][JOB] = (0, 2)
    assert differences(table) == [Difference(PARTS[JOB], (7,))]


@pytest.mark.parametrize(
    "own",
    [
        {"wandb_exp_name": "llama-12:30"},  # made of the time
        {"wandb_exp_name": None},
        {"mlflow_run_name": "llama-12:30"},
        {"comet_experiment_name": "llama-12:30"},
        {"comet_tags": ["12:30"]},
        {"tensorboard_dir": "tb-12:30"},
        {"num_workers": 6},  # made of the processors
        {"data_cache_path": "/local/cache"},
        {"data_path": ["1", "/local/data"]},
    ],
)
def test_what_a_spare_may_have_otherwise_ends_no_job(own: dict[str, Any]) -> None:
    settings = {
        **{"lr": 1.0, "log_interval": 1, "num_workers": 8, "wandb_exp_name": "llama-12:00", "tensorboard_dir": "tb"},
        **{"mlflow_run_name": "llama-12:00", "comet_experiment_name": "llama-12:00", "comet_tags": None},
        **{"data_cache_path": "/shared/cache", "data_path": ["1", "/shared/data"]},
    }
    assert _constant(settings | own) == _constant(settings)
    assert _constant(settings | own | {"lr": 2.0}) != _constant(settings)
    assert _constant(settings | {"log_interval": 2}) != _constant(settings)


def test_fields_are_state_when_loading_or_training_changes_them() -> None:
    args = Namespace(
        lr=1.0, iteration=0, consumed_bins=0, sizes=[1, 2], finetune=False, rank=3, load="a", model=object(), **COUNT
    )
    run = RunArgs(args)
    with run.loading():
        args.iteration, args.finetune, args.load = 4, True, "b"
    run.training_begins()
    assert run.read(4) == {"iteration": 4, "finetune": True} | COUNT
    args.consumed_bins, args.new, args.rank = 7, "x", 4
    args.sizes.append(3)
    run.flops = 8.0  # train() counts it in a variable of its own, and iterations too
    then = run.read(6)
    changed = {"finetune": True, "consumed_bins": 7, "new": "x", "sizes": [1, 2, 3]}
    assert then == {"iteration": 6, "num_floating_point_operations_so_far": 8.0} | changed
    args.consumed_bins, args.later, run.flops = 8, 1, 9.0
    args.sizes.append(4)
    run.write(then)
    assert run.read(6) == then and not hasattr(args, "later") and args.iteration == 6


def test_after_a_recovery_to_an_older_generation_the_state_is_that_generation_s() -> None:
    """One recovery is given up for another, to a generation in which a field was not state yet."""
    args = Namespace(iteration=0, groups=None, **COUNT)
    run = RunArgs(args)
    run.training_begins()
    early = run.read(0)
    args.groups = 4  # upstream finds it out in its first iteration
    late = run.read(1)
    run.write(late)
    run.write(early)
    assert run.read(0) == early and args.groups is None
    args.groups = 4
    assert run.read(0) == {"iteration": 0, "groups": 4} | COUNT


def test_a_spare_goes_on_carrying_what_it_was_given() -> None:
    """It has not seen these fields change, and the one that takes its place has to have them too."""
    args = Namespace(iteration=0, consumed_bins=0, **COUNT)
    spare = RunArgs(args)
    args.iteration, args.consumed_bins = 4, 7  # out of the shard, before its training begins
    spare.training_begins()
    spare.write({"iteration": 4, "consumed_bins": 7} | COUNT)
    assert spare.read(4) == {"iteration": 4, "consumed_bins": 7} | COUNT


def test_fields_of_a_parameter_group_are_put_back_whatever_they_are() -> None:
    group = {
        "params": [torch.zeros(3)],
        "lr": 0.1,
        "betas": (0.9, 0.95),
        "amsgrad": False,
        "name": None,
        "on_device": torch.tensor(2.0),
        "object": object(),
    }
    saved = plain_fields(group)
    assert set(saved) == {"lr", "betas", "amsgrad", "name", "on_device"}
    saved = {key: value.clone() if torch.is_tensor(value) else value for key, value in saved.items()}
    held = group["on_device"]
    group["lr"], group["betas"], group["step"] = 0.2, (0.5, 0.5), 3
    group["on_device"] += 1
    put_fields(group, saved)
    assert group["lr"] == 0.1 and group["betas"] == (0.9, 0.95) and "step" not in group and "object" in group
    assert group["on_device"] is held and held.item() == 2.0
    put_fields(group, {**saved, "step": torch.tensor([5])})
    assert group["step"].item() == 5


def test_two_small_states_are_unlike_by_name() -> None:
    one = {"args": {"iteration": 3}, "numbers": [{"lr": 0.1}], "interval_s": 1.0, "rng": b"x"}
    other = {"args": {"iteration": 4}, "numbers": [{"lr": float("nan")}], "interval_s": 2.0, "rng": b"x"}
    assert unlike(encode(one), encode(other)) == ["args.iteration", "numbers"]
    assert unlike(encode(other), encode(dict(reversed(other.items())))) == []
