"""`deadpool launch`: check everything that can be checked, start the coordinator and the agents, wait for the end.

::

    deadpool launch
      |- coordinator (decides; hosts the rendezvous store)
      |- agent of node 0 - worker, worker      each worker in a session of its own
      |- agent of node 1 - worker, worker
      ...
"""

from __future__ import annotations

import argparse
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from deadpool_megatron.cluster.exits import Exit
from deadpool_megatron.config import ConfigError, DeadpoolConfig, from_script_arguments
from deadpool_megatron.observe import LOGS
from deadpool_megatron.vault import clean_leftovers, process_alive
from deadpool_megatron.versions import UserError, check_version

__all__ = ["LaunchError", "LaunchPlan", "check", "launch"]


class LaunchError(Exception):
    """The job cannot be started as asked; the message is one line for the user."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What `deadpool launch` was asked for, checked."""

    nodes: int
    spare_nodes: int
    slots_per_node: int
    emulate_cpu: bool
    run_dir: str
    host: str
    script: str
    arguments: list[str]
    config: DeadpoolConfig
    tee: str
    shm_directory: str


_SIZES = (
    ("--tensor-model-parallel-size", 1),
    ("--pipeline-model-parallel-size", 1),
    ("--context-parallel-size", 1),
)


def _value_of(arguments: Sequence[str], flag: str, default: int) -> int:
    value = default
    for i, token in enumerate(arguments):
        text = None
        if token == flag and i + 1 < len(arguments):
            text = arguments[i + 1]
        elif token.startswith(flag + "="):
            text = token.split("=", 1)[1]
        if text is not None:
            try:
                value = int(text)  # of several the last one counts, as for argparse
            except ValueError:
                raise LaunchError(f"{flag} {text}: not a whole number") from None
    return value


def check(options: argparse.Namespace) -> LaunchPlan:
    """Turn the command line into a plan. Raises LaunchError or ConfigError with one clear line."""
    nodes, spares, slots = options.local_nodes, options.spare_nodes, options.nproc_per_node
    script, arguments = options.script, list(options.arguments)
    config = from_script_arguments(arguments)
    stray = next((a for a in arguments if a.startswith("--deadpool-")), None)
    if stray and not config.deadpool:
        raise LaunchError(f"{stray.split('=')[0]} has no effect without --deadpool; add it, or leave this flag out")
    if nodes < 1:
        raise LaunchError(f"--local-nodes {nodes}: at least 1 node is needed")
    if slots < 1:
        raise LaunchError(f"--nproc-per-node {slots}: at least 1 worker a node is needed")
    if spares < 0:
        raise LaunchError(f"--spare-nodes {spares}: must be 0 or more")
    if spares >= nodes:
        raise LaunchError(
            f"--spare-nodes {spares} leaves no node to train: --local-nodes {nodes} counts all nodes, spares included"
        )
    if spares and not config.deadpool:
        raise LaunchError(f"--spare-nodes {spares} needs --deadpool among the script's flags")
    if not Path(script).is_file():
        raise LaunchError(f"script {script} does not exist")
    active = nodes - spares
    if config.deadpool and active < 2:
        raise LaunchError(
            f"one active node has no peer to keep its shards (--local-nodes {nodes}, --spare-nodes {spares}): "
            "DeadPool needs 2 active nodes or more"
        )
    world = active * slots
    model = 1
    for flag, default in _SIZES:
        model *= _value_of(arguments, flag, default)
    if model < 1 or world % model:
        sizes = " x ".join(f"{flag} {_value_of(arguments, flag, default)}" for flag, default in _SIZES)
        raise LaunchError(f"{world} active ranks ({active} nodes of {slots}) are not a multiple of {sizes} = {model}")
    if config.deadpool:
        if not os.access(options.shm_directory, os.W_OK | os.X_OK):
            raise LaunchError(f"--shm-directory {options.shm_directory} does not exist or cannot be written to")
        _check_megatron()
    return LaunchPlan(
        nodes,
        spares,
        slots,
        options.emulate_cpu,
        str(Path(options.run_dir).absolute()),
        "127.0.0.1",
        str(Path(script).absolute()),
        arguments,
        config,
        options.tee,
        options.shm_directory,
    )


def _check_megatron() -> None:
    """Check the installed wheel's version without importing it; a checkout on the path is checked by the workers."""
    from importlib import metadata

    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return
    check_version(version)


def _environment(plan: LaunchPlan, store_port: int, job_id: str, local_devices: str | None) -> dict[str, str]:
    """What every worker of the job finds in its environment, as under torchrun."""
    env = dict(os.environ)
    env.update(
        {
            "MASTER_ADDR": plan.host,
            "MASTER_PORT": str(store_port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": job_id,
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "PYTHONUNBUFFERED": "1",
            "DEADPOOL_MODE": "deadpool" if plan.config.deadpool else "plain",
            "DEADPOOL_SETTINGS": "\n".join(plan.config.flags()),
        }
    )
    env.pop("RANK", None)
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if plan.emulate_cpu:
        from deadpool_megatron.emulation import environment

        env.update(environment())
        env["DEADPOOL_EMULATE_CPU"] = "1"
    if local_devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = local_devices
    return env


def _devices(plan: LaunchPlan) -> list[str | None]:
    """CUDA devices by local node: each "node" of this machine gets devices of its own."""
    if plan.emulate_cpu or plan.nodes == 1 or not shutil.which("nvidia-smi"):
        return [None] * plan.nodes
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed:
        devices = listed.split(",")
    else:
        out = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        devices = [str(i) for i, line in enumerate(out.splitlines()) if line.startswith("GPU ")]
    need = plan.nodes * plan.slots_per_node
    if len(devices) < need:
        raise LaunchError(
            f"--local-nodes {plan.nodes} x --nproc-per-node {plan.slots_per_node} needs {need} GPUs, {len(devices)} "
            "are visible; use fewer, or --emulate-cpu"
        )
    s = plan.slots_per_node
    return [",".join(devices[n * s : (n + 1) * s]) for n in range(plan.nodes)]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class _Processes:
    """The children of the launcher, ended by their ids."""

    def __init__(self) -> None:
        self.all: list[subprocess.Popen[Any]] = []

    def start(self, role: str, settings: Mapping[str, Any], **extra: Any) -> subprocess.Popen[Any]:
        process = subprocess.Popen(
            [sys.executable, "-m", "deadpool_megatron.node", role],
            stdin=subprocess.PIPE,
            preexec_fn=_end_with_parent,
            start_new_session=True,
            **extra,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(settings))
        process.stdin.close()
        self.all.append(process)
        return process

    def end(self, grace_s: float) -> None:
        for process in self.all:
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + grace_s
        for process in self.all:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def launch(plan: LaunchPlan) -> int:
    """Run the job to its end; returns the exit code of the job (see `cluster.exits`)."""
    processes = _Processes()
    secret = secrets.token_bytes(32)
    job_id = f"{os.getpid()}-{secrets.token_hex(4)}"
    devices = _devices(plan)
    c = plan.config
    coordinator = processes.start(
        "coordinator",
        {
            "job": {
                "nodes": plan.nodes,
                "spare_nodes": plan.spare_nodes,
                "slots_per_node": plan.slots_per_node,
                "deadpool": c.deadpool,
                "deadlines": {
                    "lease": c.lease,
                    "abort": c.abort_deadline,
                    "build": c.build_deadline,
                    "form": c.form_deadline,
                },
                "transient_retries": c.transient_retries,
            },
            "host": plan.host,
            "secret": secret.hex(),
            "run_dir": plan.run_dir,
            "state_hash": str(Path(c.state_hash).absolute()) if c.state_hash else "",
        },
        stdout=subprocess.PIPE,
    )
    interrupted = [False]

    def on_signal(signum: int, frame: object) -> None:
        interrupted[0] = True
        if coordinator.poll() is None:
            coordinator.send_signal(signal.SIGTERM)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    try:
        assert coordinator.stdout is not None
        line = coordinator.stdout.readline()
        if not line.strip():
            return coordinator.wait() or Exit.FAILED
        port, store_port = (int(x) for x in line.split())
        for node in range(plan.nodes):
            processes.start(
                "agent",
                {
                    "job_id": job_id,
                    "node": node,
                    "slots_per_node": plan.slots_per_node,
                    "active_nodes": plan.nodes - plan.spare_nodes,
                    "host": plan.host,
                    "coordinator": f"{plan.host}:{port}",
                    "secret": secret.hex(),
                    "lease": c.lease,
                    "log_dir": str(Path(plan.run_dir) / LOGS),
                    "command": [sys.executable, "-m", "deadpool_megatron.worker", plan.script, *plan.arguments],
                    "environment": _environment(plan, store_port, job_id, devices[node]),
                    "deadpool": c.deadpool,
                    "shm_directory": plan.shm_directory,
                },
                stdout=subprocess.DEVNULL,
            )
        tee = _Tee(Path(plan.run_dir) / LOGS, plan.tee)
        message = coordinator.stdout.read().decode()
        code = coordinator.wait()
        tee.stop()
        if message.strip():
            print(f"deadpool: {message.strip()}", file=sys.stderr)
        if code < 0:
            print(f"deadpool: the coordinator was ended by signal {-code}; the job is over", file=sys.stderr)
            code = Exit.FAILED
        return Exit.INTERRUPTED if interrupted[0] else code
    finally:
        processes.end(12.0)
        clean_leftovers(plan.shm_directory, process_alive)  # a killed agent could not free its vault


class _Tee(threading.Thread):
    """Shows the workers' logs on the terminal, each line behind its rank."""

    def __init__(self, directory: Path, which: str) -> None:
        super().__init__(name="tee", daemon=True)
        self._directory = directory
        self._which = which
        self._positions: dict[str, int] = {}
        self._ended = threading.Event()
        if which != "none":
            self.start()

    def run(self) -> None:
        """Follow the files until stopped; once more after that."""
        while not self._ended.wait(0.1):
            self._show()
        self._show()

    def stop(self) -> None:
        """Show what is left."""
        self._ended.set()
        if self._which != "none":
            self.join()

    def _show(self) -> None:
        for path in sorted(self._directory.glob("*.log")):
            if path.is_symlink() or (self._which != "all" and path.stem != f"rank-{self._which}"):
                continue
            with open(path, "rb") as f:
                f.seek(self._positions.get(path.name, 0))
                data = f.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._positions[path.name] = self._positions.get(path.name, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                print(f"[{path.stem}] {line}", flush=True)


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool launch`."""
    add = parser.add_argument
    add("--local-nodes", type=int, default=1, metavar="N", help="nodes on this machine, spares included (default: 1)")
    add("--spare-nodes", type=int, default=0, metavar="S", help="how many of them are warm spares (default: 0)")
    add("--nproc-per-node", type=int, default=1, metavar="P", help="workers (devices) a node (default: 1)")
    add("--emulate-cpu", action="store_true", help="emulate CUDA on the CPU, Gloo in the place of NCCL")
    add("--run-dir", default="runs/latest", metavar="DIR", help="status, events and logs (default: runs/latest)")
    add("--tee", default="all", metavar="all|none|RANK", help="whose output is shown here (default: all)")
    add(
        "--shm-directory", default="/dev/shm", metavar="DIR", help="shared memory for the vaults (default: /dev/shm)"
    )
    add("script", help="training script, for instance examples/pretrain_gpt.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments; --deadpool switches DeadPool on")


def run(options: argparse.Namespace) -> int:
    """`deadpool launch` after parsing."""
    try:
        plan = check(options)
        return launch(plan)
    except (LaunchError, ConfigError, UserError) as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.USAGE
    except OSError as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.USAGE
