"""Run twice, kill once, compare: the story of the demo."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.demo.evidence import Evidence, Step, steps_of
from deadpool_megatron.demo.report import show_evidence, show_recovery, show_verdict, usual_seconds
from deadpool_megatron.demo.runs import DeathWatch, DemoRun, identities
from deadpool_megatron.demo.screen import Screen
from deadpool_megatron.emulation import has_transformer_engine
from deadpool_megatron.jobs.job import JobError
from deadpool_megatron.observe.recoveries import recoveries
from deadpool_megatron.observe.tables import make_console
from deadpool_megatron.options import Parser, count


def _example(name: str) -> str:
    """An example of the project: in a clone as one types it, else where the package is."""
    here = Path("examples", name)
    return str(here if here.is_file() else Path(__file__).parents[1] / here)


def _parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(
        prog=prog,
        description="Train a tiny GPT with Megatron, kill a node in the middle of an iteration, and show that nothing "
        "is different from the same run without the kill. Needs no GPU.",
    )
    parser.add_argument(
        "--node", type=count(), default=0, metavar="N", help="the victim (default: 0, the node of rank 0)"
    )
    parser.add_argument("--iteration", type=count(), default=6, metavar="K", help="in iteration K, from 0 (default: 6)")
    parser.add_argument(
        "--tick", type=count(1), default=4, metavar="T", help="at its T-th forward or backward pass (default: 4)"
    )
    parser.add_argument(
        "--iterations", type=count(2), default=12, metavar="M", help="iterations of a run (default: 12)"
    )
    parser.add_argument("--active-nodes", type=count(2), default=4, metavar="A", help="nodes that train (default: 4)")
    parser.add_argument("--run-dir", default="runs/demo", metavar="DIR", help="both runs' files (default: runs/demo)")
    parser.add_argument(
        "--script", default=_example("pretrain_gpt.py"), metavar="FILE", help="training script (default: %(default)s)"
    )
    flags = _example("cpu_te.args" if has_transformer_engine() else "cpu_tiny.args")
    parser.add_argument(
        "--flags", default=flags, metavar="FILE", help="its flags, in shell syntax (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.node >= options.active_nodes:
        parser.error(f"--node {options.node}: the nodes that train are 0 to {options.active_nodes - 1}")
    if options.iteration >= options.iterations:
        parser.error(f"--iteration {options.iteration}: a run has iterations 0 to {options.iterations - 1}")
    for path in (options.script, options.flags):
        if not Path(path).is_file():
            parser.error(f"{path} does not exist")
    return options


def _run(options: argparse.Namespace, name: str) -> DemoRun:
    """Start `deadpool launch` with one spare, two workers a node."""
    flags = shlex.split(Path(options.flags).read_text(), comments=True)
    launch = ["--local-nodes", str(options.active_nodes + 1), "--spare-nodes", "1", "--nproc-per-node", "2"]
    script = [options.script, *flags, "--train-iters", str(options.iterations), "--deadpool"]
    return DemoRun(Path(options.run_dir) / name, [*launch, "--emulate-cpu"], script)


def _undisturbed(console: Console, options: argparse.Namespace) -> tuple[list[Step], DemoRun, float]:
    events: list[dict[str, Any]] = []
    title = f"1 of 2: {options.iterations} iterations, nothing happens"
    with _run(options, "undisturbed") as run, Screen(console, title, options.iterations) as screen:
        for event in run.follow():
            events.append(event)
            screen.take(event, run.status())
    return steps_of(events), run, screen.blocked_share


def _disturbed(console: Console, options: argparse.Namespace, reference: list[Step], hashes: Any) -> bool:
    """The run with the kill; True when it is equal to the reference."""
    events: list[dict[str, Any]] = []
    watch: DeathWatch | None = None
    before: dict[int, Any] = {}
    after: dict[int, Any] = {}
    reporter: int | None = None
    by_iteration = {step.iteration: step for step in reference}
    title = f"2 of 2: the same run, node {options.node} is killed in iteration {options.iteration}"
    run = _run(options, "killed")
    with run, Screen(console, title, options.iterations, by_iteration) as screen:
        for event in run.follow():
            events.append(event)
            status = run.status()
            screen.take(event, status)
            match event["event"]:
                case "started":
                    watch = DeathWatch(run.agent_pid(options.node))
                    screen.note("$ " + shlex.join(run.inject(options.node, options.iteration, options.tick)), "dim")
                case "training" if status is not None:
                    before = identities(c for c in status["coordinates"] if c["node"] != options.node)
                case "iteration" if event["epoch"] == 0:
                    reporter = event["node"]
                case "resumed" if status is not None:
                    # Ranks never move to another slot unless their node was lost, so a stale status says the same.
                    after = identities(c for c in status["coordinates"] if c["rank"] in before)
    known = recoveries(events)
    if not known or watch is None:
        raise JobError(
            f"node {options.node} was never killed: its part of iteration {options.iteration} has fewer than "
            f"{options.tick} forward and backward passes; try a smaller --tick"
        )
    recovery = known[0]
    first = next((e for e in events if e["event"] == "iteration" and e["epoch"] > 0), None)
    if recovery.end != "resumed" or first is None:
        raise JobError(f"the job did not come back from the kill ({recovery.end}); see {run.run_dir}")
    died = min(recovery.began, watch.died or recovery.began)
    generation = recovery.generation or 0
    evidence = Evidence(
        options.iterations,
        reference,
        steps_of(events),
        hashes,
        run.hashes(),
        before,
        after,
        frozenset({generation - 1}) if reporter in (None, options.node) else frozenset(),
    )
    usual = usual_seconds([s.seconds for s in evidence.disturbed if s.epoch == 0] or [s.seconds for s in reference])
    disturbance = show_recovery(console, recovery, died, (first["iteration"], first["t"]), usual)
    show_evidence(console, evidence, generation)
    return show_verdict(console, evidence, recovery, options.iteration, disturbance)


def _ended(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, prog: str = "demo.sh") -> int:
    """Run the demo. 0: both runs are equal; 1: they differ or a run failed; 2: bad options; 130: interrupted."""
    options = _parse(argv, prog)
    console = make_console()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _ended)
    start = time.monotonic()
    what = f"training a tiny GPT twice, {options.iterations} iterations, on {options.active_nodes} nodes and a spare"
    console.print(what, markup=False, soft_wrap=True)
    try:
        reference, run, blocked = _undisturbed(console, options)
        equal = _disturbed(console, options, reference, run.hashes())
    except JobError as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.FAILED
    except KeyboardInterrupt:
        print("deadpool: interrupted: every process of the demo is ended", file=sys.stderr)
        return Exit.INTERRUPTED
    console.print(
        f"blocked on DeadPool without a failure: {blocked:.2%} of an iteration; both runs took "
        f"{time.monotonic() - start:.0f} s; their events, status and logs are in {options.run_dir}",
        markup=False,
        soft_wrap=True,
    )
    return Exit.OK if equal else Exit.FAILED
