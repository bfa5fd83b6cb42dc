"""`deadpool check`: what of a job's flags a swap can carry, and from what that is known. Starts nothing."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from deadpool_megatron import support
from deadpool_megatron.cluster.records.exits import Exit

_REFUSED = 1


def run_check(arguments: Sequence[str]) -> int:
    """Judge a command line; returns 0 where it is accepted, 1 where a flag is refused, 2 for a usage that is wrong."""
    parser = argparse.ArgumentParser(
        prog="deadpool check",
        usage="deadpool check [--config FILE | --table] [--nproc-per-node N] [SCRIPT] [MEGATRON FLAGS ...]",
        description="Says which features of Megatron's flags a lost node must be survived with, and from what it is "
        "known that it is: exit code 0. Names every flag that is refused: exit code 1. Starts nothing and imports "
        "nothing of Megatron; a flag that Megatron does not know is not found here.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a run's YAML file, as `deadpool plan` takes it")
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="workers a node, for what must stay inside of one "
        f"(default: those of --config, else {support.PROCESSES_PER_NODE})",
    )
    parser.add_argument("--table", action="store_true", help="print all features and refusals, in Markdown")
    options, flags = parser.parse_known_args(list(arguments))
    if options.table:
        return _table()
    processes = options.nproc_per_node
    if processes is not None and processes < 1:
        parser.error("--nproc-per-node: at least 1")
    if options.config is not None:
        from deadpool_megatron.planning.files import PlanError, load

        try:
            run = load(options.config)
            flags = [*run.flags(), *flags]
            processes = processes or run.cluster.gpus_per_node
        except PlanError as err:
            print(f"deadpool: {err}", file=sys.stderr)
            return Exit.USAGE
    flags = [part for word in flags for part in (shlex.split(word, comments=True) if " " in word else [word])]
    if not flags:
        parser.error("no flags: give those of the job, or --config FILE")
    values = support.parse(flags)
    if "yaml_cfg" in values:
        parser.error("the flags in the file of --yaml-cfg are not read here: give them as flags")
    processes = processes or support.PROCESSES_PER_NODE
    features = support.used(values, processes)
    refused = [each for each in features if each.evidence is support.Evidence.REFUSED]
    for each in refused:
        print(f"refused: {' '.join((each.flag, each.value(values))).strip()}: {each.because}")
    if refused:
        return _REFUSED
    width = max((len(each.name) for each in features), default=0)
    for each in features:
        print(f"{each.name:<{width}}  {each.evidence}: {each.because}")
    for flag in support.not_looked_at(flags):
        print(f"{flag}: nobody has looked at what a lost node does to it")
    print(f"accepted: {len(features)} features that a swap must carry")
    return 0


def _table() -> int:
    record = Path(__file__).parents[2] / support.RECORD
    if not record.exists():
        print(
            f"deadpool: the runs behind the table are in the source repository only, in {support.RECORD}",
            file=sys.stderr,
        )
        return Exit.USAGE
    print(support.table(json.loads(record.read_text())), end="")
    return 0
