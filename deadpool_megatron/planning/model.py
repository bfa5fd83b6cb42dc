"""How many parameters a GPT of Megatron's has, and where tensor, pipeline and expert parallelism put them.

Counted layer by layer as `megatron.core.models.gpt` builds them; a test compares with the real model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deadpool_megatron.planning.files import PlanError


@dataclass(frozen=True, slots=True)
class Layout:
    """Parallel sizes of a run. ``etp``: ways in which an expert is split; ``chunks``: model chunks a stage (virtual
    pipeline)."""

    world: int
    tp: int
    pp: int
    cp: int
    ep: int
    etp: int
    chunks: int

    @property
    def dp(self) -> int:
        """Replicas of everything that is no expert."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        """Replicas of an expert."""
        return self.world // (self.pp * self.ep * self.etp)


@dataclass(frozen=True, slots=True)
class Counted:
    """Parameters of a model that was counted as it is built: all, each once, and those that a token meets."""

    parameters: int
    active_parameters: int


@dataclass(frozen=True, slots=True)
class Model:
    """What counts of a GPT. ``stages``: layers of each pipeline stage."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_size: int
    ffn: int
    experts: int
    topk: int
    expert_ffn: int
    vocab: int
    positions: int
    seq: int
    gated: bool
    bias: bool
    qkv_bias: bool
    norm: int
    tied: bool
    stages: tuple[int, ...]

    def _mlp(self, ffn: int, tp: int) -> int:
        """Parameters of one feed-forward block on one of ``tp`` ranks."""
        up = 2 * ffn if self.gated else ffn
        split = self.hidden * up + ffn * self.hidden + (up if self.bias else 0)
        return split // tp + (self.hidden if self.bias else 0)

    def _attention(self, tp: int) -> int:
        q, kv = self.heads * self.head_size, 2 * self.groups * self.head_size
        column = self.hidden * (q + kv) + (q + kv if self.bias or self.qkv_bias else 0)
        return (column + q * self.hidden) // tp + (self.hidden if self.bias else 0)

    def _dense_layer(self, tp: int) -> int:
        block = self.hidden * self.experts if self.experts else self._mlp(self.ffn, tp)
        return self._attention(tp) + block + 2 * self.norm * self.hidden

    def stage(self, index: int, sizes: Layout) -> Shard:
        """What one rank of pipeline stage ``index`` holds."""
        tp = sizes.tp
        dense = self.stages[index] * self._dense_layer(tp)
        first, last = index == 0, index == sizes.pp - 1
        if first:
            dense += self.vocab * self.hidden // tp + self.positions * self.hidden
        if last:
            dense += self.norm * self.hidden
            if not (self.tied and first):
                dense += self.vocab * self.hidden // tp  # tied, on another stage than the first: a copy
        one = self._mlp(self.expert_ffn, sizes.etp) if self.experts else 0
        return Shard(dense, self.stages[index] * one * self.experts // sizes.ep)

    @property
    def parameters(self) -> int:
        """All of them, each once."""
        alone = Layout(1, 1, 1, 1, 1, 1, 1)
        whole = Model(**{**{k: getattr(self, k) for k in self.__slots__}, "stages": (self.layers,)})
        shard = whole.stage(0, alone)
        return shard.dense + shard.expert

    @property
    def active_parameters(self) -> int:
        """Those that a token meets: of the experts only the chosen ones."""
        unused = self.layers * (self.experts - self.topk) * self._mlp(self.expert_ffn, 1) if self.experts else 0
        return self.parameters - unused


@dataclass(frozen=True, slots=True)
class Shard:
    """Parameters of one rank before the distributed optimizer divides their state. ``frozen``: not trained."""

    dense: int
    expert: int
    frozen: int = 0

    def unique(self, sizes: Layout) -> int:
        """Of them, those whose optimizer state this rank alone holds."""
        return -(-self.dense // (sizes.dp * sizes.cp)) + -(-self.expert // sizes.expert_dp)


class Flags:
    """Megatron's flags as numbers, with its defaults."""

    def __init__(self, where: str, flags: Mapping[str, Any]) -> None:
        self._where, self._flags = where, flags

    def number(self, name: str, default: int | None = None) -> int:
        value = self._flags.get(name, default)
        if value is None:
            raise PlanError(f"{self._where}: megatron: {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(f"{self._where}: megatron: {name}: expected a whole number above 0, not {value!r}")
        return value

    def on(self, name: str) -> bool:
        """Whether a switch is there. Its value in the file is true, or Megatron would be given a word behind it."""
        value = self._flags.get(name, False)
        if not isinstance(value, bool):
            raise PlanError(f"{self._where}: megatron: {name} is a switch: true (or leave it out), not {value!r}")
        return value


def layout(where: str, flags: Mapping[str, Any], world: int) -> Layout:
    """The parallel sizes. Raises PlanError where they do not fit together."""
    f = Flags(where, flags)
    tp, pp, cp, ep = (
        f.number(f"{kind}-parallel-size", 1) for kind in ("tensor-model", "pipeline-model", "context", "expert-model")
    )
    etp = f.number("expert-tensor-parallel-size", tp)
    layers = f.number("num-layers")
    chunks = 1
    if "num-layers-per-virtual-pipeline-stage" in flags:
        each = f.number("num-layers-per-virtual-pipeline-stage")
        if pp < 2 or layers % (pp * each):
            raise PlanError(f"{where}: {layers} layers are not a multiple of PP {pp} x {each} layers a virtual stage")
        chunks = layers // (pp * each)
    return divided(where, Layout(world, tp, pp, cp, ep, etp, chunks))


def divided(where: str, sizes: Layout) -> Layout:
    """The same. Raises PlanError where they do not divide the processes."""
    s = sizes
    for ways, said in (
        (s.tp * s.pp * s.cp, f"TP {s.tp} x PP {s.pp} x CP {s.cp}"),
        (s.pp * s.ep * s.etp, f"PP {s.pp} x EP {s.ep} x expert TP {s.etp}"),
    ):
        if s.world % ways:
            raise PlanError(f"{where}: {s.world} GPUs that train are not a multiple of {said} = {ways}")
    return sizes


def model(where: str, flags: Mapping[str, Any], sizes: Layout) -> Model:
    """The model. Raises PlanError where it cannot be split as asked."""
    f = Flags(where, flags)
    layers, hidden, heads = f.number("num-layers"), f.number("hidden-size"), f.number("num-attention-heads")
    if hidden % heads and "kv-channels" not in flags:
        raise PlanError(f"{where}: hidden-size {hidden} is not a multiple of num-attention-heads {heads}")
    gated = f.on("swiglu")
    ffn = f.number("ffn-hidden-size", int((4 * hidden * 2 / 3) / 64) * 64 if gated else 4 * hidden)
    experts = f.number("num-experts") if "num-experts" in flags else 0
    groups = f.number("num-query-groups", heads) if f.on("group-query-attention") else heads
    for name, value in (("num-attention-heads", heads), ("num-query-groups", groups), ("ffn-hidden-size", ffn)):
        if value % sizes.tp:
            raise PlanError(f"{where}: {name} {value} is not a multiple of TP {sizes.tp}")
    if experts % sizes.ep:
        raise PlanError(f"{where}: num-experts {experts} is not a multiple of EP {sizes.ep}")
    if sizes.ep > 1 and not experts:
        raise PlanError(f"{where}: expert-model-parallel-size {sizes.ep} without num-experts")
    unit = f.number("make-vocab-size-divisible-by", 128) * sizes.tp
    learned = flags.get("position-embedding-type", "learned_absolute") == "learned_absolute"
    return Model(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=groups,
        head_size=f.number("kv-channels", hidden // heads),
        ffn=ffn,
        experts=experts,
        topk=f.number("moe-router-topk", 2) if experts else 0,
        expert_ffn=f.number("moe-ffn-hidden-size", ffn) if experts else 0,
        vocab=-(-f.number("vocab-size") // unit) * unit,
        positions=f.number("max-position-embeddings") if learned else 0,
        seq=f.number("seq-length"),
        gated=gated,
        bias=not f.on("disable-bias-linear"),
        qkv_bias=f.on("add-qkv-bias"),
        norm=1 if flags.get("normalization", "LayerNorm") == "RMSNorm" else 2,
        tied=not f.on("untie-embeddings-and-output-weights"),
        stages=_stages(where, f, flags, layers, sizes.pp),
    )


def _stages(where: str, f: Flags, flags: Mapping[str, Any], layers: int, pp: int) -> tuple[int, ...]:
    ends = {name: f"decoder-{name}-pipeline-num-layers" for name in ("first", "last")}
    given = {name: f.number(flag) for name, flag in ends.items() if flag in flags}
    if pp == 1:
        return (layers,)
    middle = pp - len(given)
    rest = layers - sum(given.values())
    if rest < 0 or (middle and rest % middle) or (not middle and rest):
        raise PlanError(f"{where}: {layers} layers cannot be dealt out evenly to PP {pp} stages")
    each = rest // middle if middle else 0
    out = [each] * pp
    out[0], out[-1] = given.get("first", each), given.get("last", each)
    return tuple(out)
