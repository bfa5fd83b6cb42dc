"""The promise: no job goes on as another model without a word, and what may differ is not complained of."""

from __future__ import annotations

import argparse
import enum
import functools
import json
import random
import time
from typing import Any

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from deadpool_megatron.megatron.description import describe_job
from deadpool_megatron.megatron.same_model import MODEL


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a job with these arguments tells of itself, as its manifest has it."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    parser = argparse.ArgumentParser(allow_abbrev=False, conflict_handler="resolve")
    add_megatron_arguments(parser)

    def tell(*flags: str, **more: Any) -> dict[str, dict[str, Any]]:
        job: dict[str, Any] = json.loads(describe_job(vars(parser.parse_args(flags)) | more))
        return job

    return tell


@pytest.mark.parametrize(
    "flags",
    [
        "--squared-relu",
        "--rotary-base 500000",
        "--rotary-percent 0.5",
        "--moe-router-topk 4",
        "--norm-epsilon 1e-6",
        "--use-tp-pp-dp-mapping",
        "--window-size 128,0",
        "--spec a b",
    ],
)
def test_another_model_of_the_same_shapes_is_not_the_same(told: Any, flags: str) -> None:
    assert told(*flags.split())["model"] != told()["model"]


@pytest.mark.parametrize("flags", ["--adam-beta2 0.9", "--weight-decay 0.3", "--clip-grad 2.0", "--seq-length 7"])
def test_what_an_iteration_computes_otherwise_is_said(told: Any, flags: str) -> None:
    assert told(*flags.split())["model"] == told()["model"]
    assert told(*flags.split())["settings"] != told()["settings"]


def test_a_flag_of_the_scripts_own_is_said(told: Any) -> None:
    assert told(my_loss_weight=0.5)["settings"] != told(my_loss_weight=0.7)["settings"]


def test_what_is_free_is_not_complained_of(told: Any) -> None:
    free = "--lr 1 --min-lr 0.1 --lr-decay-iters 9 --lr-warmup-iters 2 --micro-batch-size 2 --global-batch-size 8 "
    free += "--rampup-batch-size 2 2 9 --train-iters 7 --data-path 1 p --split 1,2,3 --num-workers 3 --mock-data "
    free += "--save a --load b --save-interval 3 --ckpt-format torch --tensorboard-dir t --log-interval 9 --async-save "
    free += "--wandb-project w --eval-iters 3 --eval-interval 2 --overlap-grad-reduce --overlap-param-gather --profile "
    free += "--recompute-granularity full --recompute-method uniform --no-rope-fusion --tp-comm-overlap "
    free += "--exit-interval 3 --finetune --use-checkpoint-args --local-rank 3"
    counters = {"iteration": 7, "consumed_train_samples": 9, "skipped_train_samples": 1, "rank": 5, "curr_iteration": 3}
    here, there = told(*free.split(), **counters), told()
    assert here["model"] == there["model"]
    settings = {n for n in there["settings"] if here["settings"].get(n) != there["settings"][n]}
    assert settings <= {"data_parallel_random_init"} and not here["settings"].keys() - there["settings"].keys()


class Color(enum.Enum):
    RED = 1


def test_what_is_told_is_the_same_in_every_process(told: Any) -> None:
    """Nothing that has an address or a moment in it."""
    once = told(
        activation_func=torch.nn.functional.silu, at=time.time, how=Color.RED, dtype=torch.bfloat16, key=1 << 90
    )
    assert once["model"]["activation_func"] == "torch.nn.functional.silu"
    assert once["settings"]["how"] == "RED" and once["settings"]["dtype"] == "torch.bfloat16"
    for value in (object(), functools.partial(print), lambda: None, random.Random(), [object()]):
        assert "thing" not in told(thing=value)["settings"] and "spec" not in told(spec=value)["model"]


def test_what_must_be_the_same_is_named_once() -> None:
    assert len(set(MODEL)) == len(MODEL)
