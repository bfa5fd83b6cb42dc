"""Nodes are lost in runs whose experts get their tokens by DeepEP and HybridEP, emulated: kernels that nothing aborts.

Two nodes of two processes, experts inside a node or across both. One process of the node that stays is slow, so that
the loss finds its neighbour further on, about to launch a kernel alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.observe import LOGS
from flags import default_gpt
from jobs import Jobs, assert_same_training, launch_flags, undisturbed

_EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --disable-bias-linear --moe-grouped-gemm --moe-router-dtype fp32 "
    "--moe-token-dispatcher-type flex"
)
_TP = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"
_PP = "--pipeline-model-parallel-size 2"
_DEEPEP = f"{_EXPERTS} --expert-model-parallel-size 2 --moe-flex-dispatcher-backend deepep"
_HYBRIDEP = f"{_EXPERTS} --expert-model-parallel-size 2 --moe-flex-dispatcher-backend hybridep"
_CASES = {
    "deepep": _DEEPEP,
    "hybridep": _HYBRIDEP,
    "deepep, tensor parallelism": f"{_DEEPEP} {_TP}",
    "hybridep, tensor parallelism": f"{_HYBRIDEP} {_TP}",
    "deepep, pipeline": f"{_DEEPEP} {_PP}",
    "hybridep, pipeline": f"{_HYBRIDEP} {_PP}",
    "deepep, fused permutation": f"{_DEEPEP} --moe-permute-fusion",
    "hybridep, mxfp8": f"{_HYBRIDEP} --fp8-format e4m3 --fp8-recipe mxfp8",
}
_IN_THE_GATE = "hybridep"
_WIDE = "--expert-model-parallel-size 4"
_ACROSS_CASES = {
    "deepep": f"{_EXPERTS} {_WIDE} --moe-flex-dispatcher-backend deepep",
    "hybridep": f"{_EXPERTS} {_WIDE} --moe-flex-dispatcher-backend hybridep",
    "hybridep, tensor parallelism": f"{_EXPERTS} {_WIDE} --moe-flex-dispatcher-backend hybridep {_TP}",
}
_SLOW = ("--fault", "slow", "--seconds", "1", "--local", "1")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    all_jobs = Jobs(tmp_path_factory.mktemp("flex"))
    yield all_jobs
    all_jobs.end()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [name if name == _IN_THE_GATE else pytest.param(name, marks=pytest.mark.slow) for name in _CASES]
)
def test_a_lost_node_leaves_no_kernel_waiting_and_the_run_ends_as_the_undisturbed_one(name: str, jobs: Jobs) -> None:
    flags = default_gpt(*_CASES[name].split(), iters=5)
    extra = {"DEADPOOL_EMULATED_CAPABILITY": "10.0"} if "mxfp8" in flags else {}
    want = undisturbed(launch_flags(2, 0, 2), flags, extra=extra)
    job = jobs.start(name.replace(" ", "-").replace(",", ""), launch_flags(3, 1, 2), flags, extra=extra, held=True)
    job.arm((1, 2, 1, *_SLOW), (0, 2, 3))
    job.finished()
    assert [event["lost"] for event in job.events("declared")] == [[0]]
    assert_same_training(job, want, 5, rank=3, mute=frozenset({1, 2}))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", _ACROSS_CASES)
def test_where_experts_span_nodes_every_process_is_another_one_after_a_loss(name: str, jobs: Jobs) -> None:
    flags = default_gpt(*_ACROSS_CASES[name].split(), iters=6)
    want = undisturbed(launch_flags(2, 0, 2), flags)
    job = jobs.start(f"across-{name.replace(', ', '-')}", launch_flags(4, 2, 2), flags, held=True)
    job.until_event("started")
    before = set(job.pids().values())
    job.arm((1, 2, 1, *_SLOW), (0, 2, 3), until=4)
    job.until_event("resumed")
    job.inject(1, 4, 2)  # not before: faults are armed in the processes
    job.hold(None)
    job.finished()
    declared = job.events("declared")
    assert [event["lost"] for event in declared] == [[0], [1]], "one epoch a loss, however many processes it ends"
    assert [event["replaced"] for event in declared] == [[0, 1], [2, 3]] and all(
        event["restarts"] for event in declared
    )
    assert not before & set(job.pids().values())
    assert_same_training(job, want, 6, rank=3, mute=frozenset({1, 2, 3, 4}))


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
