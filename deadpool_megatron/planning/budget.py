"""What a run needs of memory, copying and network, and why it cannot work where it cannot.

Sizes are bytes, times seconds. Activation memory follows Korthikanti et al., "Reducing Activation Recomputation in
Large Transformer Models" (2022), as `megatron.training.theoretical_memory_usage` does, with the gate of SwiGLU counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.domains import parse_domains
from deadpool_megatron.cluster.placement.groups import parallel_groups, place
from deadpool_megatron.cluster.placement.redundancy import Scheme, cost, tolerated
from deadpool_megatron.planning.files import PlanError, RunFile
from deadpool_megatron.planning.model import Flags, Layout, Model, layout, model

# Device context, communicators, fragmentation: what a device of 80 GB has been seen to lose, and no model has.
_RESERVE = 4e9
_SMALL = 1 << 20  # small state of a coordinate, well rounded up
# Bytes a parameter: fp32 main parameter and two moments, or one.
_STATE = {"adam": 12}
_STATE_OTHERS = 8


@dataclass(frozen=True, slots=True)
class Budget:
    """The arithmetic of a run. Per device: the most any of them needs; "mean" over all.

    ``drainer_node``: a copy of a node's own shards beside its vault, on their way to the durable directory.
    ``rehearsals``: on a device of a spare, of all that it rehearses, and of one of them that trains.
    """

    sizes: Layout
    model: Model
    weights: float
    gradients: float
    optimizer: float
    activations: float
    device: float
    state_bytes: int
    unique: float
    unique_mean: float
    weights_mean: float
    iteration_s: float
    copy_s: float
    vault_node: float
    drainer_node: float
    sent_node: float
    network_share: float
    spare_device: float
    rehearsals: float
    groups_changed: tuple[int, int]
    ranks_touched: int
    tolerated: str
    warnings: tuple[str, ...]


def budget(run: RunFile) -> Budget:
    """Do the arithmetic. Raises PlanError with the reason where the run cannot work."""
    where, cluster, flags = run.name, run.cluster, run.megatron
    if run.deadpool.deadpool and cluster.nodes < 2:
        raise PlanError(f"{where}: one node that trains has no peer to keep its shards: 2 or more are needed")
    _supported(run)
    sizes = layout(where, flags, cluster.gpus)
    gpt = model(where, flags, sizes)
    number, on = Flags(where, flags).number, Flags(where, flags).on
    micro, batch = number("micro-batch-size"), number("global-batch-size")
    if batch % (micro * sizes.dp):
        raise PlanError(
            f"{where}: global-batch-size {batch} is not a multiple of micro-batch-size {micro} x DP {sizes.dp}"
        )
    microbatches = batch // (micro * sizes.dp)
    half = on("bf16") or on("fp16")
    each_weight = 2 if half else 4
    each_gradient = 2 if on("fp16") or on("grad-reduce-in-bf16") else 4
    divided = on("use-distributed-optimizer")
    shards = [gpt.stage(i, sizes) for i in range(sizes.pp)]
    each_state = _STATE.get(str(flags.get("optimizer", "adam")), _STATE_OTHERS)
    # State that all replicas hold is copied a part a replica.
    unique = [each_state * s.unique(sizes) for s in shards]
    held = [s.dense + s.expert for s in shards]
    # In fp32 the main parameter is the model's own.
    own_state = each_state if half else each_state - 4
    state = [own_state * (s.unique(sizes) if divided else s.dense + s.expert) for s in shards]
    acting = [_activations(run, gpt, sizes, i, micro, microbatches) for i in range(sizes.pp)]
    totals = [h * (each_weight + each_gradient) + s + a for h, s, a in zip(held, state, acting, strict=True)]
    worst = max(range(sizes.pp), key=totals.__getitem__)
    device = totals[worst] + _RESERVE
    if device > cluster.gpu_memory * 1e9:
        raise PlanError(
            f"{where}: a device of stage {worst} needs {device / 1e9:.1f} GB (weights and gradients "
            f"{held[worst] * (each_weight + each_gradient) / 1e9:.1f}, optimizer {state[worst] / 1e9:.1f}, activations "
            f"{acting[worst] / 1e9:.1f}, reserve {_RESERVE / 1e9:.0f}) and has {cluster.gpu_memory:g}: split more, "
            "recompute, or take smaller microbatches"
        )
    iteration_s = _iteration(run, gpt, batch)
    interval = run.deadpool.snapshot_interval
    copy_s = max(unique) / (cluster.pcie * 1e9)
    scheme = Scheme.parse(run.deadpool.redundancy)
    # A node's devices may be of several stages; the largest count, which is what its vault must have room for.
    price = cost(scheme, int(max(unique)) + _SMALL, cluster.gpus_per_node)
    share = price.network_bytes / (cluster.network * 1e9 * iteration_s * interval)
    changed, touched = _disturbed(cluster.gpus_per_node, sizes)
    out = Budget(
        sizes=sizes,
        model=gpt,
        weights=held[worst] * each_weight,
        gradients=held[worst] * each_gradient,
        optimizer=state[worst],
        activations=acting[worst],
        device=device,
        state_bytes=each_state,
        unique=max(unique),
        unique_mean=sum(unique) / sizes.pp,
        weights_mean=sum(held) * each_weight / sizes.pp,
        iteration_s=iteration_s,
        copy_s=copy_s,
        vault_node=price.memory_bytes,
        drainer_node=(int(max(unique)) + _SMALL) * cluster.gpus_per_node if run.deadpool.durable_dir else 0.0,
        sent_node=price.network_bytes,
        network_share=share,
        spare_device=max(u + h * each_weight for u, h in zip(unique, held, strict=True)),
        rehearsals=_rehearsals(run, device, acting[worst]),
        groups_changed=changed,
        ranks_touched=touched,
        tolerated=_tolerated(run, sizes, scheme),
        warnings=_warnings(share, copy_s / (iteration_s * interval)),
    )
    _refuse(run, out, scheme)
    return out


def _rehearsals(run: RunFile, device: float, activations: float) -> float:
    """What trains at last stands beside those that make room for it, and the parked worker."""
    count = run.deadpool.rehearsals
    return count * (device - activations) + activations + _RESERVE if count else 0.0


def _refuse(run: RunFile, out: Budget, scheme: Scheme) -> None:
    where, cluster = run.name, run.cluster
    if out.rehearsals > cluster.gpu_memory * 1e9:
        raise PlanError(
            f"{where}: rehearsals {run.deadpool.rehearsals} needs {out.rehearsals / 1e9:.1f} GB of a spare's device, "
            f"which has {cluster.gpu_memory:g}: rehearse fewer nodes"
        )
    if out.vault_node > cluster.shm_bytes:
        raise PlanError(
            f"{where}: the vault of a node needs {out.vault_node / 1e9:.1f} GB of shared memory and /dev/shm has "
            f"{cluster.shm_bytes / 1e9:.1f}: use more data parallelism, enlarge /dev/shm, or name a "
            "larger --shm-directory"
        )
    if out.vault_node + out.drainer_node > cluster.host_memory * 1e9:
        drainer = f" and its drainer (durable_dir) {out.drainer_node / 1e9:.1f}" if out.drainer_node else ""
        raise PlanError(
            f"{where}: the vault of a node needs {out.vault_node / 1e9:.1f} GB{drainer}, and the node has "
            f"{cluster.host_memory:g}: use more data parallelism or nodes with more memory"
        )
    if cluster.nodes < scheme.size:
        raise PlanError(f"{where}: redundancy {scheme} needs {scheme.size} nodes that train, not {cluster.nodes}")
    interval = run.deadpool.snapshot_interval
    available = out.iteration_s * interval
    if out.copy_s > available or out.network_share > 1:
        slow = "a device to host copy" if out.copy_s > available else "sending to the peers"
        takes = max(out.copy_s, out.network_share * available)
        raise PlanError(
            f"{where}: {slow} takes {takes:.2f} s of {available:.2f} s between two generations, so most would be "
            "skipped: raise snapshot_interval, or use more data parallelism"
        )


def _warnings(share: float, copy_share: float) -> tuple[str, ...]:
    out = []
    if copy_share > 0.5:
        out.append("copying takes more than half of an iteration: it is to be done in its first half")
    if share > 0.3:
        out.append("the peers' copies take more than 30 % of the network: training may feel it")
    return tuple(out)


def _supported(run: RunFile) -> None:
    """Flags that no swap can carry are refused as at the start of a job."""
    from deadpool_megatron.compat import UserError
    from deadpool_megatron.support import attribute_of, check_arguments

    values = {attribute_of(flag): value for flag, value in run.megatron.items()}
    try:
        check_arguments(values, run.cluster.gpus_per_node)
    except UserError as err:
        raise PlanError(f"{run.name}: {err}") from None


def _activations(run: RunFile, gpt: Model, sizes: Layout, stage: int, micro: int, microbatches: int) -> float:
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
    under_way: float = min(sizes.pp - stage, microbatches)
    if sizes.chunks > 1:
        under_way *= 1 + (sizes.pp - 1) / (sizes.pp * sizes.chunks)
    logits = tokens * gpt.vocab / t * 6 if stage == sizes.pp - 1 else 0.0  # bf16, and fp32 in the loss
    return kept * gpt.stages[stage] * under_way + once + logits


def _iteration(run: RunFile, gpt: Model, batch: int) -> float:
    """From the operations of a forward and a backward pass and the share of the peak that is reached."""
    attention = 12 * gpt.layers * gpt.heads * gpt.head_size * gpt.seq / 2  # causal: half of the square
    operations = batch * gpt.seq * (6 * gpt.active + attention)
    cluster = run.cluster
    return operations / (cluster.gpus * cluster.tflops * 1e12 * cluster.utilisation)


def _coordinates(sizes: Layout) -> dict[int, r.CoordinateInfo]:
    """Ranks as Megatron numbers them: tp fastest, then cp, dp, pp."""
    out = {}
    for rank in range(sizes.world):
        rest, tp = divmod(rank, sizes.tp)
        rest, cp = divmod(rest, sizes.cp)
        pp, dp = divmod(rest, sizes.dp)
        out[rank] = r.CoordinateInfo(rank, tp, pp, dp, cp)
    return out


def _disturbed(slots: int, sizes: Layout) -> tuple[tuple[int, int], int]:
    """Of the TP, PP and DP groups, those the loss of one node changes, and all; and the ranks in a changed one."""
    members: dict[tuple[object, ...], set[int]] = {}
    for rank, c in _coordinates(sizes).items():
        for group in (("tp", c.pp, c.dp, c.cp), ("pp", c.tp, c.dp, c.cp), ("dp", c.tp, c.pp, c.cp)):
            members.setdefault(group, set()).add(rank)
    lost = set(range(slots))
    changed = [ranks for ranks in members.values() if len(ranks) > 1 and ranks & lost]
    return (len(changed), sum(len(ranks) > 1 for ranks in members.values())), len(set().union(*changed, lost))


def _tolerated(run: RunFile, sizes: Layout, scheme: Scheme) -> str:
    try:
        labels = parse_domains(run.deadpool.domains, run.cluster.nodes + run.cluster.spare_nodes)
    except ValueError as err:
        raise PlanError(f"{run.name}: {err}") from None
    assignment = placing.initial(run.cluster.nodes, run.cluster.gpus_per_node)
    groups = place(range(run.cluster.nodes), scheme, parallel_groups(assignment, _coordinates(sizes)), labels)
    return tolerated(groups, scheme, labels).sentence
