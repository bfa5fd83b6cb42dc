"""`deadpool plan`: what a run needs and survives, of a file with Megatron's flags or of a recipe of Megatron-Bridge."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.compat import UserError
from deadpool_megatron.observe import strict_json
from deadpool_megatron.options import Parser, count
from deadpool_megatron.planning import (
    MAIN,
    USUAL,
    Counted,
    Layout,
    PlanError,
    RunFile,
    Shard,
    Workload,
    budget,
    divided,
    load,
    machine,
    microbatches,
    moments,
    numbers,
    run_file,
    text,
    under_way,
)

if TYPE_CHECKING:
    from deadpool_megatron.megatron.bridge.recipes import Recipe
    from deadpool_megatron.megatron.bridge.sizes import RecipeSizes


def run_plan(arguments: Sequence[str]) -> int:
    """Plan a run; returns 0, or 2 where it cannot work or the usage is wrong."""
    parser = Parser(
        prog="deadpool plan",
        usage="deadpool plan --config FILE [OPTIONS] [--json | --flags]\n"
        "       deadpool plan --recipe NAME [--config FILE] [OPTIONS] [--json] [SECTION.FIELD=VALUE ...]",
        description="Says what a run needs of memory, copying and network, what it survives and which spares pay, or "
        "why it cannot work (exit code 2). Starts nothing and imports nothing of Megatron, but for a recipe.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="file of a run (see configs/); of a recipe: its cluster and DeadPool's settings",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="a recipe of Megatron-Bridge as its run_recipe.py takes it, or MODULE:FUNCTION, with overrides behind it",
    )
    parser.add_argument(
        "--nodes",
        type=count(1),
        metavar="N",
        help="another number of nodes that train than in the file or the recipe's name",
    )
    parser.add_argument(
        "--nproc-per-node", type=count(1), metavar="P", help="another number of workers, hence devices, a node"
    )
    parser.add_argument("--spare-nodes", type=count(), metavar="S", help="another number of spares than in the file")
    parser.add_argument("--redundancy", metavar="R", help="another --deadpool-redundancy than in the file")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="the numbers, for programs: bytes and seconds")
    how.add_argument("--flags", action="store_true", help="check, then print the flags of the training script instead")
    options, overrides = parser.parse_known_args(list(arguments))
    _check(parser, options, overrides)
    try:
        run, workload = _of_recipe(options, overrides) if options.recipe else (_of_file(options), None)
        plan = budget(run, workload)
    except (PlanError, UserError) as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.USAGE
    if options.flags:
        print("\n".join(shlex.quote(flag) for flag in run.flags()))
    elif options.json:
        print(strict_json(numbers(run, plan), indent=1))
    else:
        print("\n".join(text(run, plan)))
    return 0


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace, overrides: Sequence[str]) -> None:
    def refuse(message: str) -> NoReturn:
        parser.error(message)

    if options.recipe is None and options.config is None:
        refuse("one of --config and --recipe is required")
    unknown = [word for word in overrides if options.recipe is None or word.startswith("-") or "=" not in word]
    if unknown:
        refuse(f"unrecognized arguments: {' '.join(unknown)}")
    if options.recipe is not None and options.flags:
        refuse("--flags: a recipe of Megatron-Bridge has none")


def _of_file(options: argparse.Namespace) -> RunFile:
    cluster, deadpool = _changes(options)
    return load(options.config, cluster, deadpool)


def _changes(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the cluster, and DeadPool's settings, that count more than a file's."""
    given = {"nodes": options.nodes, "spare_nodes": options.spare_nodes, "gpus_per_node": options.nproc_per_node}
    cluster = {name: value for name, value in given.items() if value is not None}
    return cluster, {"redundancy": options.redundancy} if options.redundancy else {}


def _of_recipe(options: argparse.Namespace, overrides: Sequence[str]) -> tuple[RunFile, Workload]:
    from deadpool_megatron.commands import recipes

    name, nodes, per_node = f"recipe {options.recipe}", options.nodes, options.nproc_per_node
    run = None
    if options.config is not None:
        file = _of_file(options)
        if file.megatron:
            raise PlanError(f"{options.config}: megatron: the recipe says this: leave the section out")
        run = RunFile(name, file.cluster, {}, file.deadpool)
        nodes, per_node = run.cluster.nodes, run.cluster.gpus_per_node
    with recipes.bridge():
        from deadpool_megatron.megatron.bridge import recipes as bridge
        from deadpool_megatron.megatron.bridge import sizes

        recipe = bridge.build(options.recipe, overrides, nodes, per_node)
        refused = list(dict.fromkeys(setting for setting, _ in recipes.refusals(recipe)))
        if refused:
            raise PlanError(f"{name}: {', '.join(refused)}: not supported with --deadpool (deadpool check says why)")
        assumed = ""
        if run is None:
            run, assumed = _assumed(name, recipe, options)
        counted = sizes.count(recipe)
    notes = (*([assumed] if assumed else []), *recipes.notes(recipe))
    return run, _workload(name, recipe, counted, notes)


def _assumed(name: str, recipe: Recipe, options: argparse.Namespace) -> tuple[RunFile, str]:
    """A run on the machines that the recipe's name says, and what is assumed of them. Raises PlanError."""
    has = machine(recipe.machine or USUAL)
    if has is None:
        raise PlanError(f"{name}: what a node of {recipe.machine} has is not known here: give --config FILE with it")
    if recipe.world_size % recipe.per_node:
        raise PlanError(
            f"{name}: {recipe.world_size} processes are not whole nodes of {recipe.per_node}: give --nodes N"
        )
    cluster = {**has, "nodes": recipe.world_size // recipe.per_node, "gpus_per_node": recipe.per_node}
    run = run_file(name, {"cluster": cluster, "deadpool": {"deadpool": True}}, *_changes(options))
    c, device = run.cluster, (recipe.machine or USUAL).upper()
    return run, (
        f"assumed of the cluster (your own: --config FILE): {device} with {c.gpu_memory:g} GB, {c.host_memory:g} GB a "
        f"node, {c.pcie:g} GB/s to the host, {c.network:g} GB/s of network"
    )


def _workload(name: str, recipe: Recipe, counted: RecipeSizes, notes: Sequence[str]) -> Workload:
    v = recipe.values
    tp = v["tensor_model_parallel_size"]
    sizes = divided(
        name,
        Layout(
            world=recipe.world_size,
            tp=tp,
            pp=v["pipeline_model_parallel_size"],
            cp=v["context_parallel_size"],
            ep=v["expert_model_parallel_size"] or 1,
            etp=v["expert_tensor_parallel_size"] or tp,
            chunks=v["virtual_pipeline_model_parallel_size"] or 1,
        ),
    )
    count = microbatches(name, v["global_batch_size"], v["micro_batch_size"], sizes)
    half = v["bf16"] or v["fp16"]
    aware = v["use_precision_aware_optimizer"]
    each = (v["exp_avg_dtype"].itemsize + v["exp_avg_sq_dtype"].itemsize) / 2 if aware else 4
    kept = moments(v["optimizer"], each)
    # Of a main parameter that is the 16 bits of the model's and a remainder, only that is the optimizer's own.
    short = aware and v["bf16"] and (v["store_param_remainders"] or v["main_params_dtype"].itemsize == 2)
    return Workload(
        sizes=sizes,
        model=Counted(counted.parameters, counted.active),
        shards=tuple(Shard(stage.dense, stage.expert, stage.frozen) for stage in counted.stages),
        activations=tuple(
            stage.kept * under_way(sizes, index, count) + stage.once for index, stage in enumerate(counted.stages)
        ),
        operations=counted.operations,
        weight=2 if half else 4,
        gradient=2 if half and not v["grad_reduce_in_fp32"] else 4,
        state=MAIN + kept,
        own_state=kept + ((2 if short else MAIN) if half else 0),
        divided=v["use_distributed_optimizer"] or v["optimizer"].startswith("dist_"),
        estimated=True,
        notes=tuple(notes),
    )
