"""Megatron's features and a lost node in one run: every one ends bit for bit as it would have without the loss.

Small jobs, two processes and a spare; the node of rank 0 is killed in the middle of iteration 3 unless said otherwise.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from deadpool_bench.harness.ports import free_ports
from flags import Layout, duo_gpt, with_value, without_values
from jobs import (
    EXAMPLE,
    ROOT,
    Job,
    Jobs,
    assert_same_checkpoint,
    assert_same_training,
    environment,
    launch_flags,
    undisturbed,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ITERATIONS = 6
# Megatron-core 0.19 saves at once, with a warning, where the persistent worker is not asked for.
_ASYNC = "--async-save --async-strategy mcore --use-persistent-ckpt-worker"
EXTERNAL = ROOT / "tests" / "pretrain_external.py"
YAML = ROOT / "tests" / "pretrain_yaml.py"


def _same_checkpoints(job: Job, want: Job) -> None:
    mine, theirs = (Path(f"{j.run_dir}.ckpt") for j in (job, want))
    for directory in (mine, theirs):
        assert (directory / "latest_checkpointed_iteration.txt").read_text() == "6"
    for iteration in (2, 4, 6):
        assert_same_checkpoint(mine / f"iter_{iteration:07d}", theirs / f"iter_{iteration:07d}")


def _same_last_checkpoint(job: Job, want: Job) -> None:
    for each in (job, want):
        said = "".join(path.read_text() for path in (each.run_dir / "logs").glob("*.log"))
        assert "Disabling --async-save" not in said and ("Starting Async Caller" in said) == (
            "--async-save" in each.flags
        )
    mine, theirs = (Path(f"{j.run_dir}.ckpt") for j in (job, want))
    assert (mine / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert_same_checkpoint(mine / "iter_0000006", theirs / "iter_0000006")


def _same_latest(job: Job, want: Job) -> None:
    mine, theirs = (Path(f"{j.run_dir}.ckpt") for j in (job, want))
    latest = [(d / "latest_checkpointed_iteration.txt").read_text() for d in (mine, theirs)]
    assert latest[0] == latest[1]
    assert_same_checkpoint(mine / f"iter_{int(latest[0]):07d}", theirs / f"iter_{int(latest[0]):07d}")


def _wrote_scalars(job: Job, want: Job) -> None:
    """The rank that writes them (the last stage) lived on: each step is there, with the undisturbed run's values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    series = []
    for each in (job, want):
        events = EventAccumulator(f"{each.run_dir}.tensorboard")
        events.Reload()
        series.append({e.step: e.value for e in events.Scalars("lm loss")})
    assert series[0] == series[1] and sorted(series[1]) == list(range(1, ITERATIONS + 1))


def _evaluated(job: Job, want: Job) -> None:
    def lines(each: Job) -> list[str]:
        text = (each.run_dir / "logs" / "rank-1.log").read_text()
        return [x.split("validation loss", 1)[1] for x in text.splitlines() if "validation loss at iteration" in x]

    assert lines(want) and set(lines(job)) == set(lines(want))


def _same_recordings(job: Job, want: Job) -> None:
    def recorded(each: Job) -> dict[str, Any]:
        root = Path(f"{each.run_dir}.ckpt")
        files = [path for kind in ("activations", "dgrads") for path in sorted((root / kind).rglob("*.pth"))]
        return {str(path.relative_to(root)): torch.load(path, weights_only=False) for path in files}

    mine, theirs = recorded(job), recorded(want)
    assert {str(Path(name).parent) for name in mine} == {f"{kind}/iter_0000004" for kind in ("activations", "dgrads")}
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@dataclass(frozen=True)
class Feature:
    """Flags that switch a feature on; ``@`` stands for the path of the run directory."""

    flags: str
    layout: Layout = "pipeline"
    script: Path = EXAMPLE
    node: int = 0
    at: tuple[int, int] = (3, 2)
    also: Callable[[Job, Job], None] | None = None


FEATURES = {
    "checkpoints": Feature(
        "--save @.ckpt --save-interval 2 --ckpt-format torch_dist", at=(4, 1), also=_same_checkpoints
    ),
    "asynchronous checkpoints": Feature(
        f"--save @.ckpt --save-interval 2 --ckpt-format torch_dist {_ASYNC}", at=(3, 2), also=_same_last_checkpoint
    ),
    "an asynchronous checkpoint in flight": Feature(
        f"--save @.ckpt --save-interval 2 --ckpt-format torch_dist {_ASYNC}",
        at=(4, 1),
        also=_same_last_checkpoint,
    ),
    "non-persistent checkpoints between asynchronous ones": Feature(
        "--save @.ckpt --save-interval 4 --non-persistent-save-interval 2 --non-persistent-ckpt-type global "
        f"--ckpt-format torch_dist {_ASYNC}",
        at=(4, 2),
        also=_same_latest,
    ),
    "evaluation": Feature("--eval-interval 2 --eval-iters 2", also=_evaluated),
    "batch-size ramp-up": Feature(
        "--rampup-batch-size 2 2 12 --train-samples 32 --lr-decay-samples 80 --lr-warmup-samples 8", at=(6, 2)
    ),
    "gradient accumulation over 8 microbatches": Feature("--global-batch-size 16", "data"),
    "full activation recompute": Feature(
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
    "selective activation recompute": Feature("--recompute-granularity selective"),
    "tied embeddings": Feature(""),
    "untied embeddings": Feature("--untie-embeddings-and-output-weights"),
    "uneven pipeline stages": Feature("--num-layers 3 --decoder-first-pipeline-num-layers 1"),
    "virtual pipeline": Feature("--num-layers 4 --num-layers-per-virtual-pipeline-stage 1"),
    "rerun mode validate_results": Feature("--rerun-mode validate_results"),
    "rerun mode disabled": Feature("--rerun-mode disabled"),
    "log interval 3": Feature("--log-interval 3"),
    "TensorBoard": Feature(
        "--tensorboard-dir @.tensorboard --log-timers-to-tensorboard --log-memory-to-tensorboard", also=_wrote_scalars
    ),
    "recorded activations and gradients": Feature(
        "--save @.ckpt --save-interval 100 --ckpt-format torch_dist "
        "--save-activations-interval 4 --save-dgrads-interval 4",
        also=_same_recordings,
    ),
    "exit-signal handler": Feature("--exit-signal-handler"),
    "external data loader": Feature("--dataloader-type external", "data", EXTERNAL),
    "cyclic data loader": Feature("--dataloader-type cyclic", "data"),
}


def _flags(feature: Feature, run_dir: Path) -> list[str]:
    flags = duo_gpt(feature.layout, iters=ITERATIONS)
    new = feature.flags.replace("@", str(run_dir)).split()
    if "--train-samples" in new:  # Megatron counts in samples or in iterations, never in both
        flags = without_values(flags, "--train-iters", "--lr-decay-iters", "--lr-warmup-iters")
    return [*flags, *new]  # of a flag given twice the last one counts


@pytest.mark.parametrize("name", FEATURES)
def test_a_run_with_this_feature_survives_a_kill(name: str, jobs: Jobs) -> None:
    feature = FEATURES[name]
    want = jobs.start(
        "undisturbed", launch_flags(2, slots=1), _flags(feature, jobs.directory / "undisturbed"), feature.script
    ).finished()
    job = jobs.start(
        "killed", launch_flags(3, 1, slots=1), _flags(feature, jobs.directory / "killed"), feature.script, held=True
    )
    job.arm((feature.node, *feature.at))
    job.finished()
    assert len(job.events("resumed")) == 1
    count = 1 + max(e["iteration"] for e in want.events("iteration"))
    assert_same_training(job, want, count, rank=1, mute=frozenset({feature.at[0] - 1}))
    if feature.also is not None:
        feature.also(job, want)


def test_a_run_from_megatrons_own_yaml_file_survives_a_kill(jobs: Jobs) -> None:
    file = jobs.directory / "model.yaml"
    command = [sys.executable, "-m", "deadpool_megatron.emulation", str(YAML), "--write-yaml", str(file)]
    env = environment({"RANK": "0", "WORLD_SIZE": "2"})
    subprocess.run([*command, *duo_gpt(iters=ITERATIONS)], env=env, check=True, capture_output=True)
    with file.open("a") as lines:
        lines.write("deadpool: {lease: 4}\n")
    flags = ["--yaml-cfg", str(file)]
    want = undisturbed(launch_flags(2, slots=1), flags, YAML)
    job = jobs.start("killed", launch_flags(3, 1, slots=1), flags, YAML, held=True)
    job.arm((0, 3, 2))
    job.finished()
    assert len(job.events("resumed")) == 1
    assert_same_training(job, want, ITERATIONS, rank=1, mute=frozenset({2}))


def test_a_node_that_dies_during_an_evaluation_is_replaced(jobs: Jobs) -> None:
    flags = with_value(with_value(duo_gpt(iters=4), "--eval-interval", 2), "--eval-iters", 60)
    want = undisturbed(launch_flags(2, slots=1), flags)
    job = jobs.start("killed", launch_flags(3, 1, slots=1), flags)
    job.until("iteration 1", lambda: [e for e in job.events("iteration") if e["iteration"] == 1])
    job.kill_node(0)  # the evaluation after that iteration has just begun
    job.finished()
    (resumed,) = job.events("resumed")
    assert resumed["iteration"] <= 1, "the evaluation was over when it died"
    assert_same_training(job, want, 4, rank=1)
    _evaluated(job, want)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_node_that_dies_while_a_checkpoint_is_written_is_replaced(asynchronous: bool, jobs: Jobs) -> None:
    feature = FEATURES["asynchronous checkpoints" if asynchronous else "checkpoints"]
    runs = {name: jobs.directory / name for name in ("undisturbed", "killed")}
    want = jobs.start("undisturbed", launch_flags(2, slots=1), _flags(feature, runs["undisturbed"])).finished()
    job = jobs.start("killed", launch_flags(3, 1, slots=1), _flags(feature, runs["killed"]))
    job.until("checkpoint", (Path(f"{runs['killed']}.ckpt") / "iter_0000004").exists)
    job.kill_node(0)
    job.finished()
    assert len(job.events("resumed")) == 1
    assert_same_training(job, want, ITERATIONS, rank=1)
    (_same_last_checkpoint if asynchronous else _same_checkpoints)(job, want)


@pytest.mark.parametrize("told", ["workers", "launcher"])
def test_the_exit_signal_saves_a_checkpoint_after_a_swap_as_before(told: str, jobs: Jobs) -> None:
    save = jobs.directory / "ckpt"
    flags = [*duo_gpt(iters=2000), "--exit-signal-handler", "--save", str(save), "--save-interval", "1000"]
    flags += ["--ckpt-format", "torch_dist"]
    job = jobs.start("signalled", launch_flags(3, 1, slots=1), flags, held=True)
    job.arm((0, 3, 2))
    resumed = job.until_event("resumed")
    if told == "launcher":
        job.process.send_signal(signal.SIGUSR1)
    else:
        for pid in job.pids().values():
            os.kill(pid, signal.SIGTERM)
    job.finished()
    latest = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert resumed["iteration"] < latest < 2000 and "exiting program after receiving SIGTERM" in job.log_tails(60)


def _connected(port: int) -> socket.socket | None:
    with contextlib.suppress(ConnectionRefusedError):
        return socket.create_connection(("127.0.0.1", port))
    return None


def test_a_straggler_detector_that_was_switched_off_does_not_stop_a_run_after_a_swap(jobs: Jobs) -> None:
    """Its state is the survivors' alone, and each line of the log is a collective where it is on."""
    (port,) = free_ports(1)
    flags = [*duo_gpt(iters=ITERATIONS), "--log-straggler", "--straggler-ctrlr-port", str(port)]
    job = jobs.start("stragglers", launch_flags(3, 1, slots=1), flags, held=True)
    job.hold(1)
    with job.until("the detector listens", lambda: _connected(port)) as curl:
        curl.send(b"GET / HTTP/1.0\r\n\r\n")
        assert b"Will turn StragglerDetector OFF" in curl.recv(1000)
    job.arm((1, 3, 2))
    job.finished()
    assert "the straggler detector is ON again" in (job.run_dir / "logs" / "rank-0.log").read_text()
