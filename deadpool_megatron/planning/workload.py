"""What the arithmetic takes of a training job, and how Megatron's flags say it.

Sizes are bytes. Activation memory follows Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
Models" (2022), as `megatron.training.theoretical_memory_usage` does, with the gate of SwiGLU counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from deadpool_megatron.planning.files import PlanError, RunFile
from deadpool_megatron.planning.model import Counted, Flags, Layout, Model, Shard, layout, model

MAIN: Final = 4  # bytes of a main parameter
# How many moments an optimizer has of each parameter.
_MOMENTS: Final = {"adam": 2}
_MOMENTS_OTHERS: Final = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """A training job, whether it was read from flags or from a recipe.

    Attributes:
        sizes: its layout.
        model: its parameters.
        shards: parameters of one rank, by pipeline stage.
        activations: bytes on one device at once, by pipeline stage.
        operations: floating-point operations of an iteration.
        weight: bytes a parameter of the model.
        gradient: bytes a parameter in the gradient buffers.
        state: bytes a parameter that no other coordinate can give back, the main parameter with them.
        own_state: of these, what is not the model's own parameter.
        divided: whether replicas share the optimizer's state out among them.
        estimated: whether activations are too rough an estimate to refuse the run by.
        notes: what is to be known of it, a line each.
    """

    sizes: Layout
    model: Model | Counted
    shards: tuple[Shard, ...]
    activations: tuple[float, ...]
    operations: float
    weight: int
    gradient: int
    state: int
    own_state: int
    divided: bool
    estimated: bool = False
    notes: tuple[str, ...] = ()


def moments(optimizer: str, each: float = 4) -> int:
    """Bytes a parameter of an optimizer's moments, which have so many ``each``."""
    return int(_MOMENTS.get(optimizer, _MOMENTS_OTHERS) * each)


def of_flags(run: RunFile) -> Workload:
    """Of Megatron's flags. Raises PlanError where the run cannot work."""
    where, flags = run.name, run.megatron
    _supported(run)
    sizes = layout(where, flags, run.cluster.gpus)
    gpt = model(where, flags, sizes)
    number, on = Flags(where, flags).number, Flags(where, flags).on
    batch, micro = number("global-batch-size"), number("micro-batch-size")
    count = microbatches(where, batch, micro, sizes)
    half = on("bf16") or on("fp16")
    state = MAIN + moments(str(flags.get("optimizer", "adam")))
    return Workload(
        sizes=sizes,
        model=gpt,
        shards=tuple(gpt.stage(i, sizes) for i in range(sizes.pp)),
        activations=tuple(_activations(run, gpt, sizes, i, micro, count) for i in range(sizes.pp)),
        operations=_operations(gpt, batch),
        weight=2 if half else 4,
        gradient=2 if on("fp16") or on("grad-reduce-in-bf16") else 4,
        state=state,
        own_state=state if half else state - MAIN,  # in fp32 the main parameter is the model's own
        divided=on("use-distributed-optimizer"),
    )


def microbatches(where: str, batch: int, micro: int, sizes: Layout) -> int:
    """Of an iteration, on each replica. Raises PlanError where the batch cannot be dealt out."""
    if batch % (micro * sizes.dp):
        raise PlanError(
            f"{where}: global-batch-size {batch} is not a multiple of micro-batch-size {micro} x DP {sizes.dp}"
        )
    return batch // (micro * sizes.dp)


def under_way(sizes: Layout, stage: int, count: int) -> float:
    """Of so many microbatches, those whose activations a stage has at once."""
    most: float = min(sizes.pp - stage, count)
    return most * (1 + (sizes.pp - 1) / (sizes.pp * sizes.chunks)) if sizes.chunks > 1 else most


def _supported(run: RunFile) -> None:
    """Flags that no swap can carry are refused as at the start of a job."""
    from deadpool_megatron.compat import UserError
    from deadpool_megatron.support import attribute_of, check_arguments

    values = {attribute_of(flag): value for flag, value in run.megatron.items()}
    try:
        check_arguments(values, run.cluster.gpus_per_node)
    except UserError as err:
        raise PlanError(f"{run.name}: {err}") from None


def _activations(run: RunFile, gpt: Model, sizes: Layout, stage: int, micro: int, count: int) -> float:
    """Of the microbatches that are under way on a stage at once, and the logits of one."""
    flags = run.megatron
    tokens = gpt.seq * micro / sizes.cp
    h, t = gpt.hidden, sizes.tp
    wide = gpt.topk * gpt.expert_ffn if gpt.experts else gpt.ffn
    block = (8 * h + (6 if gpt.gated else 4) * wide) / t
    along = t if Flags(run.name, flags).on("sequence-parallel") else 1
    around = 10 * h / along
    layer = tokens * (around + block)
    if flags.get("recompute-granularity") == "full":
        kept, once = 2 * tokens * h / along, layer
    else:
        kept, once = layer, 0.0
    logits = tokens * gpt.vocab / t * 6 if stage == sizes.pp - 1 else 0.0  # bf16, and fp32 in the loss
    return kept * gpt.stages[stage] * under_way(sizes, stage, count) + once + logits


def _operations(gpt: Model, batch: int) -> float:
    """Of a forward and a backward pass."""
    attention = 12 * gpt.layers * gpt.heads * gpt.head_size * gpt.seq / 2  # causal: half of the square
    return batch * gpt.seq * (6 * gpt.active_parameters + attention)
