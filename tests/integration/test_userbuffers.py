"""Nodes are lost in runs whose tensor-parallel ranks share userbuffers, emulated: kernels that nothing aborts.

Survivors keep their buffers, spares make their own. Two processes of a node, or two pairs of them, are tensor-parallel.
"""

from __future__ import annotations

import pytest

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.observe import LOGS
from flags import default_gpt
from jobs import EXAMPLE, ROOT, Jobs, assert_same_training, launch_flags, survives, undisturbed

_TP = "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap"
_PP = "--pipeline-model-parallel-size 2"
_LLAMA = "--position-embedding-type rope --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm"
_EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --disable-bias-linear --moe-grouped-gemm --expert-tensor-parallel-size 1"
)
_FUSER = f"{_LLAMA} --disable-bias-linear --use-transformer-engine-op-fuser"
_CURRENT = "--fp8-format hybrid --fp8-recipe tensorwise"
_DELAYED = "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 4 --fp8-amax-compute-algo max"
# Rows of the buffers' chunks, and columns, have to be multiples of 128.
_MXFP8 = (
    "--fp8-format e4m3 --fp8-recipe mxfp8 --seq-length 256 --max-position-embeddings 256 --hidden-size 128 "
    "--num-layers 1 --global-batch-size 4"
)
_LAYER_GRAPHS = "--cuda-graph-impl transformer_engine --cuda-graph-warmup-steps 1"
_WHOLE = (
    "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 1 --te-rng-tracker --no-check-for-nan-in-loss-and-grad"
)
_CASES = {
    "data parallelism": _TP,
    "llama": f"{_TP} {_LLAMA}",
    "pipeline": f"{_TP} {_PP}",
    "interleaved pipeline": f"{_TP} {_PP} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1",
    "context parallelism": f"{_TP} --context-parallel-size 2",
    "gradients by rings": f"{_TP} --tp-comm-overlap-rs-dgrad --tp-comm-overlap-cfg RINGS",
    "no bulk": f"{_TP} --no-tp-comm-bulk-dgrad --no-tp-comm-bulk-wgrad --no-tp-comm-overlap-ag",
    "multi-token prediction": f"{_TP} --mtp-num-layers 1 --position-embedding-type rope",
    "recompute, full": f"{_TP} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "experts": f"{_TP} {_EXPERTS} --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2",
    "hybridep": f"{_TP} {_EXPERTS} --expert-model-parallel-size 2 --moe-router-dtype fp32 "
    "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep",
    "current scaling": f"{_TP} {_CURRENT}",
    "delayed scaling": f"{_TP} {_DELAYED} --tp-comm-overlap-cfg FP8",
    "mxfp8": f"{_TP} {_MXFP8}",
    "operation fuser": f"{_TP} {_FUSER}",
    "hybrid": f"{_TP} --dataloader-type external --hybrid-layer-pattern M*-M --position-embedding-type none "
    "--mamba-state-dim 16 --mamba-head-dim 16 --mamba-num-groups 2",
    "graphs of layers": f"{_TP} {_LAYER_GRAPHS}",
    "graphs of layers, current scaling": f"{_TP} {_LAYER_GRAPHS} {_CURRENT}",
    "graphs of whole iterations": f"{_TP} {_WHOLE}",
}
# What --tp-comm-overlap-cfg names, by the words above.
_SETTINGS = {
    "RINGS": "{qkv_dgrad: {method: ring_exchange}, fc1_dgrad: {method: pipeline, num_splits: 2}, "
    "proj_fprop: {method: ring_exchange}}",
    "FP8": "{proj_fprop: {method: pipeline, fp8_buf: true}, fc2_fprop: {method: pipeline, fp8_buf: true}}",
}
_OTHER_MODELS = ROOT / "tests" / "pretrain_other_models.py"


def _flags(name: str, jobs: Jobs) -> list[str]:
    words = _CASES[name].split()
    for place, word in enumerate(words):
        if word in _SETTINGS:
            file = jobs.directory / f"{word}.yaml"
            file.write_text(_SETTINGS[word])
            words[place] = str(file)
    return default_gpt(*words, iters=6)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", _CASES)
def test_a_run_from_which_both_nodes_are_lost_ends_as_the_undisturbed_one(name: str, jobs: Jobs) -> None:
    flags = _flags(name, jobs)
    extra = {"DEADPOOL_EMULATED_CAPABILITY": "10.0" if "mxfp8" in flags else "9.0", "MODEL": name}
    script = _OTHER_MODELS if name == "hybrid" else EXAMPLE
    mute = frozenset({1, 2, 3, 4})
    survives(jobs, name, flags, (0, 2, 3), (1, 4, 1), slots=2, script=script, extra=extra, mute=mute)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("first", "second"), [(0, 3), (1, 2)])
def test_with_tensor_pipeline_and_data_parallelism_every_node_may_be_lost(first: int, second: int, jobs: Jobs) -> None:
    flags = default_gpt(*f"{_TP} {_PP} --overlap-grad-reduce --overlap-param-gather".split(), iters=6)
    lost = (first, 2, 3), (second, 4, 2)
    survives(jobs, f"nodes-{first}-{second}", flags, *lost, nodes=4, slots=2, mute=frozenset({1, 2, 3, 4}))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_who_is_about_to_launch_alone_when_a_node_is_lost_does_not(jobs: Jobs) -> None:
    # Only a stage in the middle begins a pass with such a kernel. Of the two that send to it one is slow, and the node
    # of both is lost when the other has sent.
    flags = default_gpt(*f"{_TP} --pipeline-model-parallel-size 3 --num-layers 3".split(), iters=5)
    want = undisturbed(launch_flags(3, 0, 2), flags)
    job = jobs.start("alone", launch_flags(4, 1, 2), flags, held=True)
    job.arm((0, 2, 1, "--fault", "slow", "--seconds", "0.5", "--local", "1"), (0, 2, 2))
    job.finished()
    assert [event["lost"] for event in job.events("declared")] == [[0]]
    assert_same_training(job, want, 5, rank=5, mute=frozenset({1, 2}))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_with_two_groups_of_ranks_that_share_buffers_is_lost(jobs: Jobs) -> None:
    flags = default_gpt(*f"{_TP} {_PP}".split(), iters=5)
    survives(jobs, "two-groups", flags, (0, 2, 3), slots=4, mute=frozenset({1, 2}))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_worker_that_dies_alone_takes_all_of_its_node_along_and_they_come_back(jobs: Jobs) -> None:
    flags = default_gpt(*_TP.split(), iters=5)
    want = undisturbed(launch_flags(2, 0, 4), flags)
    job = jobs.start("worker", launch_flags(2, 0, 4), flags, held=True)
    job.arm((0, 2, 3, "--fault", "kill-worker"))
    job.finished()
    assert all(event["lost"] == [] for event in job.events("declared"))
    for rank in (1, 2, 3):  # rank 1 shares buffers with it, the others have made theirs with it
        assert f"exit code {Exit.NEIGHBOUR_LOST}" in (job.run_dir / LOGS / f"rank-{rank}.log").read_text()
    assert_same_training(job, want, 5, rank=7, mute=frozenset({1, 2}))
