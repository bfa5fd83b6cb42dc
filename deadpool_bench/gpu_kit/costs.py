"""Steps 3 and 5: what snapshots cost, alone on a device and with shards going from one agent to another at speed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deadpool_bench.gpu_kit.step import Step, shared_device
from deadpool_bench.paths import ROOT

_RATIO: Final = 1.003  # of the means of iterations with and without snapshots
_NOTICED: Final = 1.01  # where two ranks share the device, and agents send
_MARGIN_S: Final = 15.0
_CPUS: Final = 8  # from so many on a quarter is the agents'


def check_overhead(step: Step) -> None:
    """1.3B parameters on one device, alternated blocks: BF16, then FP32, whose iterations are longer."""
    large = _large(step)
    fast, slow = (["--global-batch-size", str(n)] for n in ((8, 8) if step.dry else (96, 16)))
    _overhead(step, "overhead-bf16", "bf16", 1, [*large, *fast], 0.55 * step.left_s(), _RATIO)
    _overhead(step, "overhead-fp32", "fp32", 1, [*large, *slow], step.left_s(), _RATIO)


def check_vault(step: Step) -> None:
    """Two nodes on the device, 8 GB of 1.3B parameters' state each: both send, receive and verify them all the time."""
    batch = ["--global-batch-size", "8" if step.dry else "64"]
    _overhead(step, "vault", "bf16", 2, [*_large(step), *batch], step.left_s(), _NOTICED)


def _large(step: Step) -> list[str]:
    if step.dry:
        flags = (ROOT / "examples" / "cpu_tiny.args").read_text().split()
        return [*flags, "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    return (ROOT / "examples" / "gpt_1p3b.args").read_text().split()


def _overhead(
    step: Step, name: str, precision: str, nodes: int, flags: Sequence[str], seconds: float, most: float
) -> None:
    """`deadpool bench overhead` within ``seconds``; what it has so far is kept beside the step's file."""
    out = step.scratch / name
    kept = step.out / f"step-{step.number}-{precision}.json"
    kept.unlink(missing_ok=True)
    minutes = max(1.0, (min(seconds, step.left_s()) - _MARGIN_S) / 60)
    sizes = ["--blocks", "4" if step.dry else "400", "--block", "2", "--warmup", "1" if step.dry else "2"]
    command = [sys.executable, "-m", "deadpool_megatron.cli", "bench", "overhead", "--checkpoints", "none"]
    command += ["--active-nodes", str(nodes), "--nproc-per-node", "1", "--precisions", precision, "--out", str(out)]
    command += ["--minutes", f"{minutes:.2f}", *sizes, *(["--emulate-cpu"] if step.dry else _cores())]

    def keep() -> None:
        if (out / "overhead.json").exists():
            shutil.copyfile(out / "overhead.json", kept)

    environment = shared_device(step, nodes) if step.dry or nodes > 1 else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    code = step.command([*command, "examples/pretrain_gpt.py", *flags], environment, seconds, look=keep)
    found = _found(kept, precision)
    if not found.get("blocks"):
        step.check(name, False, f"not measured: {found.get('error', f'the bench ended with {code}')}")
        return
    ratio, s = found["blocks"], found["snapshot"]
    cpu = s["cpu_s"]
    figure = (
        f"ratio {ratio['ratio']:.4f} (95 % interval {ratio['low']:.4f} to {ratio['high']:.4f}, {ratio['pairs']} pairs "
        f"of blocks), {s['skipped']} of {s['generations']} generations skipped, {s['copied_bytes'] / 1e9:.2f} GB a "
        f"rank at {s['copy_bandwidth'] / 1e9:.1f} GB/s, committed after {s['commit_share'] or 0:.2f} of an iteration "
        f"of {ratio['off']['mean']:.2f} s; CPU seconds an iteration: workers {cpu['workers_on']:.2f} with, "
        f"{cpu['workers_off']:.2f} without, agents {cpu['agents_on']:.2f}, {cpu['agents_off']:.2f}"
    )
    # Dry, the ratio says nothing: other processes of the machine are in it.
    passed = not found.get("error") and (step.dry or (ratio["ratio"] <= most and not s["skipped"]))
    step.check(name, passed, figure, blocks=ratio, snapshot=s)


def _cores() -> list[str]:
    """Agents apart from workers, as they are on a machine of their own, where there are processors for that."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < _CPUS:
        return []
    at = 3 * len(cpus) // 4
    return ["--cores", ":".join(",".join(map(str, each)) for each in (cpus[:at], cpus[at:]))]


def _found(kept: Path, precision: str) -> Mapping[str, Any]:
    if not kept.exists():
        return {}
    found: Mapping[str, Any] = json.loads(kept.read_text())["results"].get(precision, {})
    return found
