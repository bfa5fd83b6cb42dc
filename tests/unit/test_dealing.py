"""Microbatches that no number of replicas divides: who gets which, and what is counted and weighed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import pipeline_parallel

from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.lm.dealing import Count, Dealing, _uneven, deals


class Sampler:
    """What upstream's has."""

    def __init__(self, consumed: int, total: int, micro: int, rank: int) -> None:
        self.consumed_samples, self.total_samples, self.micro_batch_size = consumed, total, micro
        self.data_parallel_rank = rank


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 7])
def test_the_samples_of_each_global_batch_are_the_same_at_every_width(micro: int, replicas: int) -> None:
    batch = 8 * micro
    kind = _uneven(Sampler, batch, replicas)
    drawn: list[list[list[int]]] = [list(kind(batch, 5 * batch + 3, micro, rank)) for rank in range(replicas)]  # type: ignore[call-arg]
    counts = [8 // replicas + (rank < 8 % replicas) for rank in range(replicas)]
    for number in range(4):
        mine = [each[number * count : (number + 1) * count] for each, count in zip(drawn, counts, strict=True)]
        # the j-th microbatch of all is replica j % W's
        whole = [mine[j % replicas][j // replicas] for j in range(8)]
        assert sum(whole, []) == list(range(batch * (number + 1), batch * (number + 2)))  # noqa: RUF017
    assert [len(each) for each in drawn] == [4 * count for count in counts]


def test_what_upstream_counts_for_all_replicas_is_exact_on_each() -> None:
    for mine in (3, 2):
        count = Count(mine, 8, 3)
        assert count == mine and list(range(count)) == list(range(mine))
        for product in (3 * 1 * count, count * 1 * 3, 1 * 3 * 1 * count, count * 2 * 3 // 2):
            assert product == 8 and type(product) is int
        assert count.mean == 8 / 3


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"virtual_pipeline_model_parallel_size": 2}, "an interleaved pipeline schedule cannot do"),
        ({"num_experts": 4}, "experts cannot do"),
        ({"te_precision_config_file": "precision.yaml"}, "--te-precision-config-file cannot do"),
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, "delayed scaling of FP8 cannot do .*--tp-only-amax-red"),
        ({"dataloader_type": "cyclic"}, "only --dataloader-type single"),
    ],
)
def test_what_cannot_be_dealt_is_refused_in_one_line(args: dict[str, Any], why: str) -> None:
    dealing = Dealing(SimpleNamespace())  # type: ignore[arg-type]
    given = {"dataloader_type": "single", "rank": 1}
    dealing.check(given | args)  # nothing to deal
    dealing._batch, dealing._microbatches, dealing._replicas = 8, 8, 3
    dealing.check(given)
    dealing.check(given | {"fp8": "hybrid", "fp8_recipe": "delayed", "tp_only_amax_red": True})
    dealing.check(given | {"fp8": "hybrid", "fp8_recipe": "tensorwise"})
    with pytest.raises(UserError, match=f"--global-batch-size 8 is 8 microbatches, which 3 replicas .*{why}") as told:
        dealing.check(given | args)
    assert "\n" not in str(told.value)
    dealing._microbatches = 2
    with pytest.raises(UserError, match="fewer than replicas"):
        dealing.check(given)


def test_a_loss_that_is_averaged_over_replicas_in_each_microbatch_is_refused_after_the_first(monkeypatch: Any) -> None:
    schedules = SimpleNamespace(forward_step_calc_loss=None)
    monkeypatch.setattr(pipeline_parallel, "schedules", schedules)
    reported: list[dict[str, torch.Tensor]] = []
    hooks: list[Any] = []
    Dealing(SimpleNamespace(replace=lambda module, name, hook: hooks.append(hook)))._weigh()  # type: ignore[arg-type]

    class Loss(dict[str, Any]):
        def __call__(self) -> str:
            self["forward_data_store"].append(reported[-1])
            return "the loss"

    def step(count: int, report: dict[str, torch.Tensor]) -> Loss:
        reported.append(report)
        call = Loss(num_microbatches=count, forward_data_store=[])
        assert hooks[0](call) == "the loss"
        return call

    sums, average = {"lm loss": torch.tensor([3.0, 2.0])}, {"sop loss": torch.tensor(1.5)}
    assert step(Count(3, 8, 3), sums)["num_microbatches"] == 8 / 3
    assert step(4, average)["num_microbatches"] == 4  # as upstream deals them
    with pytest.raises(UserError, match="loss function reports sop loss as an average") as told:
        step(Count(3, 8, 3), average)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("more", "evaluated"),
    [
        ({}, 6),
        ({"decrease_batch_size_if_needed": True}, None),
        ({"rampup_batch_size": [2, 2, 16]}, None),
        ({"step_batch_size_schedule": "0:8"}, None),
        ({"micro_batch_size": 3}, None),
    ],
)
def test_only_where_it_deals_unevenly_has_an_evaluation_another_batch(more: dict[str, Any], evaluated: int) -> None:
    assert _validated(more).eval_global_batch_size == evaluated


@pytest.mark.parametrize(
    ("more", "evaluated"),
    [
        ({"eval_global_batch_size": 8}, 6),  # which the user has chosen for another number of replicas
        ({"eval_global_batch_size": 9}, 9),
        ({"eval_global_batch_size": 1}, 3),
        ({"global_batch_size": 12, "eval_micro_batch_size": 3}, 9),
        ({"global_batch_size": 12}, None),
    ],
)
@pytest.mark.parametrize("yaml", [False, True])
def test_a_job_that_may_become_narrower_evaluates_what_its_replicas_divide(
    more: dict[str, Any], evaluated: int, yaml: bool
) -> None:
    assert _validated(more, resizes=True, yaml=yaml).eval_global_batch_size == evaluated


def test_a_batch_that_follows_from_the_number_of_replicas_is_no_fixed_one() -> None:
    dealing = Dealing(SimpleNamespace())  # type: ignore[arg-type]
    _validated({}, dealing=dealing)
    assert dealing.fixed
    _validated({"global_batch_size": None}, dealing=dealing)
    assert not dealing.fixed


def _validated(
    more: dict[str, Any], resizes: bool = False, yaml: bool = False, dealing: Dealing | None = None
) -> SimpleNamespace:
    """The arguments of three replicas, as upstream's validation gets them."""
    sizes = {f"{name}_parallel_size": 1 for name in ("tensor_model", "pipeline_model", "context")}
    given = {
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "eval_global_batch_size": None,
        "eval_micro_batch_size": None,
    }
    layout = {"model_parallel": SimpleNamespace(**sizes)} if yaml else sizes
    args = SimpleNamespace(world_size=3, **{**layout, **given, **more})

    class Validate:
        def first(self) -> SimpleNamespace:
            return args

        def __call__(self) -> None:
            pass

    dealing = dealing or Dealing(SimpleNamespace())  # type: ignore[arg-type]
    dealing.resizes = resizes
    dealing._validate(Validate())  # type: ignore[arg-type]
    return args


def test_so_many_replicas_can_have_a_global_batch_as_the_schedule_lets_them() -> None:
    args = {"global_batch_size": 12, "micro_batch_size": 2, "dataloader_type": "single"}
    assert [width for width in range(1, 9) if deals(args, width)] == [1, 2, 3, 4, 5, 6]
    interleaved = {**args, "virtual_pipeline_model_parallel_size": 2}
    assert [width for width in range(1, 9) if deals(interleaved, width)] == [1, 2, 3, 6]
