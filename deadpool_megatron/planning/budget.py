"""What a run needs of memory, copying and network, and why it cannot work where it cannot.

Sizes are bytes, times seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.domains import Labels, covered, parse_domains, whole
from deadpool_megatron.cluster.placement.groups import parallel_groups, place
from deadpool_megatron.cluster.placement.redundancy import Scheme, Tolerated, cost, tolerated
from deadpool_megatron.planning.files import PlanError, RunFile
from deadpool_megatron.planning.model import Counted, Layout, Model
from deadpool_megatron.planning.workload import Workload, of_flags

# Device context, communicators, fragmentation: what a device of 80 GB has been seen to lose, and no model has.
_RESERVE = 4e9
_CONTEXT = 1e9  # on a device, of a process that has brought it up and nothing else: an estimate
_PROCESS = 1.5e9  # of host memory, of a process that has imported torch, Megatron and their kernels: an estimate
_SMALL = 1 << 20  # small state of a coordinate, well rounded up


@dataclass(frozen=True, slots=True)
class Stage:
    """One device of a pipeline stage: its parameters, and bytes. ``unique``: what it copies a generation."""

    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    unique: float

    @property
    def all(self) -> float:
        """What is there at once."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, slots=True)
class Budget:
    """The arithmetic of a run. Per device: the most any of them needs; "mean" over all; ``stages`` has each.

    ``operations``: floating-point operations of an iteration. ``drainer_node``: a copy of a node's own shards beside
    its vault, on their way to the durable directory. ``rehearsals``: on a device of a spare, of all that it rehearses,
    and of one of them that trains. ``standby_device``, ``standby_node``: on a device, and of the host memory of a node,
    of the processes that stand by; ``warm_node``: of that memory, of its warm server. ``covered``: losses of each
    domain that a spare of it makes good, and whole domains, in words.
    """

    sizes: Layout
    model: Model | Counted
    weights: float
    gradients: float
    optimizer: float
    activations: float
    device: float
    state_bytes: int
    unique: float
    unique_mean: float
    weights_mean: float
    operations: float
    iteration_s: float
    copy_s: float
    vault_node: float
    drainer_node: float
    sent_node: float
    network_share: float
    spare_device: float
    rehearsals: float
    standby_device: float
    standby_node: float
    warm_node: float
    groups_changed: tuple[int, int]
    ranks_touched: int
    tolerated: str
    covered: list[str]
    warnings: tuple[str, ...]
    stages: tuple[Stage, ...]


def budget(run: RunFile, workload: Workload | None = None) -> Budget:
    """Do the arithmetic, for what the flags of the file say where no ``workload`` is given. Raises PlanError with the
    reason where the run cannot work."""
    where, cluster = run.name, run.cluster
    if run.deadpool.deadpool and cluster.nodes < 2:
        raise PlanError(f"{where}: one node that trains has no peer to keep its shards: 2 or more are needed")
    work = workload or of_flags(run)
    sizes = work.sizes
    # State that all replicas hold is copied a part a replica.
    unique = [work.state * s.unique(sizes) for s in work.shards]
    trained = [s.dense + s.expert for s in work.shards]
    held = [t + s.frozen for t, s in zip(trained, work.shards, strict=True)]
    state = [
        work.own_state * (s.unique(sizes) if work.divided else t) for t, s in zip(trained, work.shards, strict=True)
    ]
    stages = tuple(
        Stage(h, h * work.weight, t * work.gradient, s, a, u)
        for h, t, s, a, u in zip(held, trained, state, work.activations, unique, strict=True)
    )
    worst = max(range(sizes.pp), key=lambda index: stages[index].all)
    most = stages[worst]
    device = most.all + _RESERVE
    warnings = list(work.notes)
    if device > cluster.gpu_memory * 1e9:
        full = (
            f"a device of stage {worst} needs {device / 1e9:.1f} GB (weights and gradients "
            f"{(most.weights + most.gradients) / 1e9:.1f}, optimizer {most.optimizer / 1e9:.1f}, activations "
            f"{most.activations / 1e9:.1f}, reserve {_RESERVE / 1e9:.0f}) and has {cluster.gpu_memory:g}"
        )
        if not work.estimated:
            raise PlanError(f"{where}: {full}: split more, recompute, or take smaller microbatches")
        warnings.append(f"{full}, by an estimate that knows nothing of fused kernels, FP8 activations and graphs")
    iteration_s = work.operations / (cluster.gpus * cluster.tflops * 1e12 * cluster.utilisation)
    interval = run.deadpool.snapshot_interval
    copy_s = max(unique) / (cluster.pcie * 1e9)
    scheme = Scheme.parse(run.deadpool.redundancy)
    # A node's devices may be of several stages; the largest count, which is what its vault must have room for.
    price = cost(scheme, int(max(unique)) + _SMALL, cluster.gpus_per_node)
    # Constants: once in the own vault, once with each keeper, and sent once.
    constants = max(s.frozen for s in work.shards) * work.weight * cluster.gpus_per_node * (1 + scheme.m)
    share = price.network_bytes / (cluster.network * 1e9 * iteration_s * interval)
    changed, touched = _disturbed(cluster.gpus_per_node, sizes)
    copies = _tolerated(run, sizes, scheme)
    out = Budget(
        sizes=sizes,
        model=work.model,
        weights=most.weights,
        gradients=most.gradients,
        optimizer=most.optimizer,
        activations=most.activations,
        device=device,
        state_bytes=work.state,
        unique=max(unique),
        unique_mean=sum(unique) / sizes.pp,
        weights_mean=sum(held) * work.weight / sizes.pp,
        operations=work.operations,
        iteration_s=iteration_s,
        copy_s=copy_s,
        vault_node=price.memory_bytes + constants,
        drainer_node=(int(max(unique)) + _SMALL) * cluster.gpus_per_node if run.deadpool.durable_dir else 0.0,
        sent_node=price.network_bytes,
        network_share=share,
        spare_device=max(s.unique + s.weights for s in stages),
        rehearsals=_rehearsals(run, device, most.activations),
        standby_device=_standby(run, device, most.activations),
        standby_node=_PROCESS * cluster.gpus_per_node if run.deadpool.standby_workers != "none" else 0.0,
        warm_node=_PROCESS if run.deadpool.wants_warm_server else 0.0,
        groups_changed=changed,
        ranks_touched=touched,
        tolerated=copies.sentence,
        covered=_covered(run, copies),
        warnings=(*warnings, *_warnings(share, copy_s / (iteration_s * interval))),
        stages=stages,
    )
    _refuse(run, out, scheme)
    return out


def _rehearsals(run: RunFile, device: float, activations: float) -> float:
    """What trains at last stands beside those that make room for it, and the parked worker."""
    count = run.deadpool.rehearsals
    return count * (device - activations) + activations + _RESERVE if count else 0.0


def _standby(run: RunFile, device: float, activations: float) -> float:
    """Of a device, while another process trains on it."""
    levels = {"device": _CONTEXT, "coordinate": device - activations - _RESERVE + _CONTEXT}
    return levels.get(run.deadpool.standby_workers, 0.0)


def _refuse(run: RunFile, out: Budget, scheme: Scheme) -> None:
    where, cluster = run.name, run.cluster
    if out.rehearsals > cluster.gpu_memory * 1e9:
        raise PlanError(
            f"{where}: rehearsals {run.deadpool.rehearsals} needs {out.rehearsals / 1e9:.1f} GB of a spare's device, "
            f"which has {cluster.gpu_memory:g}: rehearse fewer nodes"
        )
    if out.device <= cluster.gpu_memory * 1e9 < out.device + out.standby_device:
        raise PlanError(
            f"{where}: standby_workers {run.deadpool.standby_workers} needs {out.standby_device / 1e9:.1f} GB of a "
            f"device beside the {out.device / 1e9:.1f} of the worker, and it has {cluster.gpu_memory:g}: take imports"
        )
    if out.vault_node > cluster.shm_bytes:
        raise PlanError(
            f"{where}: the vault of a node needs {out.vault_node / 1e9:.1f} GB of shared memory and /dev/shm has "
            f"{cluster.shm_bytes / 1e9:.1f}: use more data parallelism, enlarge /dev/shm, or name a "
            "larger --shm-directory"
        )
    if out.vault_node + out.drainer_node + out.standby_node + out.warm_node > cluster.host_memory * 1e9:
        drainer = f" and its drainer (durable_dir) {out.drainer_node / 1e9:.1f}" if out.drainer_node else ""
        standbys = f", processes that stand by {out.standby_node / 1e9:.1f}" if out.standby_node else ""
        standbys += f", its warm server {out.warm_node / 1e9:.1f}" if out.warm_node else ""
        raise PlanError(
            f"{where}: the vault of a node needs {out.vault_node / 1e9:.1f} GB{drainer}{standbys}, and the node has "
            f"{cluster.host_memory:g}: use more data parallelism or nodes with more memory"
        )
    if run.deadpool.deadpool and cluster.nodes < scheme.size:
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


def _labels(run: RunFile) -> Labels:
    nodes = run.cluster.nodes + run.cluster.spare_nodes
    try:
        return parse_domains(run.deadpool.domains, nodes, run.deadpool.nvlink_domains)
    except ValueError as err:
        raise PlanError(f"{run.name}: {err}") from None


def _tolerated(run: RunFile, sizes: Layout, scheme: Scheme) -> Tolerated:
    labels = _labels(run)
    assignment = placing.initial(run.cluster.nodes, run.cluster.gpus_per_node)
    groups = place(range(run.cluster.nodes), scheme, parallel_groups(assignment, _coordinates(sizes)), labels)
    return tolerated(groups, scheme, labels)


def _covered(run: RunFile, copies: Tolerated) -> list[str]:
    labels, trains = _labels(run), range(run.cluster.nodes)
    spares = range(len(trains), len(trains) + run.cluster.spare_nodes)
    uncopied = {kind: bad for kind, (_, bad) in copies.domains.items()}
    return covered(labels, trains, spares) + whole(labels, trains, spares, uncopied)
