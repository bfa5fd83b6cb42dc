"""`deadpool bench scale` and `deadpool bench ablation`: what recovery time depends on, and what it would be without."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from deadpool_bench.kills import Recovery, medians, recoveries
from deadpool_bench.progress import progress, say
from deadpool_megatron.jobs.job import JobError
from deadpool_megatron.observe.recoveries import PHASES

type _Cell = tuple[str, Callable[[Path], list[Recovery]]]
_LABELS: Final = {
    "ranks": "ranks that train",
    "bytes": "unique state of a coordinate (MiB)",
    "failures": "nodes lost at once",
}
_ABLATIONS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "deadpool": ("as it is", {}),
    "cold-spare": ("the spare's workers have imported nothing", {"cold": True}),
    "timeout": ("nothing but the lease tells that a node is gone", {"fault": "stop"}),
    "no-peer": ("no copy in another node's memory: back to disk", {"fault": "kill-and-copies", "durable": True}),
    "all-groups": ("every process group re-formed, none kept", {"arguments": ["--no-deadpool-keep-groups"]}),
}


def _common(parser: argparse.ArgumentParser, active: int, nproc: int) -> None:
    add = parser.add_argument
    add("--kills", type=int, default=3, metavar="K", help="kills at each point (default: 3)")
    add("--active-nodes", type=int, default=active, metavar="N", help=f"nodes that train (default: {active})")
    add("--nproc-per-node", type=int, default=nproc, metavar="P", help=f"workers a node (default: {nproc})")
    add("--spares-per-job", type=int, default=1, metavar="S", help="spares a job (default: 1)")
    add("--seed", type=int, default=0, help="of the moments and victims (default: 0)")
    add("--emulate-cpu", action="store_true", help="emulate CUDA on the CPU")
    add("--out", metavar="FILE", help="write all figures as JSON")
    add("--picture", metavar="FILE", help="draw them (PNG, SVG or PDF by suffix)")


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool bench scale`."""
    parser.add_argument("--by", choices=tuple(_LABELS), required=True, help="what to vary")
    parser.add_argument(
        "--points",
        metavar="LIST",
        help="ranks: active nodes (default: 2,4,8); bytes: hidden sizes (default: 64,128,256); failures: nodes at once "
        "(default: 1,2)",
    )
    _common(parser, 4, 1)
    parser.add_argument("script", help="training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments, without --deadpool")


def add_ablation_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool bench ablation`."""
    parser.add_argument(
        "--without", default=",".join(_ABLATIONS), metavar="LIST", help=f"of {', '.join(_ABLATIONS)} (default: all)"
    )
    _common(parser, 2, 1)
    parser.add_argument("script", help="training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments, without --deadpool")


def _point(options: argparse.Namespace, base: Path, value: int) -> list[Recovery]:
    name = f"{options.by}-{value}"
    if options.by == "ranks":
        return recoveries(options, base, name, options.kills, active=value)
    if options.by == "bytes":
        return recoveries(options, base, name, options.kills, arguments=["--hidden-size", str(value)])
    return recoveries(options, base, name, options.kills, count=value)


def run_scale(options: argparse.Namespace) -> int:
    """Measure every point; returns the exit code."""
    text = options.points or {"ranks": "2,4,8", "bytes": "64,128,256", "failures": "1,2"}[options.by]
    try:
        points = [int(x) for x in text.split(",")]
        if min(points) < 1:
            raise ValueError
    except ValueError:
        say(f"deadpool: --points {text}: whole numbers above 0, as in 2,4,8")
        return 2

    def x_of(value: int, found: list[Recovery]) -> float:
        if options.by == "ranks":
            return float(value * options.nproc_per_node)
        return found[0].unique_bytes / (1 << 20) if options.by == "bytes" else float(value)

    cells: list[_Cell] = [(str(value), functools.partial(_point, options, value=value)) for value in points]
    return _run(options, cells, _LABELS[options.by], x_of, points)


def run_ablation(options: argparse.Namespace) -> int:
    """Measure every variant; returns the exit code."""
    names = [n for n in options.without.split(",") if n]
    unknown = [n for n in names if n not in _ABLATIONS]
    if unknown or not names:
        say(f"deadpool: --without {options.without}: of {', '.join(_ABLATIONS)}")
        return 2
    cells: list[_Cell] = [(name, functools.partial(_variant, options, name=name)) for name in names]
    for name in names:
        print(f"{name:<11}{_ABLATIONS[name][0]}")
    return _run(options, cells, "", None, [])


def _variant(options: argparse.Namespace, base: Path, name: str) -> list[Recovery]:
    return recoveries(options, base, name, options.kills, **_ABLATIONS[name][1])


def _run(
    options: argparse.Namespace,
    cells: list[_Cell],
    label: str,
    x_of: Callable[[int, list[Recovery]], float] | None,
    points: list[int],
) -> int:
    base = Path(tempfile.mkdtemp(prefix="deadpool-bench-"))
    found: dict[str, list[Recovery]] = {}
    failed = ""
    with progress("kills", len(cells) * options.kills):
        for name, measure in cells:
            try:
                found[name] = measure(base)
            except JobError as err:  # the other points still count
                failed = failed or str(err)
                say(f"deadpool: {err}")
    _show(found)
    if options.out:
        content = {name: [asdict(r) for r in rows] for name, rows in found.items()}
        Path(options.out).write_text(json.dumps({"seed": options.seed, "recoveries": content}, indent=1) + "\n")
    if options.picture and found:
        xs = None if x_of is None else {str(v): x_of(v, found[str(v)]) for v in points if str(v) in found}
        _draw(found, xs, label, options.picture)
    return int(bool(failed))


def _show(found: dict[str, list[Recovery]]) -> None:
    short = {"detected": "detect", "declared": "decl.", "aborted": "abort", "prepared": "prep.", "reformed": "reform"}
    short |= {"restored": "rest.", "compared": "comp.", "resumed": "resume"}
    names = [n for n in (*PHASES, "redo") if n not in ("declared", "agreed")]
    print("seconds, medians; disturbance: kill to first iteration, less a normal one")
    print(f"{'':<11}{'n':>3}{'disturb.':>9}" + "".join(f"{short.get(n, n):>7}" for n in names))
    for name, rows in found.items():
        middle = medians(rows)
        cells = "".join(f"{middle[n]:>7.3f}" for n in names)
        print(f"{name:<11}{len(rows):>3}{statistics.median(r.disturbance_s for r in rows):>9.3f}{cells}")
    print(f"{'':<11}{'iterations lost':>16}{'groups re-formed':>18}  from")
    for name, rows in found.items():
        lost = f"{min(r.lost_iterations for r in rows)} to {max(r.lost_iterations for r in rows)}"
        changed, of = rows[-1].groups
        source = "the durable generation" if all(r.durable for r in rows) else "memory"
        print(f"{name:<11}{lost:>16}{f'{changed} of {of}':>18}  {source}")


def _draw(found: dict[str, list[Recovery]], xs: dict[str, float] | None, label: str, path: str) -> None:
    from deadpool_megatron.observe.figures import COLOURS, MissingPlots, new_figure, save

    try:
        figure, axes = new_figure(3.0)
    except MissingPlots as err:
        say(f"deadpool: {err}")
        return
    for i, (name, rows) in enumerate(found.items()):
        kill, middle = ("one kill", "median") if i == 0 else (None, None)
        x = i if xs is None else xs[name]
        ys = [r.disturbance_s for r in rows]
        axes.plot([x] * len(ys), ys, "o", color=COLOURS[0], markersize=4, alpha=0.6, label=kill)
        style = {"color": COLOURS[1], "markersize": 22, "markeredgewidth": 2.5}
        axes.plot(x, statistics.median(ys), "_", label=middle, **style)
    if xs is None:
        axes.set_xticks(range(len(found)), list(found))
        axes.set_xlim(-0.5, len(found) - 0.5)
    else:
        axes.set_xlabel(label)
        axes.set_xticks(sorted(xs.values()), [f"{x:.3g}" for x in sorted(xs.values())])
        axes.margins(x=0.15)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("disturbance (s)")
    axes.set_title("Disturbance of training by the loss of nodes", loc="left")
    figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    save(figure, path)
