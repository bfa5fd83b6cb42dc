"""`deadpool check`: what of a job's flags a swap can carry, and from what that is known. Starts nothing."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deadpool_megatron import support
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.compat import UserError
from deadpool_megatron.options import Parser, count
from deadpool_megatron.planning.files import PlanError, load

_REFUSED = 1


def run_check(arguments: Sequence[str]) -> int:
    """Judge a command line; returns 0 where it is accepted, 1 where a flag is refused, 2 for a usage that is wrong."""
    try:
        return _check(arguments)
    except (UserError, PlanError) as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.USAGE


def _check(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="deadpool check",
        usage="deadpool check [--config FILE] [--nproc-per-node N] [SCRIPT] [MEGATRON FLAGS ...]\n"
        "       deadpool check --recipe NAME [--nodes N] [--nproc-per-node N] [SECTION.FIELD=VALUE ...]\n"
        "       deadpool check --recipes | --table",
        description="Says which features of Megatron's flags a lost node must be survived with, and from what it is "
        "known that it is: exit code 0. Names every flag that is refused: exit code 1. Starts nothing and imports "
        "nothing of Megatron, but for a recipe; a flag that Megatron does not know is not found here.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a run's YAML file, as `deadpool plan` takes it")
    parser.add_argument(
        "--nproc-per-node",
        type=count(1),
        metavar="N",
        help="workers a node, for what must stay inside of one "
        f"(default: those of --config, else {support.PROCESSES_PER_NODE})",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="a recipe of Megatron-Bridge as its run_recipe.py takes it, or MODULE:FUNCTION, with overrides behind it",
    )
    parser.add_argument("--recipes", action="store_true", help="judge all of Megatron-Bridge's performance recipes")
    parser.add_argument(
        "--nodes", type=count(1), metavar="N", help="nodes that train, of a recipe (default: what its name says)"
    )
    parser.add_argument("--table", action="store_true", help="print all features and refusals, in Markdown")
    options, flags = parser.parse_known_args(list(arguments))
    if options.table:
        return _table()
    processes = options.nproc_per_node
    if options.recipes:
        return _recipes(processes)
    if options.recipe is not None:
        return _recipe(options.recipe, flags, options.nodes, processes)
    flags = _words(flags)
    if options.config is not None:
        run = load(options.config)
        flags = [*run.flags(), *flags]
        processes = processes or run.cluster.gpus_per_node
    if not flags:
        parser.error("no flags: give those of the job, or --config FILE")
    values = support.parse(flags)
    if "yaml_cfg" in values:
        parser.error("the flags in the file of --yaml-cfg are not read here: give them as flags")
    processes = processes or support.PROCESSES_PER_NODE
    notes = (f"{flag}: nobody has looked at what a lost node does to it" for flag in support.not_looked_at(flags))
    return _judged(values, processes, (), notes)


def _words(given: Sequence[str]) -> list[str]:
    """Flags that came as one word, as a variable of a shell that is quoted does, taken apart. A value with a blank in
    it is one. Raises UserError."""
    out: list[str] = []
    for word in given:
        together = any(map(str.isspace, word)) and (word.startswith("--") or len(given) == 1)
        try:
            out += shlex.split(word, comments=True) if together else [word]
        except ValueError as err:
            raise UserError(f"{word}: {str(err).lower()}") from None
    return out


def _judged(values: Mapping[str, Any], processes: int, more: Sequence[tuple[str, str]], notes: Iterable[str]) -> int:
    """Print what is known of each feature, or what is refused, ``more`` besides. Returns the exit code."""
    refused = support.refused(values, processes)
    for each in refused:
        print(f"refused: {' '.join((each.flag, each.value(values))).strip()}: {each.because}")
    for setting, because in more:
        print(f"refused: {setting}: {because}")
    if refused or more:
        return _REFUSED
    features = support.used(values, processes)
    width = max((len(each.name) for each in features), default=0)
    for each in features:
        print(f"{each.name:<{width}}  {each.evidence}: {each.because}")
    for note in notes:
        print(note)
    print(f"accepted: {len(features)} features that a swap must carry")
    return 0


def _recipe(name: str, overrides: Sequence[str], nodes: int | None, processes: int | None) -> int:
    from deadpool_megatron.commands import recipes

    recipe = recipes.read(name, overrides, nodes, processes)
    print(f"{name}: {recipe.world_size} processes, {recipe.per_node} a node")
    for note in recipes.notes(recipe):
        print(f"note: {note}")
    return _judged(recipe.values, recipe.per_node, recipe.refused, ())


def _recipes(processes: int | None) -> int:
    from deadpool_megatron.commands import recipes

    for line in recipes.judge_all(processes):
        print(line)
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
