"""Megatron's flags for a GPT so small that eight processes train it on two CPU cores, in every layout under test."""

from __future__ import annotations

from typing import Literal

__all__ = [
    "Layout",
    "Schedule",
    "default_gpt",
    "duo_gpt",
    "plain_optimizer",
    "tiny_gpt",
    "with_value",
    "without_values",
    "world_size",
]

Schedule = Literal["1f1b", "interleaved", "none"]
Layout = Literal["pipeline", "data"]

_MODEL = {
    "--num-layers": 4,
    "--hidden-size": 64,
    "--num-attention-heads": 4,
    "--seq-length": 64,
    "--max-position-embeddings": 64,
}
_TRAINING = {
    "--micro-batch-size": 1,
    "--global-batch-size": 8,
    "--lr": "1e-3",
    "--min-lr": "1e-4",
    "--lr-warmup-iters": 2,
    "--lr-decay-iters": 20,
    "--log-interval": 1,
    "--eval-interval": 1000,
    "--eval-iters": 0,
    "--num-workers": 0,
}
# What real runs use and DeadPool hooks into.
_REAL = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
_DATA = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255"]
# What a machine without a GPU cannot do: fused kernels, Transformer Engine, NCCL.
_ON_CPU = [
    *["--transformer-impl", "local", "--distributed-backend", "gloo", "--attention-backend", "unfused"],
    *["--no-persist-layer-norm", "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"],
    *["--no-bias-swiglu-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion"],
]
_MOE = [
    *["--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall"],
    "--disable-bias-linear",
]
_SIZES = {
    "tensor": "--tensor-model-parallel-size",
    "pipeline": "--pipeline-model-parallel-size",
    "expert": "--expert-model-parallel-size",
}


def tiny_gpt(schedule: Schedule = "1f1b", moe: bool = False, iters: int = 6) -> list[str]:
    """Flags of one training run, parallel sizes included; dropout stays at Megatron's 0.1, so that RNG states matter.

    Args:
        schedule: ``"1f1b"`` is TP2 PP2; ``"interleaved"`` the same with two model chunks a stage; ``"none"`` is TP2
            without a pipeline.
        moe: four experts over EP2 and no tensor parallelism: Megatron wants sequence parallelism for both together,
            which needs a GPU.
        iters: training iterations.
    """
    tensor = 1 if moe else 2
    pipeline = 1 if schedule == "none" else 2
    valued = _MODEL | _TRAINING | {"--train-iters": iters}
    out = [text for name, value in valued.items() for text in (name, str(value))]
    out += [*_REAL, *_DATA, *_ON_CPU]
    out += [_SIZES["tensor"], str(tensor), _SIZES["pipeline"], str(pipeline)]
    if schedule == "interleaved":
        out += ["--num-layers-per-virtual-pipeline-stage", "1"]
    if moe:
        out += [*_MOE, _SIZES["expert"], "2"]
    return out


def default_gpt(*more: str, iters: int = 6) -> list[str]:
    """Flags of a run with Megatron's default implementation, Transformer Engine's layers and optimizer, and ``more``.

    Two layers; none of the flags that spare a machine without GPU the fused kernels.
    """
    valued = _MODEL | _TRAINING | {"--num-layers": 2, "--train-iters": iters}
    out = [text for name, value in valued.items() for text in (name, str(value))]
    return [*out, "--bf16", "--use-distributed-optimizer", *_DATA, *more]


def with_value(flags: list[str], flag: str, value: object) -> list[str]:
    """The flags with another value for one that is among them."""
    place = flags.index(flag) + 1
    return [*flags[:place], str(value), *flags[place + 1 :]]


def without_values(flags: list[str], *names: str) -> list[str]:
    """The flags without some that take a value, each of which is among them."""
    out = list(flags)
    for name in names:
        place = out.index(name)
        del out[place : place + 2]
    return out


def plain_optimizer(flags: list[str]) -> list[str]:
    """The flags of a run whose replicas all hold the whole state of the optimizer."""
    return [flag for flag in flags if flag not in ("--use-distributed-optimizer", "--overlap-param-gather")]


def duo_gpt(layout: Layout = "pipeline", iters: int = 6) -> list[str]:
    """Flags of a run on two processes: two pipeline stages, or two replicas; four microbatches each."""
    out = tiny_gpt("1f1b", iters=iters)
    out = with_value(out, _SIZES["tensor"], 1)
    out = with_value(out, "--num-layers", 2)
    if layout == "pipeline":
        return with_value(out, "--global-batch-size", 4)
    return with_value(out, _SIZES["pipeline"], 1)


def world_size(flags: list[str]) -> int:
    """The fewest processes with two replicas of everything, experts included: 8, or 4 without a pipeline."""
    size = 2
    for name in _SIZES.values():
        if name in flags:
            size *= int(flags[flags.index(name) + 1])
    return size
