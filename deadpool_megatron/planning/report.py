"""The arithmetic of a run as text, and as numbers for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from deadpool_megatron.planning.budget import Budget
from deadpool_megatron.planning.files import RunFile
from deadpool_megatron.planning.narrower import Narrower, narrower
from deadpool_megatron.planning.spares import Spares, spares

# Abort, agreement, groups and warm-up of a recovery at some hundreds of devices: assumed, not measured.
_CONTROL_S = 10.0


def recovery_s(run: RunFile, plan: Budget) -> float:
    """What a swap is expected to cost: detection, control, the spare's shards, and one and a half iterations again."""
    transfer = plan.spare_device * run.cluster.gpus_per_node / (run.cluster.network * 1e9)
    return run.deadpool.lease + _CONTROL_S + transfer + 1.5 * plan.iteration_s


def numbers(run: RunFile, plan: Budget) -> dict[str, Any]:
    """All of them, by name."""
    sizes, counted, widths = plan.sizes, plan.model, narrower(run, plan)
    parameters = {"parameters": counted.parameters, "active_parameters": counted.active_parameters}
    return {
        **asdict(plan),
        "model": {**asdict(counted), **parameters},
        "sizes": {**asdict(sizes), "dp": sizes.dp},
        "spares": asdict(_worth(run, plan, widths)),
        "recovery_s": recovery_s(run, plan),
        "narrower": [asdict(each) for each in widths],
    }


def text(run: RunFile, plan: Budget) -> list[str]:
    """All of it, line by line."""
    c, s, m, widths = run.cluster, plan.sizes, plan.model, narrower(run, plan)
    worth = _worth(run, plan, widths)
    layout = [f"TP{s.tp}", f"PP{s.pp}", f"DP{s.dp}"]
    layout += [f"CP{s.cp}"] * (s.cp > 1) + [f"EP{s.ep}"] * (s.ep > 1)
    active = f" ({_count(m.active_parameters)} a token)" if m.active_parameters != m.parameters else ""
    interval = run.deadpool.snapshot_interval
    span = plan.iteration_s * interval
    each = "an iteration" if interval == 1 else f"every {interval} iterations"
    rate = f"{c.utilisation:.0%} of {c.tflops:g} TFLOP/s"
    return [
        f"{run.name}: {_count(m.parameters)} parameters{active} on {c.nodes} nodes of {c.gpus_per_node}, "
        f"{' x '.join(layout)}; {c.spare_nodes} spare",
        "",
        f"a device, the fullest stage          {_gb(plan.device)} of {c.gpu_memory:g} GB",
        f"  weights                            {_gb(plan.weights)}",
        f"  gradients                          {_gb(plan.gradients)}",
        f"  optimizer                          {_gb(plan.optimizer)}",
        f"  activations                        {_gb(plan.activations)}",
        f"  context, communicators (assumed)   {_gb(plan.device - _parts(plan))}",
        f"unique state a device                {_gb(plan.unique_mean)} = {plan.state_bytes} bytes a parameter, "
        f"a replica's part (most: {_gb(plan.unique)})",
        f"weights, gathered and not copied     {_gb(plan.weights_mean)} a device",
        f"an iteration                         {_time(plan.iteration_s)} at {rate}",
        f"copy to host memory, hidden          {_time(plan.copy_s)} {each} at {c.pcie:g} GB/s: "
        f"{plan.copy_s / span:.1%} of the time",
        f"vault of a node                      {_gb(plan.vault_node)} of {_gb(c.shm_bytes)} shared memory "
        f"(redundancy {run.deadpool.redundancy})",
        *_drainer(run, plan),
        f"sent by a node                       {_gb(plan.sent_node)} {each}: {plan.network_share:.1%} of its "
        f"{c.network:g} GB/s",
        f"a spare receives                     {_gb(plan.spare_device)} a device, "
        f"{_time(plan.spare_device * c.gpus_per_node / (c.network * 1e9))} a node",
        *_rehearsals(run, plan),
        *_standbys(run, plan),
        *_warm_server(plan),
        f"the loss of a node                   changes {plan.groups_changed[0]} of {plan.groups_changed[1]} groups, "
        f"touches {plan.ranks_touched} of {s.world} ranks",
        f"tolerated at once                    {plan.tolerated}",
        *(f"spares                               {sentence}" for sentence in plan.covered),
        *_narrower(widths),
        *_spares_text(run, plan, worth),
        *(f"note: {warning}" for warning in plan.warnings),
    ]


def _rehearsals(run: RunFile, plan: Budget) -> list[str]:
    if not plan.rehearsals:
        return []
    return [
        f"rehearsals of a spare                {_gb(plan.rehearsals)} of {run.cluster.gpu_memory:g} GB of a device, "
        f"{run.deadpool.rehearsals} at rest and one that trains"
    ]


def _standbys(run: RunFile, plan: Budget) -> list[str]:
    if not plan.standby_node:
        return []
    held = f"{_gb(plan.standby_device)} of each device" if plan.standby_device else "nothing of a device"
    return [
        f"processes that stand by              about {_gb(plan.standby_node)} of a node's host memory, {held} "
        f"(standby_workers {run.deadpool.standby_workers})"
    ]


def _warm_server(plan: Budget) -> list[str]:
    if not plan.warm_node:
        return []
    return [f"warm server of a node                about {_gb(plan.warm_node)} of host memory, which its forks share"]


def _drainer(run: RunFile, plan: Budget) -> list[str]:
    if not plan.drainer_node:
        return []
    whole = plan.vault_node + plan.drainer_node
    return [
        f"its drainer to the durable directory {_gb(plan.drainer_node)} more, a copy of its own shards: "
        f"{_gb(whole)} of {run.cluster.host_memory:g} GB host memory"
    ]


def _worth(run: RunFile, plan: Budget, widths: list[Narrower]) -> Spares:
    goes_on = any(not each.why_not for each in widths)
    return spares(run.cluster, recovery_s(run, plan), plan.sizes.dp if goes_on else 0)


def _narrower(widths: list[Narrower]) -> list[str]:
    if not widths:
        return []
    fit = [each for each in widths if not each.why_not]
    bad = [f"with {each.replicas} {each.why_not}" for each in widths if each.why_not]
    if not fit:
        return [f"fewer replicas                       none fit, so when_out_of_spares is save: {bad[0]}"]
    least = fit[-1]
    return [
        f"fewer replicas (when_out_of_spares)  {least.replicas} or more fit, on {least.nodes} nodes or more: with "
        f"{least.replicas} a device needs {_gb(least.device)}, the vault of a node {_gb(least.vault_node)}",
        *(f"                                     {why}" for why in bad),
    ]


def _spares_text(run: RunFile, plan: Budget, worth: Spares) -> list[str]:
    c = run.cluster
    if not c.failures:
        return ["spares                               no failures are expected, so none pays"]
    asked = f", asked for are {c.spare_nodes}" if c.spare_nodes != worth.best else ""
    rows = ", ".join(f"{n}: {share:.1%}" for n, share in enumerate(worth.goodput))
    return [
        f"a node fails every                   {worth.hours_between:.1f} h ({c.failures:g} in 1,000 node-days); with a "
        f"spare it costs about {_time(recovery_s(run, plan))}, without {worth.cost_without_hours:.1f} h",
        f"the first spare pays for itself      if a failure without one costs more than {worth.break_even_hours:.2f} h",
        f"training a node paid for, by spares  {rows}: best {worth.best}{asked}",
    ]


def _parts(plan: Budget) -> float:
    return plan.weights + plan.gradients + plan.optimizer + plan.activations


def _gb(size: float) -> str:
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if size >= scale:
            return f"{size / scale:.{digits}f} {unit}"
    return f"{size:.0f} bytes"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _count(number: int) -> str:
    return f"{number / 1e9:.1f}e9" if number >= 1e9 else f"{number / 1e6:.1f}e6" if number >= 1e6 else f"{number}"
