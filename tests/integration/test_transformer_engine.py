"""Nodes are killed in runs with Transformer Engine's layers, every parallel dimension and low precision.

Real Megatron, the real Python of Transformer Engine, its kernels emulated. Two processes on two nodes: both are lost,
one after the other, and each role is taken over by a spare. The run ends bit for bit as the undisturbed one.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deadpool_megatron.observe import LOGS
from flags import default_gpt
from jobs import Job, Jobs, alone, launch_flags, survives, undisturbed

_TP = "--tensor-model-parallel-size 2 --sequence-parallel"
_DP = "--overlap-grad-reduce --overlap-param-gather"
_PP = "--pipeline-model-parallel-size 2"
_VPP = f"{_PP} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
_CP = "--context-parallel-size 2"
_MOE = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --disable-bias-linear"
_GROUPED = f"{_MOE} --moe-grouped-gemm"
_EP = "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
_CURRENT = "--fp8-format hybrid --fp8-recipe tensorwise"
_DELAYED = "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 4 --fp8-amax-compute-algo max"
_BLOCKWISE = "--fp8-format e4m3 --fp8-recipe blockwise"
_MXFP8 = "--fp8-format e4m3 --fp8-recipe mxfp8"
_MXFP8_PARAMETERS = f"{_MXFP8} --fp8-param-gather --reuse-grad-buf-for-mxfp8-param-ag"
_NVFP4 = "--fp4-format e2m1 --fp4-recipe nvfp4"
_PRECISION_AWARE = "--use-precision-aware-optimizer"
_LOCAL = "--transformer-impl local --no-persist-layer-norm"
_LLAMA = "--position-embedding-type rope --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm"
_MLA = (
    "--multi-latent-attention --q-lora-rank 32 --kv-lora-rank 32 --qk-head-dim 16 --qk-pos-emb-head-dim 16 "
    "--v-head-dim 16 --position-embedding-type rope"
)
_DSA = (
    f"{_MLA} --experimental-attention-variant dsa --dsa-indexer-n-heads 2 --dsa-indexer-head-dim 32 "
    "--dsa-indexer-topk 16 --dsa-indexer-loss-coeff 1e-2 --disable-bias-linear --no-rope-fusion"
)

_OFFLOADING = "--fine-grained-activation-offloading --min-offloaded-tensor-size 1 --offload-modules"
_GDN = (
    f"{_LLAMA} --disable-bias-linear --experimental-attention-variant gated_delta_net --linear-attention-freq 2 "
    "--linear-num-key-heads 4 --linear-num-value-heads 16 --linear-key-head-dim 16 --linear-value-head-dim 16"
)
_FUSER = f"{_LLAMA} --disable-bias-linear --use-transformer-engine-op-fuser"

# In the gate: one of each kind. The others are slow only for being many.
_CASES = {
    "sequence parallelism": f"{_TP} {_LLAMA}",
    "experts": f"{_TP} {_GROUPED} {_EP} --moe-permute-fusion --moe-router-fusion --moe-aux-loss-coeff 1e-2 "
    "--moe-z-loss-coeff 1e-3",
    "delayed scaling": f"{_TP} {_DELAYED}",
    "mxfp8 parameters": f"{_DP} {_MXFP8_PARAMETERS}",
}
_SLOW_CASES = {
    "pipeline": _PP,
    "interleaved pipeline": _VPP,
    "data parallelism": _DP,
    "context parallelism, p2p": f"{_CP} --cp-comm-type p2p",
    "context parallelism, all-gather": f"{_CP} --cp-comm-type all_gather",
    "context parallelism, a2a": f"{_CP} --cp-comm-type a2a",
    "multi-latent attention": f"{_TP} {_MLA}",
    "multi-token prediction": f"{_TP} --mtp-num-layers 1 --position-embedding-type rope",
    "experts without grouped GEMM": f"{_TP} {_MOE} {_EP}",
    "expert tensor parallelism": f"{_TP} {_GROUPED}",
    "sigmoid router with bias": f"{_TP} {_GROUPED} {_EP} --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2 --moe-router-load-balancing-type none",
    "shared experts": f"{_TP} {_GROUPED} {_EP} --moe-shared-expert-intermediate-size 64",
    "overlapped communication of experts": f"{_GROUPED} {_EP} --overlap-moe-expert-parallel-comm --delay-wgrad-compute",
    "operation fuser": f"{_TP} {_FUSER}",
    "operation fuser, current scaling": f"{_DP} {_FUSER} {_CURRENT}",
    "operation fuser, mxfp8 parameters": f"{_DP} {_FUSER} {_MXFP8_PARAMETERS}",
    "operation fuser, nvfp4": f"{_FUSER} {_NVFP4}",
    "operation fuser, experts": f"{_GROUPED} {_EP} {_FUSER}",
    "operation fuser, experts, mxfp8": f"{_GROUPED} {_EP} {_FUSER} {_MXFP8}",
    "recompute, full": f"{_TP} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "recompute, attention": f"{_TP} --recompute-granularity selective --recompute-modules core_attn",
    "recompute, layer norm": f"{_TP} --recompute-granularity selective --recompute-modules layernorm",
    "recompute of delayed scaling": f"{_TP} {_DELAYED} --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
    "local layers with sequence parallelism": f"{_TP} {_LOCAL}",
    "current scaling": f"{_TP} {_CURRENT}",
    "current scaling, parameters": f"{_DP} {_CURRENT} --fp8-param-gather",
    "current scaling, parameters, sequence parallelism": f"{_TP} {_CURRENT} --fp8-param-gather",
    "current scaling, experts": f"{_TP} {_GROUPED} {_EP} {_CURRENT}",
    "current scaling, first and last layer in BF16": f"{_TP} {_CURRENT} --num-layers 4 --first-last-layers-bf16",
    "delayed scaling, parameters": f"{_DP} {_DELAYED} --fp8-param-gather",
    "delayed scaling, pipeline": f"{_PP} {_DELAYED}",
    "delayed scaling, interleaved pipeline": f"{_VPP} {_DELAYED}",
    "delayed scaling, multi-token prediction": f"{_TP} --mtp-num-layers 1 --position-embedding-type rope {_DELAYED}",
    "blockwise scaling": f"{_TP} {_BLOCKWISE}",
    "blockwise scaling, parameters": f"{_DP} {_BLOCKWISE} --fp8-param-gather",
    "mxfp8": f"{_TP} {_MXFP8}",
    "mxfp8, experts": f"{_TP} {_GROUPED} {_EP} {_MXFP8}",
    "mxfp8, experts, padded routing": f"{_TP} {_GROUPED} {_EP} {_MXFP8} --moe-permute-fusion "
    "--moe-router-padding-for-quantization",
    "mxfp8 parameters, sequence parallelism": f"{_TP} {_MXFP8_PARAMETERS} {_DP}",
    "mxfp8 parameters without overlap": _MXFP8_PARAMETERS,
    "mxfp8, single modules otherwise": f"{_TP} {_MXFP8} --te-precision-config-file "
    f"{Path(__file__).parents[1] / 'te_precision.yaml'}",
    "nvfp4": f"{_TP} {_NVFP4}",
    "precision-aware optimizer": f"{_DP} {_PRECISION_AWARE}",
    "BF16 moments": f"{_DP} {_PRECISION_AWARE} --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --main-grads-dtype bf16",
    "FP8 and FP16 moments": f"{_DP} {_PRECISION_AWARE} --exp-avg-dtype fp8 --exp-avg-sq-dtype fp16",
    "FP16 main parameters": f"{_DP} {_PRECISION_AWARE} --main-params-dtype fp16 --exp-avg-dtype fp16",
    "nvfp4, parameters": f"{_DP} {_NVFP4} --fp4-param-gather",
    "nvfp4, parameters, sequence parallelism": f"{_TP} {_NVFP4} --fp4-param-gather",
    "sparse attention": f"{_TP} {_DSA}",
    "gated delta net": f"{_TP} {_GDN}",
    "gated delta net, context parallelism": f"{_CP} {_GDN}",
    "gated delta net, experts, mxfp8, pipeline": f"{_PP} {_GDN} {_GROUPED} {_MXFP8} --attention-output-gate",
    "activations on the host": f"{_TP} {_OFFLOADING} core_attn attn_proj qkv_linear",
    # (with a single layer a stage upstream fails in the second iteration)
    "activations on the host, pipeline": f"{_PP} --num-layers 4 {_OFFLOADING} core_attn attn_proj qkv_linear",
    "activations on the host, experts": f"{_TP} {_GROUPED} {_EP} {_OFFLOADING} core_attn expert_fc1 moe_act",
    "activations on the host, outside of graphs": f"{_TP} {_GROUPED} {_EP} {_OFFLOADING} expert_fc1 moe_act "
    "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router --cuda-graph-warmup-steps 1",
    "user buffers of NCCL, which are left out": f"{_DP} --use-nccl-ub",
    "Muon": f"{_TP} --optimizer muon",
    "Muon by layers": f"{_DP} --optimizer muon",
    "two kernels of a fused step": f"{_DP} {_PRECISION_AWARE} {_CURRENT} --fp8-param-gather",
}
# On four processes: what two cannot have.
_WIDE_CASES = {
    "two instances of the distributed optimizer": f"{_DP} --num-distributed-optimizer-instances 2",
    "parameter gather beside the optimizer step": f"{_VPP} {_DP} --overlap-param-gather-with-optimizer-step "
    "--ckpt-format torch",
    "hierarchical context parallelism": "--context-parallel-size 4 --cp-comm-type a2a+p2p "
    "--hierarchical-context-parallel-sizes 2 2",
}
_COPIES = re.compile(r"copies ([\d,]+) bytes of unique state a generation, in \d+ pieces; ([\d,]+) by the arithmetic")
_BLACKWELL = {"DEADPOOL_EMULATED_CAPABILITY": "10.0"}
_OLD_OFFLOADING = {"NVTE_CPU_OFFLOAD_V1": "1"}  # Megatron wants it for offloading of its own
_GROUPED_MLP = {"NVTE_CUTEDSL_FUSED_GROUPED_MLP": "1"}  # without it Megatron refuses experts with the operation fuser


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [*_CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW_CASES)],
)
def test_a_run_from_which_both_nodes_are_lost_ends_as_the_undisturbed_one(name: str, jobs: Jobs) -> None:
    flags = default_gpt(*(_CASES | _SLOW_CASES)[name].split(), iters=6)
    extra = _GROUPED_MLP | _OLD_OFFLOADING | (_BLACKWELL if "mxfp8" in flags or "nvfp4" in flags else {})
    _, want = survives(jobs, name, flags, (1, 2, 2), (0, 4, 1), extra=extra)
    _assert_copies_no_more_than_the_arithmetic_says(want, 2)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", _WIDE_CASES)
def test_a_run_on_four_nodes_that_loses_two_ends_as_the_undisturbed_one(name: str, jobs: Jobs) -> None:
    flags = default_gpt(*_WIDE_CASES[name].split(), iters=6)
    _, want = survives(jobs, name, flags, (1, 2, 2), (0, 4, 1), nodes=4)
    _assert_copies_no_more_than_the_arithmetic_says(want, 4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_attention_in_mxfp8(jobs: Jobs) -> None:
    given = f"{_DP} {_MXFP8} --fp8-dot-product-attention --position-embedding-type rope --seq-length 128 "
    given += "--max-position-embeddings 128 --num-attention-heads 8 --group-query-attention --num-query-groups 4 "
    given += "--kv-channels 32 --attention-dropout 0"
    flags, script = default_gpt(*given.split(), iters=6), Path(__file__).parents[1] / "pretrain_fp8_attention.py"
    _, want = survives(jobs, "fp8-attention", flags, (1, 2, 2), (0, 4, 1), script=script, extra=_BLACKWELL)
    other = undisturbed(launch_flags(2, 0, 1), [each for each in flags if "dot-product" not in each], extra=_BLACKWELL)
    assert want.exact() != other.exact(), "it makes a difference"


# Passes at which a node is lost, so that the other one breaks off where its modules are half-way through something.
_HALFWAY = {
    "overlapped shared experts": (
        f"{_GROUPED} {_EP} --moe-shared-expert-intermediate-size 64 --moe-shared-expert-overlap",
        3,
    ),
    "deferred gradient of the embedding": (
        f"{_PP} --defer-embedding-wgrad-compute --wgrad-deferral-limit 2 --untie-embeddings-and-output-weights",
        6,
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", _HALFWAY)
def test_what_a_module_was_in_the_middle_of_is_taken_back(name: str, jobs: Jobs) -> None:
    given, tick = _HALFWAY[name]
    survives(jobs, name, default_gpt(*given.split(), iters=6), (1, 2, tick), (0, 4, tick))


def _assert_copies_no_more_than_the_arithmetic_says(job: Job, ranks: int) -> None:
    text = "".join(path.read_text() for path in (job.run_dir / LOGS).glob("rank-*.log"))
    counts = [(int(a.replace(",", "")), int(b.replace(",", ""))) for a, b in _COPIES.findall(text)]
    copied, computed = (sum(column) for column in zip(*counts, strict=True))
    assert len(counts) == ranks
    # The rest is what a device holds of the small state, the padding of buckets and the scales of delayed scaling.
    assert computed <= copied <= computed + ranks * 8192


@pytest.mark.timeout(300)
def test_the_default_implementation_trains_in_every_dimension_at_once(tmp_path: Path) -> None:
    layout = f"{_TP} {_PP} {_DP} {_LLAMA} --hidden-dropout 0 --attention-dropout 0".split()
    default = alone(tmp_path, 8, default_gpt(*layout, iters=3))
    layout.remove("--sequence-parallel")
    local = alone(tmp_path, 8, default_gpt(*layout, *_LOCAL.split(), iters=3))
    assert [*default] == [*local] == [1, 2, 3]
    for here, there in zip(default.values(), local.values(), strict=True):
        assert float(here["lm loss"]) == pytest.approx(float(there["lm loss"]), rel=2e-4)
        assert float(here["grad norm"]) == pytest.approx(float(there["grad norm"]), rel=1e-2)
