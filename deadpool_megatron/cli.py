"""The `deadpool` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from deadpool_bench import commands as evaluate_commands
from deadpool_megatron import __version__
from deadpool_megatron.commands import control
from deadpool_megatron.commands.export import add_export_arguments, run_export
from deadpool_megatron.config import schema
from deadpool_megatron.intree import patching
from deadpool_megatron.launcher import add_agent_arguments, run_agent, run_coordinator
from deadpool_megatron.launcher import local as launch
from deadpool_megatron.observe import commands as observe_commands
from deadpool_megatron.planning import add_plan_arguments, run_plan


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
    control.add_commands(commands)
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
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
