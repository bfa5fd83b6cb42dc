"""Steps 2, 4 and 6: whole jobs whose nodes share the device. A node is lost, and nothing may differ; then many."""

from __future__ import annotations

import itertools
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from deadpool_bench.gpu_kit.step import Step, StepOver, shared_device
from deadpool_bench.harness.jobs import Job
from deadpool_bench.kills import one
from deadpool_bench.paths import ROOT
from deadpool_megatron.jobs.job import JobError
from deadpool_megatron.observe import LOGS
from deadpool_megatron.observe.recoveries import PHASES

_HELD: Final = 6  # the iteration before which a job waits for its spare; a CUDA graph is replayed by then
_CLOSE_S: Final = 15.0  # before the end of the step its last job is given up, and told of
_GRACE_S: Final = 8.0
_STOP_S: Final = 90.0  # before the end of the step nothing is begun any more
# Nine processes share one device, and a job is held while its spare gets warm.
_PATIENT: Final = [
    f"--deadpool-{name}={s}" for name, s in (("form-deadline", 60), ("abort-deadline", 60), ("hang-floor", 120))
]
# No token is dropped, so the host waits for their numbers, and every all-to-all has other sizes.
_EXPERTS: Final = [
    *["--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall"],
    *["--expert-model-parallel-size", "2", "--disable-bias-linear"],
]
_GRAPHS: Final = ["--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", "2"]


def check_swaps(step: Step) -> None:
    """PP2 x DP2, then TP2 x PP2 x DP2 with sequence parallelism where there is a device for it."""
    _compare(step, "swap-pipeline", 4, _flags(step, tensor=1), last=False)
    _compare(step, "swap-tensor", 8, _flags(step, tensor=2))


def check_graphs(step: Step) -> None:
    """The same, with whole iterations in CUDA graphs: the node is lost while the graph is replayed."""
    flags = [*_flags(step, tensor=1), *_GRAPHS, "--no-check-for-nan-in-loss-and-grad"]
    _compare(step, "swap-graphs", 4, flags)


def check_soak(step: Step) -> None:
    """One kill after another over NCCL until the time is over; every recovery compares what replicas hold alike.

    Every other job has experts: torch polls for their all-to-alls beside its own watchdog (docs/limits.md).
    """
    rng, spares = random.Random(0), 2
    recoveries: list[dict[str, Any]] = []
    errors: list[str] = []
    struck = False
    for number in itertools.count(1):
        launch, flags = _launch(step, 4, spares), _flags(step, tensor=1, iterations=100_000)
        if number % 2:  # not all that experts do is deterministic on a device; no other run is compared with
            flags = [flag for flag in flags if flag != "--deterministic-mode"] + _EXPERTS
        script = ["examples/pretrain_gpt.py", *flags, "--deadpool", *_PATIENT]
        try:
            with _Job(step.scratch / f"soak-{number}", launch, script, _environment(step, 4 + spares), ROOT) as job:
                job.until("first iteration", partial(job.events, "iteration"), step.left_s())
                for _ in range(spares):
                    struck = True
                    recoveries.append(asdict(one(job, rng)))
                    struck = False
                    step.record("kill", job=number, **recoveries[-1])
                    if step.left_s() < _STOP_S:
                        break
        except JobError as err:
            errors.append(str(err))
            step.record("error", job=number, error=str(err), logs=_last_lines(step.scratch / f"soak-{number}"))
        except StepOver:
            errors += ["one was not recovered when the time was over"] if struck else []
            break
        if step.dry or errors or step.left_s() < _STOP_S:
            break
    seconds = [each["first_iteration_s"] for each in recoveries]
    figure = f"{len(recoveries)} nodes lost over {'Gloo' if step.dry else 'NCCL'}, {len(errors)} not recovered"
    if seconds:
        figure += f"; kill to first iteration median {statistics.median(seconds):.2f} s, most {max(seconds):.2f} s"
    step.check("soak", bool(recoveries) and not errors, figure + (f"; {errors[0]}" if errors else ""))


# ---- a job, undisturbed and killed


class _Job(Job):
    """A job that has no time to leave: its step is over soon."""

    def __exit__(self, *args: object) -> None:
        self.end(_GRACE_S)


def _compare(step: Step, name: str, nodes: int, flags: Sequence[str], last: bool = True) -> None:
    """Run twice, once with a node lost, and compare losses, gradient norms and state hashes.

    Each job may take half of the time that is left, the last one all of it: a job that hangs leaves the others some.
    """
    try:
        calm = _one(step, f"{name}-calm", nodes, flags, None, step.left_s() / 2)
        killed = _one(step, f"{name}-killed", nodes, flags, nodes // 2, (step.left_s() - _CLOSE_S) / (1 if last else 2))
    except JobError as err:
        step.check(name, False, str(err))
        return
    differ = [str(i) for i in sorted({*calm["losses"], *killed["losses"]}, key=int)
              if calm["losses"].get(i) != killed["losses"].get(i)]  # fmt: skip
    same_state = calm["hash"] == killed["hash"] is not None
    phases = killed["phases"]
    figure = f"{nodes} ranks, {len(calm['losses'])} iterations: " + (
        f"losses differ at iteration {', '.join(differ[:5])}" if differ else "losses equal"
    )
    figure += f", state {'equal' if same_state else 'differs'}, "
    figure += f"resumed {phases['resumed']:.2f} s after the kill" if "resumed" in phases else "nothing was recovered"
    step.check(name, not differ and same_state and "resumed" in phases, figure, phases=phases)


def _one(step: Step, name: str, nodes: int, flags: Sequence[str], victim: int | None, limit_s: float) -> dict[str, Any]:
    """One job, to its end. Raises JobError; the last lines of its logs are on file then."""
    run, hashes, go = (step.scratch / f"{name}{suffix}" for suffix in ("", ".hash", ".go"))
    script = [str(Path(__file__).with_name("held.py")), str(go), str(_HELD), "examples/pretrain_gpt.py", *flags]
    script += ["--deadpool", "--deadpool-state-hash", str(hashes), *_PATIENT]
    if victim is None:
        go.touch()
    phases: dict[str, float] = {}
    end = step.left_s() - limit_s  # of the step, that is left at the end of this job
    try:
        with _Job(run, _launch(step, nodes, 1), script, _environment(step, nodes + 1), ROOT) as job:
            if victim is not None:
                job.until("the first iterations", _reached(job, _HELD - 1), step.left_s() - end)
                job.until("a warm spare", partial(_parked, job), step.left_s() - end)
                go.touch()
                job.until("an iteration in full", _reached(job, _HELD), step.left_s() - end)
                moment = job.kill_node(victim)
            code = job.wait(step.left_s() - end)
            if code:
                job.failed(f"ended with {code}: {job.output.strip()[-300:]}")
            losses = {str(e["iteration"]): [e["losses_hex"], e["grad_norm_hex"]] for e in job.events("iteration")}
            if victim is not None:
                after = [e for e in job.events() if e["event"] in PHASES and e["t"] >= moment]
                phases = {e["event"]: e["t"] - moment for e in after}
    except JobError as err:
        step.record("error", job=name, error=str(err), logs=_last_lines(run))
        raise
    found = {"losses": losses, "hash": hashes.read_text() if hashes.exists() else None, "phases": phases}
    step.record("run", job=name, **found)
    return found


def _launch(step: Step, nodes: int, spares: int) -> list[str]:
    launch = ["--local-nodes", str(nodes + spares), "--spare-nodes", str(spares), "--nproc-per-node", "1"]
    return [*launch, "--emulate-cpu"] if step.dry else launch


def _environment(step: Step, nodes: int) -> dict[str, str]:
    return {**os.environ, **shared_device(step, nodes)}


def _flags(step: Step, tensor: int, iterations: int = 14) -> list[str]:
    """Of `examples/cpu_tiny.args`, larger and over NCCL on a device; the last one of an option counts."""
    flags = (ROOT / "examples" / "cpu_tiny.args").read_text().split()
    flags += ["--tensor-model-parallel-size", str(tensor), "--train-iters", str(iterations)]
    if step.dry:
        return flags
    flags += ["--distributed-backend", "nccl", "--hidden-size", "512", "--num-attention-heads", "8"]
    if iterations <= 100:
        flags += ["--train-iters", str(3 * iterations)]  # they are fast, and a node is to be lost in the middle
    return [*flags, "--deterministic-mode", *(["--sequence-parallel"] if tensor > 1 else [])]


def _reached(job: Job, iteration: int) -> Callable[[], bool]:
    return lambda: any(e["iteration"] >= iteration for e in job.events("iteration"))


def _parked(job: Job) -> bool:
    return any(spare["state"] == "parked" for spare in job.status()["spares"])


def _last_lines(run: Path) -> dict[str, list[str]]:
    """The last lines of each log of a run."""
    logs = [path for path in sorted((run / LOGS).glob("*.log")) if not path.is_symlink()]
    return {path.name: path.read_text(errors="replace").splitlines()[-25:] for path in logs}
