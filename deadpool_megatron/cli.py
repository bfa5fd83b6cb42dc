"""The `deadpool` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deadpool_megatron import __version__, launch, patching
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.exits import Exit
from deadpool_megatron.cluster.link import Spoke
from deadpool_megatron.config import schema
from deadpool_megatron.evaluate import commands as evaluate_commands
from deadpool_megatron.export import add_export_arguments, run_export
from deadpool_megatron.multinode import add_agent_arguments, run_agent, run_coordinator
from deadpool_megatron.observe import JOB
from deadpool_megatron.observe import commands as observe_commands
from deadpool_megatron.planning import add_plan_arguments, run_plan

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="deadpool", description="Megatron-LM training that survives lost nodes.")
    parser.add_argument("--version", action="version", version=f"deadpool {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    launch.add_launch_arguments(
        commands.add_parser("launch", help="run a training script on nodes of this machine, with warm spares")
    )
    agent = "run this machine's part of a job over several machines: in the place of torchrun on each"
    add_agent_arguments(commands.add_parser("agent", help=agent))
    alone = "run the coordinator alone, with the same options as the agents (which get --no-coordinator)"
    add_agent_arguments(commands.add_parser("coordinator", help=alone))
    add_plan_arguments(commands.add_parser("plan", help="what a run needs and survives, and why it cannot work"))
    observe_commands.add_commands(commands)
    export = "turn a durable generation into one of Megatron's own checkpoints"
    add_export_arguments(commands.add_parser("export", help=export))
    inject = commands.add_parser("inject", help="make a node of a running job fail, to see it recover")
    inject.add_argument("--run-dir", required=True, metavar="DIR", help="the job's run directory")
    inject.add_argument("--node", type=int, metavar="N", help="the node (not for abort)")
    inject.add_argument(
        "--fault",
        choices=("kill", "kill-worker", "abort"),
        default="kill",
        help="kill: SIGKILL for the agent and all its workers; kill-worker: for one worker; abort: nobody dies, all "
        "communicators are aborted and re-formed (default: kill)",
    )
    inject.add_argument("--local", type=int, default=0, metavar="I", help="local index of the worker (default: 0)")
    inject.add_argument("--at-iteration", type=int, metavar="K", help="in iteration K (from 0; default: now)")
    inject.add_argument(
        "--at-tick",
        type=int,
        default=1,
        metavar="T",
        help="at the T-th forward or backward pass of that iteration (default: 1, the first)",
    )
    evaluate_commands.add_commands(commands)
    patching.add_patch_arguments(commands.add_parser("patch", help="put DeadPool's lines into a Megatron-LM checkout"))
    commands.add_parser("schema", help="print the JSON schema of the YAML file of --deadpool-config")
    options = parser.parse_args(argv)
    if options.command == "patch":
        return patching.run(options)
    if options.command == "schema":
        print(json.dumps(schema(), indent=2))
        return 0
    if options.command == "launch":
        return launch.run(options)
    if options.command == "plan":
        return run_plan(options)
    if options.command == "agent":
        return run_agent(options)
    if options.command == "coordinator":
        return run_coordinator(options)
    if options.command == "export":
        return run_export(options)
    if options.command in evaluate_commands.COMMANDS:
        return evaluate_commands.run_command(options)
    if options.command in observe_commands.COMMANDS:
        return observe_commands.run_command(options)
    return _inject(options)


def _fail(message: str) -> int:
    print(f"deadpool: {message}", file=sys.stderr)
    return Exit.USAGE


def _inject(options: argparse.Namespace) -> int:
    path = Path(options.run_dir) / JOB
    try:
        job = json.loads(path.read_text())
    except OSError as err:
        return _fail(f"no job at {path}: {err.strerror}")
    spoke = Spoke(job["coordinator"], f"inject-{os.getpid()}", bytes.fromhex(job["secret"]), float(job["lease"]))
    if options.node is None and options.fault != "abort":
        return _fail(f"--fault {options.fault} needs --node")
    node = -1 if options.node is None else options.node
    fault = r.Fault(options.fault, node, options.local, options.at_iteration, options.at_tick)
    spoke.send(r.encode(r.Inject(fault)))
    packet = spoke.receive(10.0)
    spoke.close()
    if packet is None:
        return _fail(f"the job of {options.run_dir} does not answer: it is over, or not on this machine")
    reply = r.decode_from_coordinator(packet)
    if isinstance(reply, r.InjectReply) and reply.error:
        return _fail(reply.error)
    when = "now" if options.at_iteration is None else f"in iteration {options.at_iteration}"
    where = "" if options.node is None else f" on node {options.node}"
    print(f"deadpool: {options.fault}{where}, {when}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
