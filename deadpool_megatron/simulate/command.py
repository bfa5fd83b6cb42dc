"""`deadpool simulate`: goodput against cluster size, for DeadPool, with and without shrinking, and checkpoint-restart.

Every input is printed with where it comes from: a published figure, a measurement of this project, or the flag that
was given. Nothing here is a measurement of a cluster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from deadpool_megatron.observe import strict_json
from deadpool_megatron.options import count, number
from deadpool_megatron.simulate.goodput import STRATEGIES, Cluster, Costs, best_interval, mean, poisson, simulate

_MOST: Final = 1e9  # of any input
_MOST_FAILURES: Final = 1e6  # of one simulated run: seconds of computing
_PICTURES: Final = (".png", ".svg", ".pdf")
_SIZES: Final = tuple(64 * 2**i for i in range(12))  # 64 to 131,072
_RATES: Final = {
    "rsc": (6.5, "6.5 failures per 1,000 node-days, Meta's RSC clusters (field figures)"),
    "llama3": (3.79, "419 interruptions in 54 days on 16,384 GPUs = 2,048 nodes, Llama 3"),
}
_NAMES: Final = {
    "deadpool": "DeadPool, waits without a spare (spares counted)",
    "shrink": "DeadPool, shrinks without a spare (spares counted)",
    "checkpoint": "checkpoint-restart (spares counted, best interval)",
}
# flag, default, unit, meaning, source of the default
_INPUTS: Final = (
    ("gpus-per-node", 8, "GPUs", "GPUs of a node", "the usual node"),
    ("iteration", 11.0, "s", "an iteration", "65B on 512 A100 in BF16, arithmetic"),
    ("repair", 24.0, "h", "until a failed node is back", "assumption"),
    ("replica-nodes", 8, "nodes", "nodes of one data-parallel replica", "TP8 x PP8 on nodes of 8"),
    ("recovery", 40.0, "s", "DeadPool: failure to training again", "arXiv 2607.01646: under 40 s on 512 A100"),
    ("overhead", 0.36, "%", "DeadPool: cost without failures", "measured here: docs/measurements/recovery.md"),
    ("commit-share", 0.5, "", "part of an iteration until its commit", "architecture: the first half of the ticks"),
    ("shrink", 150.0, "s", "DeadPool: failure to fewer replicas", "as a restart: all processes begin anew"),
    ("growth", 150.0, "s", "DeadPool: lost as replicas come back", "as a shrink"),
    ("restart", 150.0, "s", "checkpoint: failure to training again", "arXiv 2607.01646: about 150 s"),
    ("save", 5.0, "s", "checkpoint: training stands still to save", "assumption: asynchronous saving"),
)


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpus", type=count(1), nargs="+", metavar="N", help="cluster sizes (default: 64 to 131072, doubling)")
    add("--rate", choices=tuple(_RATES), default="rsc", help="published failure rate (default: rsc)")
    add("--failures-per-1000-node-days", type=number(1e-6), metavar="F", help="another rate")
    add("--trace", metavar="FILE", help="failure times in hours, one a line, in place of a rate; # begins a comment")
    add(
        "--trace-nodes",
        type=count(1),
        metavar="N",
        help="nodes the trace was taken on: times are scaled to other sizes",
    )
    add("--days", type=number(1e-6), metavar="D", help="simulated days (default: 30, or enough for 300 failures)")
    add("--runs", type=count(1), default=5, metavar="R", help="repetitions with other random failures (default: 5)")
    add("--spares", type=count(), metavar="S", help="spare nodes (default: the number that is best for each size)")
    add("--seed", type=count(), default=0, help="of the random failures (default: 0)")
    for flag, default, unit, text, _ in _INPUTS:
        shown = f" in {unit.replace('%', '%%')}" if unit else ""
        add(
            f"--{flag}",
            type=count() if isinstance(default, int) else number(),
            metavar="X",
            help=f"{text}{shown} (default: {default:g})",
        )
    add("--measured", metavar="FILE", help="DeadPool's recovery and overhead from a JSON of deadpool bench recovery")
    add("--out", metavar="FILE", help="write inputs and results as JSON")
    add("--picture", metavar="FILE", help="draw goodput against size (PNG, SVG or PDF by suffix)")


class InputError(ValueError):
    """An input cannot be used; the message is one line."""


def _inputs(options: argparse.Namespace) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    """Values by flag, and for each a line of (meaning, value, source)."""
    values: dict[str, float] = {}
    rows: list[tuple[str, str, str]] = []
    measured: dict[str, tuple[float, str]] = {}
    if options.measured:
        measured = _measured(Path(options.measured))
    for flag, default, unit, text, source in _INPUTS:
        given = getattr(options, flag.replace("-", "_"))
        if given is not None:
            value, where = given, f"--{flag}"
        elif flag in measured:
            value, where = measured[flag]
        else:
            value, where = default, source
        least = "more than 0" if flag in ("gpus-per-node", "iteration", "replica-nodes") else "0 or more"
        most = 1.0 if flag == "commit-share" else _MOST
        if not 0 <= value <= most or (value == 0 and least == "more than 0"):
            raise InputError(f"--{flag} {value:g}: must be {least}, at most {most:g}")
        values[flag] = value
        rows.append((text, f"{value:g} {unit}".strip(), where))
    return values, rows


def _measured(path: Path) -> dict[str, tuple[float, str]]:
    import statistics

    try:
        kills = json.loads(path.read_text())["kills"]
        seconds = statistics.median(k["first_iteration_s"] - k["iteration_s"] for k in kills)
        blocked = 100 * statistics.median(k["blocked_share"] for k in kills)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise InputError(f"--measured {path}: not the JSON of deadpool bench recovery ({err})") from None
    return {
        "recovery": (seconds, f"measured: {path}, median of {len(kills)}"),
        "overhead": (blocked, f"measured: {path}, median of {len(kills)}"),
    }


def read_trace(path: Path) -> list[float]:
    """Failure times in seconds, ascending, from a file of hours. Raises InputError."""
    hours: list[float] = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(f"--trace {path}: {err}") from None
    for at, line in enumerate(lines, 1):
        text = line.split("#")[0].replace(",", " ").split()
        if not text:
            continue
        try:
            hours.append(float(text[0]))
        except ValueError:
            raise InputError(f"--trace {path}: line {at}: {text[0]!r} is not a number of hours") from None
    if not hours or not all(0 <= h <= _MOST for h in hours) or max(hours) == 0:
        raise InputError(f"--trace {path}: expected failure times of 0 to {_MOST:g} hours, one a line, one above 0")
    return [3600.0 * h for h in sorted(hours)]


def _gaps(times: Sequence[float], scale: float) -> Iterator[float]:
    """Times between the failures of a trace on ``scale`` times as many nodes; the trace is repeated when it ends."""
    before = 0.0
    length = times[-1] + (times[-1] / len(times) or 1.0)
    turn = 0
    while True:
        for t in times:
            at = (turn * length + t) / scale
            yield max(0.0, at - before)
            before = at
        turn += 1


def _spare_choices(nodes: int) -> list[int]:
    shares = (0.003, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.03)
    return sorted({0, 1, 2, 4, *(math.ceil(nodes * share) for share in shares)})


def _check_outputs(options: argparse.Namespace) -> None:
    """Before minutes of computing. Raises InputError."""
    for flag, name in (("out", options.out), ("picture", options.picture)):
        if name and (Path(name).is_dir() or not os.access(Path(name).parent, os.W_OK)):
            raise InputError(f"--{flag} {name}: there is no directory for it, or none that can be written to")
    if options.picture and Path(options.picture).suffix not in _PICTURES:
        raise InputError(f"--picture {options.picture}: must end in {', '.join(_PICTURES)}")


def _nodes(gpus: int, v: dict[str, float]) -> int:
    return max(1, math.ceil(gpus / v["gpus-per-node"]))


def _days(options: argparse.Namespace, failures_a_day: float) -> float:
    return float(options.days or max(30.0, 300.0 / failures_a_day))


def _one_size(
    gpus: int, v: dict[str, float], failures_a_day: float, trace: list[float] | None, options: argparse.Namespace
) -> dict[str, Any]:
    nodes, rate = _nodes(gpus, v), failures_a_day / _nodes(gpus, v)
    cluster = Cluster(nodes, 0, v["iteration"], 3600 * v["repair"], min(nodes, int(v["replica-nodes"])))
    ours = Costs(overhead=v["overhead"] / 100, recovery_s=v["recovery"], restart_s=v["restart"],
                 commit_share=v["commit-share"])  # fmt: skip
    per_second = failures_a_day / 86400.0
    costs = {
        "deadpool": ours,
        "shrink": replace(ours, shrink_s=v["shrink"], growth_s=v["growth"]),
        "checkpoint": best_interval(Costs(restart_s=v["restart"], save_s=v["save"]), per_second),
    }
    days = _days(options, failures_a_day)
    out: dict[str, Any] = {"gpus": gpus, "nodes": nodes, "failures_a_day": failures_a_day, "days": days}
    for strategy in STRATEGIES:
        best: dict[str, Any] | None = None
        for spares in _spare_choices(nodes) if options.spares is None else [options.spares]:
            outcomes = []
            for run in range(1 if trace else options.runs):
                rng = random.Random(f"{options.seed}-{gpus}-{run}")
                total = nodes + spares
                gaps = _gaps(trace, total / (options.trace_nodes or nodes)) if trace else poisson(rate, total, rng)
                run_cluster = replace(cluster, spares=spares)
                outcomes.append(simulate(strategy, run_cluster, costs[strategy], gaps, 86400.0 * days))
            middle, low, high = mean(outcomes)
            if best is None or middle > best["goodput"]:
                best = {
                    "goodput": middle, "min": low, "max": high, "spares": spares,
                    "interval_s": costs[strategy].interval_s if strategy == "checkpoint" else None,
                    "outcomes": [asdict(o) for o in outcomes],
                }  # fmt: skip
        out[strategy] = best
    return out


def run_simulate(options: argparse.Namespace) -> int:
    """Simulate, print, draw; returns the exit code."""
    from deadpool_megatron.observe.figures import MissingPlots, new_figure

    try:
        values, rows = _inputs(options)
        _check_outputs(options)
        trace = read_trace(Path(options.trace)) if options.trace else None
        rate, row = _rate(options, trace)
        sizes = {gpus: rate(_nodes(gpus, values)) for gpus in options.gpus or _SIZES}
        for gpus, failures_a_day in sizes.items():
            all_nodes = 1 + (options.spares or 0) / _nodes(gpus, values)  # over those that train
            count = failures_a_day * all_nodes * _days(options, failures_a_day)
            if count > _MOST_FAILURES:
                raise InputError(
                    f"--gpus {gpus}: {count:.2g} failures are too many to simulate: fewer GPUs, spares or days"
                )
        figure = new_figure(3.6) if options.picture else None
    except (InputError, MissingPlots) as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return 2
    rows.append(row)
    print("inputs")
    for text, value, source in rows:
        print(f"  {text:<42}{value:>12}")
        print(f"      {source}")
    results = []
    print("\ngoodput, share of all nodes' time that becomes training (simulated)")
    print(f"{'':>8} {'':>8} | {'DeadPool,':>14} | {'DeadPool,':>14} |")
    print(f"{'':>8} {'failures':>8} | {'waits':>14} | {'shrinks':>14} | {'checkpoint-restart':>22}")
    print(f"{'GPUs':>8} {'a day':>8}" + 2 * f" | {'goodput spares':>14}" + f" | {'goodput spares':>14} {'every':>7}")
    for gpus, failures_a_day in sizes.items():
        one = _one_size(gpus, values, failures_a_day, trace, options)
        results.append(one)
        columns = "".join(f" | {one[s]['goodput']:>7.2%} {one[s]['spares']:>6}" for s in STRATEGIES)
        every = f"{one['checkpoint']['interval_s']:.0f} s"
        print(f"{gpus:>8} {one['failures_a_day']:>8.2f}{columns} {every:>7}", flush=True)
    try:
        if options.out:
            inputs = [{"meaning": t, "value": x, "source": s} for t, x, s in rows]
            Path(options.out).write_text(strict_json({"inputs": inputs, "results": results}, indent=1) + "\n")
        if figure is not None:
            _draw(results, options.picture, *figure)
    except OSError as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return 2
    return 0


def _rate(
    options: argparse.Namespace, trace: list[float] | None
) -> tuple[Callable[[int], float], tuple[str, str, str]]:
    """Failures a day by number of nodes, and the row of (meaning, value, source) that says where they are from."""
    if trace is not None:
        a_day = len(trace) / (trace[-1] / 86400.0)
        on = options.trace_nodes or "each size as it is"
        row = ("failures", f"{len(trace)} in {trace[-1] / 86400.0:.1f} days", f"--trace {options.trace}, nodes: {on}")
        return lambda nodes: a_day * nodes / (options.trace_nodes or nodes), row
    given = options.failures_per_1000_node_days
    per_thousand, source = _RATES[options.rate] if given is None else (given, "--failures-per-1000-node-days")
    return lambda nodes: per_thousand / 1000.0 * nodes, ("failures of 1,000 node-days", f"{per_thousand:g}", source)


def _draw(results: list[dict[str, Any]], path: str, figure: Any, axes: Any) -> None:
    from deadpool_megatron.observe.figures import save

    xs = [one["gpus"] for one in results]
    for strategy, marker in zip(STRATEGIES, "os^", strict=True):
        ys = [100 * one[strategy]["goodput"] for one in results]
        low = [100 * (one[strategy]["goodput"] - one[strategy]["min"]) for one in results]
        high = [100 * (one[strategy]["max"] - one[strategy]["goodput"]) for one in results]
        style = {"marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1.2}
        axes.errorbar(xs, ys, [low, high], label=_NAMES[strategy], **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:,}" for x in xs], rotation=35, ha="right")
    axes.minorticks_off()
    axes.set_xlabel("GPUs, spares not included")
    axes.set_ylabel("goodput (% of all nodes' time)")
    axes.set_title("Simulated goodput under failures (bars: least and most of the runs)", loc="left")
    figure.legend(loc="outside lower left", ncols=1, fontsize=8)
    save(figure, path)
