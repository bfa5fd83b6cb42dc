"""Upstream's scripts beside pretrain_gpt.py run on the same loop: their models survive the loss of both nodes too."""

from __future__ import annotations

import json
from random import Random

import pytest

from flags import default_gpt, without_values
from jobs import ROOT, Jobs, survives
from upstream import scripts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = ROOT / "tests" / "pretrain_other_models.py"
_TP = "--tensor-model-parallel-size 2 --sequence-parallel"
_PP = "--pipeline-model-parallel-size 2"
_MAMBA = "--mamba-state-dim 16 --mamba-head-dim 16 --mamba-num-groups 2 --position-embedding-type none"
_MODELS = {
    "hybrid, sequence parallelism": ("hybrid", f"{_TP} {_MAMBA} --hybrid-layer-pattern M*-M"),
    "hybrid, pipeline": ("hybrid", f"{_PP} {_MAMBA} --hybrid-layer-pattern M*-|M-"),
    "hybrid, experts": (
        "hybrid",
        f"{_MAMBA} --hybrid-layer-pattern M*ME --num-experts 4 --moe-router-topk 2 --moe-grouped-gemm "
        "--moe-token-dispatcher-type alltoall --expert-model-parallel-size 2 --disable-bias-linear",
    ),
    "BERT, pipeline": ("bert", f"{_PP} --attention-softmax-in-fp32"),
    "BERT, tensor parallelism": ("bert", "--tensor-model-parallel-size 2"),
    "T5": ("t5", "--tensor-model-parallel-size 2 --decoder-seq-length 64"),
    "packed documents": ("packed", f"{_TP} --position-embedding-type rope"),
    "VLM with a frozen tower, tensor parallelism": ("vlm", "--tensor-model-parallel-size 2"),
    "VLM with a frozen tower, data parallelism": ("vlm", "--overlap-grad-reduce --overlap-param-gather"),
}


@pytest.mark.parametrize("name", _MODELS)
def test_another_model_from_which_both_nodes_are_lost_ends_as_the_undisturbed_one(name: str, jobs: Jobs) -> None:
    model, given = _MODELS[name]
    flags = default_gpt("--dataloader-type", "external", *given.split(), iters=6)
    survives(jobs, name, flags, (1, 2, 2), (0, 4, 1), script=SCRIPT, extra={"MODEL": model})


_UPSTREAM = {
    "pretrain_hybrid.py": f"{_TP} {_MAMBA} --hybrid-layer-pattern M*-M",
    "pretrain_mamba.py": f"{_PP} {_MAMBA} --hybrid-layer-pattern M*-|M-",
    "pretrain_vlm.py": "--tensor-model-parallel-size 2 --freeze-ViT --ckpt-format torch --img-h 28 --img-w 28 "
    "--patch-dim 14 --decoder-seq-length 64 --encoder-num-layers 1 --decoder-num-layers 2 --disable-vision-class-token",
}


@pytest.mark.parametrize("script", _UPSTREAM)
def test_upstreams_own_script_from_which_both_nodes_are_lost_ends_as_the_undisturbed_run(
    script: str, jobs: Jobs
) -> None:
    beside = ("pretrain_gpt.py", "pretrain_hybrid.py", "gpt_builders.py", "model_provider.py", "hybrid_builders.py")
    scripts("core_v0.19.0", jobs.directory, *beside, script)
    flags = default_gpt(*_UPSTREAM[script].split(), iters=6)
    if "--decoder-num-layers" in flags:
        flags = without_values(flags, "--num-layers")
    survives(jobs, script, flags, (1, 2, 2), (0, 4, 1), script=jobs.directory / script)


def test_upstreams_dataset_of_conversations(jobs: Jobs) -> None:
    scripts("core_v0.19.0", jobs.directory, "pretrain_gpt.py", "gpt_builders.py", "model_provider.py")
    scripts("core_v0.19.0", jobs.directory, "hybrid_builders.py")
    file, random = jobs.directory / "conversations.jsonl", Random(5)
    file.write_text("".join(f"{json.dumps({'messages': _conversations(random)})}\n" for _ in range(30)))
    given = f"{_TP} --position-embedding-type rope --no-create-attention-mask-in-dataloader --sft"
    given += f" --tokenizer-type SFTTokenizer --data-path {file} --split 1,0,0"
    flags = without_values(default_gpt(iters=6), "--tokenizer-type", "--vocab-size")
    flags = [str(jobs.directory / "pretrain_gpt.py"), *flags, *given.split()]
    flags.remove("--mock-data")
    survives(jobs, "conversations", flags, (1, 2, 2), (0, 4, 1), script=ROOT / "tests" / "pretrain_wordpiece.py")


def _conversations(random: Random) -> list[dict[str, str]]:
    """Two, one after the other, of 40 words each: they fill a sequence of 64, and more."""
    roles = ("system", "user", "assistant", "user", "assistant")
    words = [f"w{4 * i}" for i in range(70)]
    return [{"role": role, "content": " ".join(random.choices(words, k=8))} for role in roles * 2]
