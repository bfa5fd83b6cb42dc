"""With how many replicas fewer a run can go on where no spare is left (``when_out_of_spares: shrink``).

Fewer replicas hold larger parts of the optimizer's state, on devices and in vaults. What they begin with takes half of
the vaults of the width before, beside theirs, until they have committed a generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.durable import fills
from deadpool_megatron.planning.budget import Budget, budget
from deadpool_megatron.planning.files import PlanError, RunFile
from deadpool_megatron.planning.model import Flags


@dataclass(frozen=True, slots=True)
class Narrower:
    """One number of replicas, and the nodes that it fills. ``device``, ``vault_node``: bytes, as of `Budget`.

    ``why_not``: why it does not fit, in words; empty: it does.
    """

    replicas: int
    nodes: int
    device: float
    vault_node: float
    why_not: str


def narrower(run: RunFile, plan: Budget) -> list[Narrower]:
    """From the widest down to the first that does not fit; those that fill whole nodes. None where nothing shrinks."""
    sizes, out, before = plan.sizes, list[Narrower](), plan.vault_node
    if run.deadpool.when_out_of_spares != "shrink":
        return out
    replica = sizes.world // sizes.dp
    instances = Flags(run.name, run.megatron).number("num-distributed-optimizer-instances", 1)
    for replicas in range(sizes.dp - 1, 0, -1):
        nodes = placing.nodes_for(replicas, replica, run.cluster.gpus_per_node)
        if nodes is not None and fills(replicas * sizes.cp, sizes.ep, instances) and not (out and out[-1].why_not):
            out.append(_one(run, replicas, nodes, before / 2))
            before = out[-1].vault_node
    return out


def _one(run: RunFile, replicas: int, nodes: int, base: float) -> Narrower:
    """``base``: bytes a node that what they begin with takes."""
    micro = int(run.megatron["micro-batch-size"]) * replicas
    batch = math.ceil(int(run.megatron["global-batch-size"]) / micro) * micro  # one replica may have one more
    few = nodes < Scheme.parse(run.deadpool.redundancy).size
    settings = replace(
        run.deadpool,
        when_out_of_spares="save",
        redundancy="1" if few else run.deadpool.redundancy,  # what is left of a scheme is not more
        domains="",
        nvlink_domains="",
        deadpool=nodes > 1,
    )
    there = replace(
        run,
        cluster=replace(run.cluster, nodes=nodes, spare_nodes=0),
        megatron={**run.megatron, "global-batch-size": batch},
        deadpool=settings,
    )
    try:
        plan = budget(there)
    except PlanError as err:
        return Narrower(replicas, nodes, 0.0, 0.0, str(err).removeprefix(f"{run.name}: "))
    there_is, why = min(run.cluster.shm_bytes, run.cluster.host_memory * 1e9), ""
    if plan.vault_node + base > there_is:
        why = (
            f"the vault of a node needs {plan.vault_node / 1e9:.1f} GB beside {base / 1e9:.1f} of what the job begins "
            f"with, and there are {there_is / 1e9:.1f}"
        )
    return Narrower(replicas, nodes, plan.device, plan.vault_node, why)
