"""`deadpool bench`: what it measures, by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from deadpool_bench.control_plane.bench import add_control_arguments, run_control
from deadpool_bench.overhead import add_overhead_arguments, run_overhead
from deadpool_bench.recovery import add_recovery_arguments, run_recovery
from deadpool_bench.scale import add_ablation_arguments, add_scale_arguments, run_ablation, run_scale
from deadpool_bench.survival import add_faults_arguments, run_faults
from deadpool_bench.validation import add_model_arguments, run_model
from deadpool_bench.widths import add_widths_arguments, run_widths


def add_benches(parser: argparse.ArgumentParser) -> None:
    """Add them all to the parser of `deadpool bench`. Each one's parser knows what runs it, as ``run``."""
    benches = parser.add_subparsers(dest="bench", required=True)

    def bench(name: str, text: str, add: Callable[[argparse.ArgumentParser], None], run: Callable[..., int]) -> None:
        each = benches.add_parser(name, help=text)
        add(each)
        each.set_defaults(run=run)

    bench("recovery", "kill nodes and time the way back, against a restart", add_recovery_arguments, run_recovery)
    text = "time iterations with and without snapshots, and Megatron's checkpoints"
    bench("overhead", text, add_overhead_arguments, run_overhead)
    text = "time iterations with fewer replicas against those with all"
    bench("widths", text, add_widths_arguments, run_widths)
    text = "recovery time against ranks, model bytes or nodes lost at once"
    bench("scale", text, add_scale_arguments, run_scale)
    text = "recovery time without warm spares, and with time-outs alone"
    bench("ablation", text, add_ablation_arguments, run_ablation)
    text = "the control part of a recovery, with thousands of simulated agents"
    bench("control", text, add_control_arguments, run_control)
    bench("model", "hold the simulation against real, disturbed jobs", add_model_arguments, run_model)
    bench("faults", "the table of what it survives, from the results of tests", add_faults_arguments, run_faults)
