"""`deadpool export`: a durable generation becomes one of Megatron's own ``torch_dist`` checkpoints.

The job of the manifest is started once more, same script, arguments and layout, on this machine. Every rank takes its
shard instead of training data and training, gathers the 16-bit parameters, and Megatron's own `save_checkpoint` writes.
So whatever model the script builds, the result is what Megatron itself would have saved at that iteration.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.config import DeadpoolConfig, without_ours
from deadpool_megatron.durable import DurableError, Manifest, find, open_store
from deadpool_megatron.hosts import is_bridges
from deadpool_megatron.launcher import local as launch
from deadpool_megatron.launcher.plan import LaunchError, module_file, value_of

# What of the job's command line has no place in an export: where it loads, saves and reports.
_FROM_CHECKPOINT = "--use-checkpoint-args"
_CHECKPOINTS = ("--load", "--pretrained-checkpoint")
_WITH_VALUE = (
    "--save",
    *_CHECKPOINTS,
    "--save-interval",
    "--non-persistent-save-interval",
    "--non-persistent-ckpt-type",
    "--tensorboard-dir",
    "--wandb-project",
    "--wandb-exp-name",
    "--wandb-save-dir",
    "--deadpool-config",
)
_ALONE = ("--async-save", "--exit-on-missing-checkpoint", "--exit-signal-handler", _FROM_CHECKPOINT)


def script_arguments(arguments: Sequence[str]) -> list[str]:
    """A job's arguments without those that an export must not have: DeadPool's, and of loading, saving, reporting.

    A job that has taken its model's flags from a checkpoint takes them from there again; nothing else is read of it.
    """
    with_value, alone = set(_WITH_VALUE), set(_ALONE)
    if _FROM_CHECKPOINT in arguments:
        with_value.difference_update(_CHECKPOINTS)
        alone.remove(_FROM_CHECKPOINT)
    for f in fields(DeadpoolConfig):
        flag = "--deadpool" if f.name == "deadpool" else "--deadpool-" + f.name.replace("_", "-")
        if isinstance(f.default, bool):
            alone.update((flag, flag.replace("--", "--no-", 1)))
        else:
            with_value.add(flag)
    out: list[str] = []
    skip = False
    for token in arguments:
        name, equals, _ = token.partition("=")
        if skip:
            skip = False
        elif name in with_value:
            skip = not equals
        elif token not in alone:
            out.append(token)
    return out


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--durable-dir", required=True, metavar="DIR", help="directory or fsspec URL with durable generations")
    add("--output", required=True, metavar="DIR", help="where Megatron's checkpoint goes, for its --load")
    add("--generation", metavar="G", default="auto", help="which one (default: the newest)")
    add("--emulate-cpu", action="store_true", help="emulate CUDA on the CPU, Gloo in the place of NCCL")
    add("--run-dir", default="runs/export", metavar="DIR", help="status, events and logs (default: runs/export)")
    add("--shm-directory", default="/dev/shm", metavar="DIR", help="shared memory (default: /dev/shm)")
    add("--script", metavar="FILE", help="the training script, where it lies elsewhere than for the job")
    parser.add_argument(
        "arguments", nargs="*", metavar="-- FLAG", help="more flags for the script, after the job's own"
    )


def run_export(options: argparse.Namespace) -> int:
    """`deadpool export` after parsing; returns the exit code."""
    try:
        manifest, script, command = prepare(options)
    except (DurableError, LaunchError) as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.USAGE
    parser = argparse.ArgumentParser()
    launch.add_launch_arguments(parser)
    code = launch.run(parser.parse_args(command))
    if code == Exit.OK:
        load = "checkpoint.load=" if is_bridges(script) else "--load "
        print(f"deadpool: generation {manifest.generation} is Megatron's checkpoint now: {load}{command[-1]}")
    return code


def prepare(options: argparse.Namespace) -> tuple[Manifest, str, list[str]]:
    """What is exported, the script's file, and the arguments of `deadpool launch`, the last of which is the output.

    Goes to the directory of the job, whose arguments may hold relative paths: those of ``options`` are of this one.
    Raises DurableError, LaunchError.
    """
    directory = options.durable_dir if "://" in options.durable_dir else _here(options.durable_dir)
    output, run_dir, shm = _here(options.output), _here(options.run_dir), _here(options.shm_directory)
    script = _here(options.script) if options.script else ""
    manifest = _choose(directory, options.generation)
    job: dict[str, Any] = manifest.job.get("command", {})
    if os.path.isdir(where := job.get("directory", "")):
        os.chdir(where)
    module = "" if script else job.get("module", "")
    script = script or (module_file(module) if module else _here(job.get("script", "")))
    slots = int(job.get("slots_per_node", 0))
    if not slots or manifest.world_size % slots:
        raise DurableError(f"{manifest.name} does not say how its job was started, so it cannot be exported")
    if not os.path.isfile(script):
        raise DurableError(f"the job's script {script} is not on this machine: name it with --script")
    out = ["--local-nodes", str(manifest.world_size // slots), "--nproc-per-node", str(slots), "--tee", "none"]
    out += ["--run-dir", run_dir, "--shm-directory", shm]
    if options.emulate_cpu:
        out.append("--emulate-cpu")
    given = job.get("arguments", [])
    if is_bridges(script):  # what it loads, saves and reports is in no flags: `megatron.bridge` sees to it
        given = [*without_ours(given), *options.arguments]
    else:
        given = _still_there(given, options.arguments)
        given = [*script_arguments(given), *options.arguments, "--ckpt-format", "torch_dist"]
    out += [*(["-m", module] if module else [script]), *given, "--deadpool", "--deadpool-durable-dir", directory]
    return manifest, script, [*out, "--deadpool-resume", str(manifest.generation), "--deadpool-export", output]


def _still_there(given: list[str], more: list[str]) -> list[str]:
    """Without --use-checkpoint-args where that checkpoint is gone and the user says the flags. Raises DurableError."""
    named = [value_of(given, flag, "") for flag in _CHECKPOINTS]
    if _FROM_CHECKPOINT not in given or any("://" in path or os.path.isdir(path) for path in named):
        return given
    if not more:
        raise DurableError(
            f"the job had its model's flags from a checkpoint ({_FROM_CHECKPOINT}), and {' '.join(named).strip()} is "
            "not on this machine: give those flags after --, as in -- --num-layers 24 --hidden-size 2048"
        )
    return [token for token in given if token != _FROM_CHECKPOINT]


def _here(path: str) -> str:
    return str(Path(path).absolute())


def _choose(directory: str, generation: str) -> Manifest:
    store = open_store(directory)
    try:
        found = find(store)
    except OSError as err:
        raise DurableError(f"{directory} cannot be read: {err}") from None
    chosen = [m for m in found.complete if generation in ("auto", str(m.generation))]
    if chosen:
        return chosen[0]
    for number, why in found.broken.items():
        if generation in ("auto", str(number)):
            raise DurableError(f"durable generation {number} cannot be read: {why}; {directory} has {found}")
    if generation == "auto":
        raise DurableError(f"there is no durable generation in {directory}")
    raise DurableError(f"{directory} has no durable generation {generation}; it has {found}")
