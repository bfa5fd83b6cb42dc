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
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from deadpool_megatron.cluster.notices import WARNINGS
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.cluster.store import EMBEDDED, StoreError, open_store
from deadpool_megatron.cluster.store.leadership import Leadership
from deadpool_megatron.compat import UserError
from deadpool_megatron.config import ConfigError
from deadpool_megatron.launcher.enlisting import Waiting
from deadpool_megatron.launcher.plan import LaunchError, LaunchPlan, check, check_transport, visible_gpus
from deadpool_megatron.launcher.processes import (
    CoordinatorProcess,
    Processes,
    agent_settings,
    code_of,
    coordinator_settings,
)
from deadpool_megatron.launcher.tee import Tee, show_end
from deadpool_megatron.observe.commands import add_run_dir
from deadpool_megatron.options import count
from deadpool_megatron.vault import clean_leftovers

LOCALHOST = "127.0.0.1"
_STORE_S = 300.0  # that an etcd is waited for, as by `deadpool agent`


def _devices(plan: LaunchPlan) -> list[str | None]:
    """CUDA devices by local node: each "node" of this machine gets devices of its own."""
    if plan.emulate_cpu or plan.nodes == 1 or not shutil.which("nvidia-smi"):
        return [None] * plan.nodes
    devices = visible_gpus()
    need = plan.nodes * plan.slots_per_node
    if len(devices) < need:
        raise LaunchError(
            f"--local-nodes {plan.nodes} x --nproc-per-node {plan.slots_per_node} needs {need} GPUs, {len(devices)} "
            "are visible; use fewer, or --emulate-cpu"
        )
    s = plan.slots_per_node
    return [",".join(devices[n * s : (n + 1) * s]) for n in range(plan.nodes)]


def launch(plan: LaunchPlan) -> int:
    """Run the job to its end; returns the exit code of the job (see `cluster.records.exits`)."""
    processes = Processes()
    secret = secrets.token_bytes(32)
    job_id = f"{os.getpid()}-{secrets.token_hex(4)}"
    devices = _devices(plan)
    store = open_store(plan.config.store, plan.run_dir, job_id)
    leadership = Leadership(store, plan.config.lease)
    try:
        _lead(plan, leadership)
        coordinator = CoordinatorProcess(processes, coordinator_settings(plan, job_id, secret, alone=True), leadership)
        interrupted: list[int] = []
        preempted = [False]

        def on_signal(signum: int, frame: object) -> None:
            if signum in WARNINGS:
                coordinator.preempt()
                return
            if signum == signal.SIGTERM and plan.config.on_preempt and not preempted[0]:
                preempted[0] = True  # a second one ends the job at once
                coordinator.preempt()
                return
            interrupted.append(signum)
            coordinator.interrupt(signum)

        for signum in (signal.SIGINT, signal.SIGTERM, *WARNINGS):
            signal.signal(signum, on_signal)
        if (end := coordinator.begun()) is not None:
            return end[0] or Exit.FAILED
        for node in range(plan.nodes):
            address = (LOCALHOST, coordinator.port)
            processes.start(
                "agent",
                agent_settings(plan, node, job_id, secret, address, coordinator.store_port, LOCALHOST, devices[node]),
                stdout=subprocess.DEVNULL,
            )
        tee = _tee(plan)
        code, message = coordinator.wait()
        if tee is not None:
            tee.stop()
        code = code_of(interrupted[0]) if interrupted else code
        show_end(code, message, plan.run_dir)
        return code
    finally:
        processes.end(12.0)
        leadership.resign()
        store.close()
        clean_leftovers(plan.shm_directory)  # a killed agent could not free its vault


def _lead(plan: LaunchPlan, leadership: Leadership) -> None:
    """Raises LaunchError where another job leads, StoreError once an etcd was waited for in vain."""
    until = time.monotonic() + (_STORE_S if plan.config.store != EMBEDDED else 0.0)
    waiting = Waiting(until)
    while True:
        try:
            if leadership.take() is None:
                raise LaunchError(f"--run-dir {plan.run_dir}: another job runs there; give each its own")
            return
        except StoreError as err:
            if time.monotonic() >= until:
                raise
            waiting.because(partial(str, err))
        time.sleep(0.2)  # once, at the start


def _tee(plan: LaunchPlan) -> Tee | None:
    if plan.tee == "none":
        return None
    return Tee(Path(plan.log_dir), lambda log: plan.tee == "all" or log == f"rank-{plan.tee}")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What `deadpool launch` and `deadpool agent` have in common; the script comes last."""
    add = parser.add_argument
    add("--emulate-cpu", action="store_true", help="emulate CUDA on the CPU, Gloo in the place of NCCL")
    add("--shm-directory", default="/dev/shm", metavar="DIR", help="shared memory for the vaults (default: /dev/shm)")
    add("-m", "--module", action="store_true", help="the script is the name of a module, as for python -m")
    add("script", help="training script, for instance examples/pretrain_gpt.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments; --deadpool switches DeadPool on")


def _whose(text: str) -> str:
    """Of --tee. Raises ArgumentTypeError."""
    if text not in ("all", "none") and not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor none nor a rank")
    return text


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--local-nodes",
        type=count(1),
        default=1,
        metavar="N",
        help="nodes on this machine, spares included (default: 1)",
    )
    add("--spare-nodes", type=count(), default=0, metavar="S", help="how many of them are warm spares (default: 0)")
    add(
        *("--nproc-per-node", "--nproc_per_node"),
        default="1",
        metavar="P",
        help="workers (devices) a node: a number, or gpu (default: 1)",
    )
    add("--standalone", action="store_true", help="accepted and ignored: this is what it does")
    add("--nnodes", default="1", metavar="1", help="only 1, as torchrun takes it: how many nodes is --local-nodes")
    add_run_dir(parser)
    add("--tee", default="all", type=_whose, metavar="all|none|RANK", help="whose output is shown here (default: all)")
    add(
        "--alone",
        action="store_true",
        help="for measurements: a single node keeps the second copy of its shards itself, which protects from nothing",
    )
    add_common_arguments(parser)


def run(options: argparse.Namespace) -> int:
    try:
        if options.nnodes not in ("1", "1:1"):
            raise LaunchError(
                f"--nnodes {options.nnodes}: `deadpool launch` is for one machine, of which --local-nodes "
                f"{options.nnodes.split(':')[-1]} makes so many nodes; on several run `deadpool agent` on each"
            )
        plan = check(options, options.local_nodes, "--local-nodes", LOCALHOST)
        check_transport(plan.config)
        return launch(plan)
    except (LaunchError, ConfigError, UserError, OSError) as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.USAGE
    except KeyboardInterrupt:  # while another job's durable directory is watched, for instance
        print("deadpool: interrupted before the job began", file=sys.stderr)
        return Exit.INTERRUPTED
