"""The `deadpool` command."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from deadpool_megatron import __version__
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.commands import control
from deadpool_megatron.commands.check import run_check
from deadpool_megatron.commands.export import add_export_arguments, run_export
from deadpool_megatron.commands.plan import run_plan
from deadpool_megatron.config import schema
from deadpool_megatron.doctor.command import add_doctor_arguments, run_doctor
from deadpool_megatron.intree import patching
from deadpool_megatron.launcher import add_agent_arguments, run_agent, run_coordinator
from deadpool_megatron.launcher import local as launch
from deadpool_megatron.observe import commands as observe_commands
from deadpool_megatron.options import Parser
from deadpool_megatron.output import Unread, never_fails, until_unread
from deadpool_megatron.simulate.command import add_simulate_arguments, run_simulate

# What ends with these goes on whether anybody reads of it or not.
_JOBS: Final = (["launch"], ["agent"], ["coordinator"], ["join"], ["export"])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is sys.__stdout__:  # else somebody in this process reads it
        never_fails() if arguments[:1] in _JOBS else until_unread()
    try:
        code = _main(arguments)
        sys.stdout.flush()
        return code
    except Unread:  # as in `deadpool plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


class _Parser(Parser):
    """Says of a flag that stands before the script where it belongs."""

    of_a_script = False

    def error(self, message: str) -> NoReturn:
        if self.of_a_script and message.startswith("unrecognized arguments"):
            message += "; the flags of the script, --deadpool among them, stand behind it"
        super().error(message)


def _main(arguments: list[str]) -> int:
    parser = _Parser(prog="deadpool", description="Megatron-LM training that survives lost nodes.")
    parser.of_a_script = arguments[:1] in (["launch"], ["agent"], ["coordinator"])
    parser.add_argument("--version", action="version", version=f"deadpool {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, what: str, arguments_of: Callable[[argparse.ArgumentParser], None], run: Callable[[Any], int]
    ) -> None:
        command = commands.add_parser(name, help=what)
        arguments_of(command)
        command.set_defaults(run=run)

    of_launch = launch.add_launch_arguments
    add("launch", "run a training script on nodes of this machine, with warm spares", of_launch, launch.run)
    agent = "run this machine's part of a job over several machines: in the place of torchrun on each"
    add("agent", agent, add_agent_arguments, run_agent)
    alone = "run the coordinator alone, with the same options as the agents (which get --no-coordinator)"
    add("coordinator", alone, add_agent_arguments, run_coordinator)
    commands.add_parser("plan", help="what a run needs and survives, and why it cannot work")
    observe_commands.add_commands(commands)
    add("export", "turn a durable generation into one of Megatron's own checkpoints", add_export_arguments, run_export)
    control.add_commands(commands)
    bench = commands.add_parser("bench", help="measure (in a clone of the source repository)")
    if arguments[:1] == ["bench"]:
        if (add_benches := _benches()) is None:
            print(
                "deadpool: the benches are in the source repository and not in this installation: clone it, and run "
                "'python -m deadpool_megatron.cli bench' in the clone",
                file=sys.stderr,
            )
            return Exit.USAGE
        add_benches(bench)
    add("simulate", "goodput of a cluster under failures, simulated", add_simulate_arguments, run_simulate)
    commands.add_parser("check", help="which of a job's flags a swap can carry, and from what that is known")
    add("doctor", "check a machine, or an allocation, before a run", add_doctor_arguments, run_doctor)
    add("patch", "put DeadPool's lines into a Megatron-LM checkout", patching.add_patch_arguments, patching.run)
    commands.add_parser("demo", help="train a tiny GPT twice, kill a node the second time, show that both are equal")
    commands.add_parser("examples", help="print the directory of the example script and its flags")
    commands.add_parser("schema", help="print the JSON schema of the YAML file of --deadpool-config")
    if arguments[:1] == ["check"]:  # what follows are Megatron's flags
        return run_check(arguments[1:])
    if arguments[:1] == ["plan"]:  # a recipe's overrides
        return run_plan(arguments[1:])
    if arguments[:1] == ["demo"]:
        from deadpool_megatron.demo import main as run_demo

        return run_demo(arguments[1:], "deadpool demo")
    options = parser.parse_args(arguments)
    if options.command == "examples":
        print(Path(__file__).parent / "examples")
        return 0
    if options.command == "schema":
        print(json.dumps(schema(), indent=2))
        return 0
    if options.command in observe_commands.COMMANDS:
        return observe_commands.run_command(options)
    if options.command in ("bench", "simulate", "doctor"):
        return _interruptible(options.run, options)
    code: int = options.run(options)
    return code


def _benches() -> Callable[[argparse.ArgumentParser], None] | None:
    """What adds the benches to a parser; None where there are none: a clone has them beside this package, a wheel not.

    Nothing else here may know them: what a job runs on does not need them.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "deadpool_bench" / "__init__.py").is_file():
        return None
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from deadpool_bench.commands import add_benches

    return add_benches


def _interruptible(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run what measures; interrupted in any way, it ends the processes it has started and says so in one line."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("deadpool: interrupted: every process of the measurement is ended", file=sys.stderr)
        return Exit.INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
