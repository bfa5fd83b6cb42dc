"""Nodes are lost in runs whose experts get their tokens by DeepEP and HybridEP, emulated: kernels that nothing aborts.

Two nodes of two processes, experts inside a node or across both. One process of the node that stays is slow, so that
the loss finds its neighbour further on, about to launch a kernel alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.observe import LOGS
from flags import default_gpt, without_values
from jobs import Jobs, assert_same_training, launch_flags, undisturbed

_EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --disable-bias-linear --moe-grouped-gemm --moe-router-dtype fp32 "
    "--moe-token-dispatcher-type flex"
)
_TP = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"
_PP = "--pipeline-model-parallel-size 2"
_DEEPEP = f"{_EXPERTS} --expert-model-parallel-size 2 --moe-flex-dispatcher-backend deepep"
_HYBRIDEP = f"{_EXPERTS} --expert-model-parallel-size 2 --moe-flex-dispatcher-backend hybridep"
# The dispatcher stays outside of them.
_LAYER_GRAPHS = (
    "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router moe_preprocess "
    "--cuda-graph-warmup-steps 1"
)
# Shapes that do not depend on the data, which graphs with a dispatcher in them need.
_STATIC = "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity"
_LAYER_GRAPHS_WITH_IT = (
    f"--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe --cuda-graph-warmup-steps 1 {_STATIC}"
)
_WHOLE = (
    "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 2 --te-rng-tracker --no-check-for-nan-in-loss-and-grad"
)
_PAGES = (
    "--moe-paged-stash --moe-expert-rank-capacity-factor 1.5 --use-transformer-engine-op-fuser --swiglu "
    "--attention-dropout 0 --hidden-dropout 0"
)
_CASES = {
    "deepep": _DEEPEP,
    "hybridep": _HYBRIDEP,
    "deepep, tensor parallelism": f"{_DEEPEP} {_TP}",
    "hybridep, tensor parallelism": f"{_HYBRIDEP} {_TP}",
    "deepep, pipeline": f"{_DEEPEP} {_PP}",
    "hybridep, pipeline": f"{_HYBRIDEP} {_PP}",
    "deepep, fused permutation": f"{_DEEPEP} --moe-permute-fusion",
    "hybridep, mxfp8": f"{_HYBRIDEP} --fp8-format e4m3 --fp8-recipe mxfp8",
    "deepep, graphs of layers": f"{_DEEPEP} {_LAYER_GRAPHS}",
    "hybridep, graphs of layers": f"{_HYBRIDEP} {_LAYER_GRAPHS}",
    "hybridep, graphs of whole layers": f"{_HYBRIDEP} {_LAYER_GRAPHS_WITH_IT}",
    "hybridep, graphs of whole iterations": f"{_HYBRIDEP} {_WHOLE} {_STATIC}",
    "hybridep, pages": f"{_HYBRIDEP} {_PAGES}",
    # Each iteration is done again without the budget; the loss is in the second attempt.
    "hybridep, pages, too many tokens": f"{_HYBRIDEP} {_PAGES} --moe-expert-rank-capacity-factor 0.5 --seq-length 256 "
    "--max-position-embeddings 256",
    "hybridep, pages, graphs of whole iterations": f"{_HYBRIDEP} {_PAGES} {_WHOLE}",
}
_IN_THE_GATE = "hybridep"
_WIDE = "--expert-model-parallel-size 4"
_WIDE_HYBRIDEP = f"{_EXPERTS} {_WIDE} --moe-flex-dispatcher-backend hybridep"
_ACROSS_CASES = {
    "deepep": f"{_EXPERTS} {_WIDE} --moe-flex-dispatcher-backend deepep",
    "hybridep": _WIDE_HYBRIDEP,
    "hybridep, tensor parallelism": f"{_WIDE_HYBRIDEP} {_TP}",
    "hybridep, graphs of whole iterations": f"{_WIDE_HYBRIDEP} {_WHOLE} {_STATIC}",
    "hybridep, pages, graphs of whole iterations": f"{_WIDE_HYBRIDEP} {_PAGES} {_WHOLE}",
}
TESTS = Path(__file__).parents[1]
_SLOW = ("--fault", "slow", "--seconds", "1", "--local", "1")


def _extra(name: str) -> dict[str, str]:
    extra = {"DEADPOOL_EMULATED_CAPABILITY": "10.0"} if "mxfp8" in name or "pages" in name else {}
    if "pages" in name:
        extra |= {"DEADPOOL_EMULATED_CUBLASLT": "130300", "NVTE_CUTEDSL_FUSED_GROUPED_MLP": "1"}
    return extra


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [name if name == _IN_THE_GATE else pytest.param(name, marks=pytest.mark.slow) for name in _CASES]
)
def test_a_lost_node_leaves_no_kernel_waiting_and_the_run_ends_as_the_undisturbed_one(name: str, jobs: Jobs) -> None:
    # Warmed up, captured and replayed by then; no Python runs in the middle of a replay.
    at, tick, iterations = (4, 1, 7) if "whole iterations" in name else (2, 3, 5)
    flags, extra = default_gpt(*_CASES[name].split(), iters=iterations), _extra(name)
    want = undisturbed(launch_flags(2, 0, 2), flags, extra=extra)
    if "whole iterations" in name:  # they compute the same
        eager = without_values(flags, "--cuda-graph-impl", "--cuda-graph-warmup-steps")
        assert undisturbed(launch_flags(2, 0, 2), eager, extra=extra).hashes() == want.hashes()
    job = jobs.start(name.replace(" ", "-").replace(",", ""), launch_flags(3, 1, 2), flags, extra=extra, held=True)
    job.arm((1, at, 1, *_SLOW), (0, at, tick))
    job.finished()
    assert [event["lost"] for event in job.events("declared")] == [[0]]
    assert_same_training(job, want, iterations, rank=3, mute=frozenset({at - 1, at}))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nobody_replays_a_graph_whose_kernels_wait_for_a_neighbour_that_does_not(jobs: Jobs) -> None:
    flags = default_gpt(*f"{_HYBRIDEP} {_WHOLE} {_STATIC}".split(), iters=7)
    want = undisturbed(launch_flags(2, 0, 2), flags)
    late = {"LATE": "3 3"}  # until after the loss, its neighbour being in the next iteration already
    job = jobs.start("late", launch_flags(3, 1, 2), flags, TESTS / "pretrain_late.py", extra=late, held=True)
    job.arm((0, 4, 1))
    job.finished()
    assert [event["lost"] for event in job.events("declared")] == [[0]]
    assert_same_training(job, want, 7, rank=3, mute=frozenset({3, 4}))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", _ACROSS_CASES)
def test_where_experts_span_nodes_every_process_is_another_one_after_a_loss(name: str, jobs: Jobs) -> None:
    first, second, tick, iterations = (4, 8, 1, 10) if "whole iterations" in name else (2, 4, 3, 6)
    flags, extra = default_gpt(*_ACROSS_CASES[name].split(), iters=iterations), _extra(name)
    want = undisturbed(launch_flags(2, 0, 2), flags, extra=extra)
    job = jobs.start(f"across-{name.replace(', ', '-')}", launch_flags(4, 2, 2), flags, extra=extra, held=True)
    job.until_event("started")
    before = set(job.pids().values())
    job.arm((1, first, 1, *_SLOW), (0, first, tick), until=second)
    job.until_event("resumed")
    job.inject(1, second, min(tick, 2))  # not before: faults are armed in the processes
    job.hold(None)
    job.finished()
    declared = job.events("declared")
    assert [event["lost"] for event in declared] == [[0], [1]], "one epoch a loss, however many processes it ends"
    assert [event["replaced"] for event in declared] == [[0, 1], [2, 3]] and all(
        event["restarts"] for event in declared
    )
    assert not before & set(job.pids().values())
    assert_same_training(job, want, iterations, rank=3, mute=frozenset({first - 1, first, second - 1, second}))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_a_worker_whose_neighbour_is_lost_ends_too_and_both_come_back(backend: str, jobs: Jobs) -> None:
    flags = default_gpt(*_CASES[backend].split(), iters=5)
    want = undisturbed(launch_flags(2, 0, 2), flags)
    job = jobs.start(f"worker-{backend}", launch_flags(2, 0, 2), flags, held=True)
    job.arm((0, 2, 3, "--fault", "kill-worker"))
    job.finished()
    assert all(event["lost"] == [] for event in job.events("declared"))
    ended = [event["cause"] for event in job.events("detected")]
    assert any(f"exit code {Exit.NEIGHBOUR_LOST}" in cause for cause in ended), ended
    assert f"exit code {Exit.NEIGHBOUR_LOST}" in (job.run_dir / LOGS / "rank-1.log").read_text()
    assert_same_training(job, want, 5, rank=3, mute=frozenset({1, 2}))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_neighbour_that_ends_too_has_another_process_standing_by_and_no_spare_is_spent(jobs: Jobs) -> None:
    flags = default_gpt(*_CASES["hybridep"].split(), iters=5)
    want = undisturbed(launch_flags(2, 0, 2), flags)
    job = jobs.start("stood-by", launch_flags(3, 1, 2), [*flags, "--deadpool-standby-workers", "device"], held=True)
    job.until_event("training")
    job.until("standbys", lambda: [len(n.get("standbys", ())) for n in job.status()["nodes"]] == [2, 2, 0])
    job.arm((0, 2, 3, "--fault", "kill-worker"))
    job.finished()
    assert {tuple(event["nodes"]) for event in job.events("declared")} == {(0, 1)}
    assert [(event["rank"], event["stood_by"]) for event in job.events("detected")] == [(0, True), (1, True)]
    assert_same_training(job, want, 5, rank=3, mute=frozenset({1, 2}))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_who_waits_for_a_neighbour_is_not_taken_for_the_one_that_hangs(jobs: Jobs) -> None:
    flags = default_gpt(*_CASES["hybridep"].split(), "--deadpool-hang-floor", "8", iters=30)
    want = undisturbed(launch_flags(2, 0, 2), flags)
    # Not held: a job learns from what it has seen how long no progress is usual.
    job = jobs.start("hangs", launch_flags(3, 1, 2), flags)
    job.until_event("started")
    job.inject(0, 20, 3, "--fault", "hang", "--local", "1")
    job.finished()
    assert [event["rank"] for event in job.events("stuck")] == [1]
    assert_same_training(job, want, 30, rank=3, mute=frozenset({1, 2}))
