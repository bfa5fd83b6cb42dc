"""What a launch is, and everything about it that can be checked before anything is started."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from deadpool_megatron.cluster.placement.domains import Labels, parse_domains
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.compat import check_version
from deadpool_megatron.config import DeadpoolConfig, from_script_arguments
from deadpool_megatron.observe import LOGS
from deadpool_megatron.options import digits
from deadpool_megatron.vault import VaultError, choose_transport


class LaunchError(Exception):
    """The job cannot be started as asked; the message is one line for the user."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What `deadpool launch` or `deadpool agent` was asked for, checked. ``nodes`` counts the spares too.

    ``module``: the name that the script was given by (``-m``), or empty.
    """

    nodes: int
    spare_nodes: int
    slots_per_node: int
    emulate_cpu: bool
    run_dir: str
    log_dir: str
    host: str
    script: str
    arguments: list[str]
    config: DeadpoolConfig
    tee: str
    shm_directory: str
    domains: Labels
    module: str = ""

    @property
    def command(self) -> list[str]:
        """The script with its arguments, as `deadpool_megatron.worker` takes it."""
        return [*(["-m", self.module] if self.module else [self.script]), *self.arguments]


def whole(text: str, flag: str) -> int:
    """A number of the command line. Raises LaunchError."""
    try:
        return digits(text)
    except ValueError:
        raise LaunchError(f"{flag} {text}: not a whole number") from None


def workers_a_node(text: str) -> int:
    """Workers a node, as torchrun takes them: a number, gpu, cpu or auto. Raises LaunchError."""
    if text not in ("gpu", "auto", "cpu"):
        return whole(text, "--nproc-per-node")
    if text == "cpu":
        return os.cpu_count() or 1
    found = visible_gpus()
    if not found:
        raise LaunchError(f"--nproc-per-node {text}: no GPU is visible on this node; give a number")
    return len(found)


def visible_gpus() -> list[str]:
    """The GPUs of this machine that a process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not shutil.which("nvidia-smi"):
        return []
    if listed := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return listed.split(",")
    out = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(out.splitlines()) if line.startswith("GPU ")]


_SIZES = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")


def value_of(arguments: Sequence[str], flag: str, default: str) -> str:
    """What the script is given for a flag; of several the last one counts, as for argparse."""
    value = default
    for i, token in enumerate(arguments):
        if token == flag and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif token.startswith(flag + "="):
            value = token.split("=", 1)[1]
    return value


def check(
    options: argparse.Namespace, nodes: int, nodes_flag: str, host: str, log_dir: str | None = None
) -> LaunchPlan:
    """Turn the command line into a plan. Raises LaunchError or ConfigError with one clear line.

    Args:
        nodes: all nodes, spares included, as asked for with ``nodes_flag``.
        host: where the coordinator can be reached.
        log_dir: where the workers' logs go; None: into the run directory.
    """
    spares, slots = options.spare_nodes, workers_a_node(options.nproc_per_node)
    script, arguments = options.script, list(options.arguments)
    module = script if options.module else ""
    if module:
        script = module_file(module)
    config = from_script_arguments(arguments)
    if config.durable_dir and "://" not in config.durable_dir:
        config = dataclasses.replace(config, durable_dir=str(Path(config.durable_dir).absolute()))
    stray = next((a for a in arguments if a.startswith("--deadpool-")), None)
    if stray and not config.deadpool:
        raise LaunchError(f"{stray.split('=')[0]} has no effect without --deadpool; add it, or leave this flag out")
    if nodes < 1:
        raise LaunchError(f"{nodes_flag} {nodes}: at least 1 node is needed")
    if slots < 1:
        raise LaunchError(f"--nproc-per-node {slots}: at least 1 worker a node is needed")
    if spares >= nodes:
        raise LaunchError(
            f"--spare-nodes {spares} leaves no node to train: {nodes_flag} {nodes} counts all nodes, spares included"
        )
    if spares and not config.deadpool:
        raise LaunchError(f"--spare-nodes {spares} needs --deadpool among the script's flags")
    if config.spare_nodes not in (0, spares):
        raise LaunchError(f"--deadpool-spare-nodes {config.spare_nodes} is for other launchers: here --spare-nodes")
    if not Path(script).is_file():
        raise LaunchError(f"script {script} does not exist")
    active = nodes - spares
    alone = active == 1 and getattr(options, "alone", False)
    if config.deadpool and active < 2 and not alone:
        raise LaunchError(
            f"one active node has no peer to keep its shards ({nodes_flag} {nodes}, --spare-nodes {spares}): "
            "DeadPool needs 2 active nodes or more"
        )
    scheme = Scheme.parse(config.redundancy)
    if config.deadpool and active < scheme.size and not alone:
        raise LaunchError(
            f"--deadpool-redundancy {scheme} needs {scheme.size} active nodes or more, and {active} are there "
            f"({nodes_flag} {nodes}, --spare-nodes {spares})"
        )
    if config.deadpool and not scheme.mirror and find_spec("pyeclib") is None:
        raise LaunchError(f"--deadpool-redundancy {scheme} needs pyeclib: pip install pyeclib")
    world = active * slots
    sizes = {flag: whole(value_of(arguments, flag, "1"), flag) for flag in _SIZES}
    model = math.prod(sizes.values())
    if model < 1 or world % model:
        shown = " x ".join(f"{flag} {size}" for flag, size in sizes.items())
        raise LaunchError(f"{world} active ranks ({active} nodes of {slots}) are not a multiple of {shown} = {model}")
    if config.deadpool:
        if not os.access(options.shm_directory, os.W_OK | os.X_OK):
            raise LaunchError(f"--shm-directory {options.shm_directory} does not exist or cannot be written to")
        _check_megatron(Path(script).resolve().parent)
    domains = _domains(config, nodes)
    run_dir = Path(options.run_dir).absolute()
    return LaunchPlan(
        nodes,
        spares,
        slots,
        options.emulate_cpu,
        str(run_dir),
        str(Path(log_dir).absolute() if log_dir else run_dir / LOGS),
        host,
        str(Path(script).absolute()),
        arguments,
        config,
        options.tee,
        options.shm_directory,
        domains,
        module,
    )


def module_file(module: str) -> str:
    """The file that ``python -m module`` would run in this directory. Raises LaunchError."""
    sys.path.insert(0, os.getcwd())
    try:
        spec = find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{module}.__main__")
    except (ImportError, ValueError):
        spec = None
    finally:
        sys.path.pop(0)
    if spec is None or spec.origin is None:
        raise LaunchError(f"-m {module}: there is no such module here; is it installed, or under this directory?")
    return spec.origin


def check_transport(config: DeadpoolConfig) -> None:
    """For a machine that keeps shards: whether they can go the way that was asked for. Raises LaunchError."""
    if config.deadpool:
        try:
            choose_transport(config.transport)
        except VaultError as err:
            raise LaunchError(str(err)) from None


def _domains(config: DeadpoolConfig, nodes: int) -> Labels:
    flag = "--deadpool-domains"
    try:
        parse_domains(config.domains, nodes)
        flag = "--deadpool-nvlink-domains"
        return parse_domains(config.domains, nodes, config.nvlink_domains)
    except ValueError as err:
        raise LaunchError(f"{flag}: {err}") from None


def _check_megatron(beside: Path) -> None:
    """Check the installed wheel's version without importing it; a checkout, as beside the script, workers check."""
    if (beside / "megatron" / "core").is_dir():
        return
    from importlib import metadata

    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return
    check_version(version)
