"""The promise: under every optimizer Megatron offers, what was copied brings a killed node back bit for bit."""

from __future__ import annotations

import pytest

from flags import tiny_gpt
from jobs import Jobs, launch_flags, survives

ITERATIONS = 6
_SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
_HALF = ["--fp16", "--initial-loss-scale", "1024", "--loss-scale-window", "2"]
_EXPERTS = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall"]
_EXPERTS += ["--disable-bias-linear", "--expert-model-parallel-size", "2"]
# DP2 on two nodes of one worker, or DP4 on four, and a spare. Adam unless it says otherwise.
_KINDS = {
    "bf16-replicated": (2, ["--bf16"]),
    "fp32-replicated": (2, []),
    "fp16-replicated-clipping-off": (2, [*_HALF, "--clip-grad", "0"]),
    "fp16-sharded": (2, [*_HALF, *_SHARDED]),
    "fp32-sharded": (2, _SHARDED),
    "bf16-sharded-without-overlap": (2, ["--bf16", "--use-distributed-optimizer"]),
    "bf16-sharded-in-two-instances": (4, ["--bf16", *_SHARDED, "--num-distributed-optimizer-instances", "2"]),
    "experts-replicated": (4, ["--bf16", *_EXPERTS]),
    "experts-sharded": (4, ["--bf16", *_SHARDED, *_EXPERTS]),
    "muon-by-layers": (2, ["--bf16", *_SHARDED, "--optimizer", "muon"]),
    "muon-replicated": (2, ["--bf16", "--optimizer", "muon"]),
    "lion-sharded": (2, ["--bf16", *_SHARDED, "--optimizer", "lion"]),
}
_IN_EVERY_CI = "bf16-replicated"


def _flags(own: list[str]) -> list[str]:
    """One layer a rank; precision and optimizer are the kind's own."""
    given = tiny_gpt("none", iters=ITERATIONS)
    kept = [flag for flag in given if flag not in ("--bf16", *_SHARDED)]
    kept[kept.index("--tensor-model-parallel-size") + 1] = "1"
    kept[kept.index("--num-layers") + 1] = "2"
    return [*kept, *own]


@pytest.mark.slow
def test_the_sgd_that_megatron_takes_from_transformer_engine_is_refused(jobs: Jobs) -> None:
    job = jobs.start("sgd", launch_flags(2, slots=1), _flags(["--bf16", "--optimizer", "sgd"]))
    assert job.wait() == 2
    assert "--optimizer sgd of Transformer Engine or apex is not supported with --deadpool yet" in job.log_tails()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == _IN_EVERY_CI else pytest.mark.slow) for kind in _KINDS]
)
def test_a_killed_node_comes_back_bit_for_bit_under(jobs: Jobs, kind: str) -> None:
    nodes, own = _KINDS[kind]
    job, _ = survives(jobs, kind, _flags(own), (0, 3, 2), nodes=nodes)
    (training,) = job.events("training")
    assert training["planned_bytes"] == pytest.approx(training["expected_bytes"], rel=0.01)
