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

# What of the job's command line has no place in an export: where it loads, saves and reports.
_WITH_VALUE = (
    "--save",
    "--load",
    "--pretrained-checkpoint",
    "--save-interval",
    "--non-persistent-save-interval",
    "--non-persistent-ckpt-type",
    "--tensorboard-dir",
    "--wandb-project",
    "--wandb-exp-name",
    "--wandb-save-dir",
    "--deadpool-config",
)
_ALONE = ("--async-save", "--exit-on-missing-checkpoint", "--exit-signal-handler", "--use-checkpoint-args")


def script_arguments(arguments: Sequence[str]) -> list[str]:
    """A job's arguments without those that an export must not have: DeadPool's, and of loading, saving, reporting."""
    with_value, alone = set(_WITH_VALUE), set(_ALONE)
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
        manifest = _choose(options.durable_dir, options.generation)
        command = _command(manifest, options)
    except DurableError as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.USAGE
    where = manifest.job["command"].get("directory", "")
    if os.path.isdir(where):
        os.chdir(where)  # the job's arguments may hold relative paths
    parser = argparse.ArgumentParser()
    launch.add_launch_arguments(parser)
    code = launch.run(parser.parse_args(command))
    if code == Exit.OK:
        load = "checkpoint.load=" if is_bridges(_script(manifest, options)) else "--load "
        print(f"deadpool: generation {manifest.generation} is Megatron's checkpoint now: {load}{_output(options)}")
    return code


def _output(options: argparse.Namespace) -> str:
    return str(Path(options.output).absolute())


def _script(manifest: Manifest, options: argparse.Namespace) -> str:
    return str(options.script or manifest.job.get("command", {}).get("script", ""))


def _choose(directory: str, generation: str) -> Manifest:
    store = open_store(directory)
    try:
        complete = find(store).complete
    except OSError as err:
        raise DurableError(f"{directory} cannot be read: {err}") from None
    if not complete:
        raise DurableError(f"there is no durable generation in {directory}")
    chosen = [m for m in complete if generation in ("auto", str(m.generation))]
    if not chosen:
        there = ", ".join(str(m.generation) for m in complete)
        raise DurableError(f"{directory} has no durable generation {generation}; it has {there}")
    return chosen[0]


def _command(manifest: Manifest, options: argparse.Namespace) -> list[str]:
    """The arguments of `deadpool launch`."""
    job: dict[str, Any] = manifest.job.get("command", {})
    script = _script(manifest, options)
    slots = int(job.get("slots_per_node", 0))
    if not slots or manifest.world_size % slots:
        raise DurableError(f"{manifest.name} does not say how its job was started, so it cannot be exported")
    if not os.path.isfile(script):
        raise DurableError(f"the job's script {script} is not on this machine: name it with --script")
    directory = options.durable_dir
    if "://" not in directory:
        directory = str(Path(directory).absolute())
    out = ["--local-nodes", str(manifest.world_size // slots), "--nproc-per-node", str(slots), "--tee", "none"]
    out += ["--run-dir", str(Path(options.run_dir).absolute()), "--shm-directory", options.shm_directory]
    if options.emulate_cpu:
        out.append("--emulate-cpu")
    given = job.get("arguments", [])
    if is_bridges(script):  # what it loads, saves and reports is in no flags: `megatron.bridge` sees to it
        given = [*without_ours(given), *options.arguments]
    else:
        given = [*script_arguments(given), *options.arguments, "--ckpt-format", "torch_dist"]
    out += [str(Path(script).absolute()), *given, "--deadpool", "--deadpool-durable-dir", directory]
    return [*out, "--deadpool-resume", str(manifest.generation), "--deadpool-export", _output(options)]
