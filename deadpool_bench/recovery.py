"""`deadpool bench recovery`: kill nodes at random moments and time the way back, against restarting from a checkpoint.

A disturbance is the time from the kill to the end of the first iteration completed after it, less the normal time of
one iteration. The baseline is the same job without DeadPool: the same kill, then the same command again with
``--load``, synchronous and asynchronous saving at several intervals, each with a warm standby (`bench.restarts`).
The best interval for ``--mtbf`` is chosen. ``--torchft`` kills replicas of the same model under torchft as well
(`bench.baselines.torchft_kills`). ``--shrinks`` kills nodes without a spare, and has nodes join afterwards, of torchft
likewise. All of them alternate, so that they see the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deadpool_bench.baselines.torchft_kills import (
    SETTINGS,
    Outage,
    check_torchft,
    outage,
    regrouping,
    show_outages,
)
from deadpool_bench.changes import Change, show_changes, shrink_and_growth
from deadpool_bench.kills import Recovery, medians, recoveries, spread
from deadpool_bench.progress import progress, say, step
from deadpool_bench.restarts import Restart, choose_interval, restart
from deadpool_megatron.jobs.job import JobError


def add_recovery_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool bench recovery`."""
    add = parser.add_argument
    add("--kills", type=int, default=10, metavar="K", help="kills to measure (default: 10)")
    add("--restarts", type=int, default=1, metavar="R", help="restarts of each mode and interval (default: 1)")
    add("--modes", default="sync,async", metavar="LIST", help="checkpoints to restart from (default: sync,async)")
    add("--intervals", default="2,5,20", metavar="LIST", help="iterations between checkpoints (default: 2,5,20)")
    add("--cold-restarts", type=int, default=1, metavar="R", help="restarts without a warm standby (default: 1)")
    add("--torchft", type=int, default=0, metavar="K", help="kills under torchft, of each settings (default: 0)")
    text = "losses without a spare, each with a node that comes later, of torchft too (default: 0)"
    add("--shrinks", type=int, default=0, metavar="K", help=text)
    add("--mtbf", type=float, default=4.0, metavar="H", help="hours between failures, to choose the best (default: 4)")
    add("--active-nodes", type=int, default=4, metavar="N", help="nodes that train (default: 4)")
    add("--nproc-per-node", type=int, default=2, metavar="P", help="workers a node (default: 2)")
    add("--workers", type=int, default=0, metavar="W", help="workers to kill at once, and no node (default: a node)")
    add("--spares-per-job", type=int, default=1, metavar="S", help="spares, kills a job (default: 1)")
    add("--seed", type=int, default=0, help="of the moments and victims (default: 0)")
    add("--emulate-cpu", action="store_true", help="emulate CUDA on the CPU")
    add("--out", metavar="FILE", help="write all figures as JSON")
    add("--picture", metavar="FILE", help="draw the breakdown (PNG, SVG or PDF by suffix)")
    add("script", help="training script")
    add("arguments", nargs=argparse.REMAINDER, help="its arguments, without --deadpool and --save")


def _plan(options: argparse.Namespace) -> list[tuple[str, int, bool, int]]:
    """(mode, interval, warm, which of these) of every restart; the cold ones with the first of both. ValueError."""
    modes = [m for m in options.modes.split(",") if m]
    if any(m not in ("sync", "async") for m in modes):
        raise ValueError(f"--modes {options.modes}: of sync and async")
    try:
        intervals = [int(i) for i in options.intervals.split(",") if i]
    except ValueError:
        raise ValueError(f"--intervals {options.intervals}: whole numbers of iterations, as in 2,5,20") from None
    if any(i < 1 for i in intervals):
        raise ValueError(f"--intervals {options.intervals}: 1 or more")
    out = [(m, i, True, n) for n in range(1, options.restarts + 1) for m in modes for i in intervals]
    if modes and intervals:
        out += [(modes[0], intervals[0], False, n) for n in range(1, options.cold_restarts + 1)]
    return out


def run_recovery(options: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    base = Path(tempfile.mkdtemp(prefix="deadpool-bench-"))
    kills: list[Recovery] = []
    found: list[Restart] = []
    others: list[Outage] = []
    resized: dict[str, list[Change]] = {}
    failed = ""
    try:
        plan = _plan(options)
        check_torchft(options)
    except ValueError as err:
        say(f"deadpool: {err}")
        return 2
    rounds = max(1, len(plan), options.torchft, options.shrinks)
    theirs = SETTINGS if options.torchft else ()
    steps = options.kills + len(plan) + options.torchft * len(SETTINGS) + options.shrinks * (1 + len(theirs))
    try:
        with progress("kills and restarts", steps):
            for turn in range(rounds):
                # Alternated: some kills, a restart, some kills ...
                share = options.kills * (turn + 1) // rounds - options.kills * turn // rounds
                kills += recoveries(options, base, f"deadpool-{turn}", share, workers=options.workers)
                if turn < options.torchft:
                    for settings in SETTINGS:
                        others.append(outage(options, base, settings.directory("torchft", turn), settings))
                        step()
                if turn < options.shrinks:
                    resized.setdefault("DeadPool", []).extend(shrink_and_growth(options, base, f"shrink-{turn}"))
                    step()
                    for settings in theirs:
                        found_theirs = regrouping(options, base, settings.directory("regrouping", turn), settings)
                        resized.setdefault(f"torchft, {settings.name}", []).extend(found_theirs)
                        step()
                if turn < len(plan):
                    found.append(restart(options, base, *plan[turn]))  # type: ignore[arg-type]
                    step()
    except JobError as err:  # what was measured before still counts
        failed = str(err)
    if kills:
        _show_kills(kills)
    if found:
        _show_restarts(found, kills, options.mtbf * 3600.0)
    if others:
        show_outages(others)
        _show_ratios(others, kills)
    if resized:
        show_changes(resized)
    if options.out:
        measured: dict[str, Any] = {"kills": kills, "restarts": found, "torchft": others}
        content: dict[str, Any] = {name: [asdict(each) for each in rows] for name, rows in measured.items()}
        content |= {"seed": options.seed}
        if resized:
            content["shrinks"] = {name: [asdict(each) for each in rows] for name, rows in resized.items()}
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n")
    if failed:
        say(f"deadpool: {failed}")
    if options.picture and kills:
        return _draw(kills, found, options.picture, others) or int(bool(failed))
    return int(bool(failed))


def _show_kills(kills: list[Recovery]) -> None:
    print(f"disturbance per kill (s): {spread([k.disturbance_s for k in kills])}")
    print(f"kill to first iteration (s): {spread([k.first_iteration_s for k in kills])}")
    print(f"one iteration (s): {spread([k.iteration_s for k in kills])}")
    again = statistics.mean(k.lost_iterations for k in kills)
    print(f"completed iterations done again: mean {again:.2f}, most {max(k.lost_iterations for k in kills)}")
    for name, seconds in medians(kills).items():
        print(f"  {name:<10} +{seconds:.3f} s")
    print(f"blocked on DeadPool (%): {spread([100 * k.blocked_share for k in kills])}")


def _show_restarts(found: list[Restart], kills: list[Recovery], mtbf_s: float) -> None:
    print("\nrestarts (s): medians; cost is what a failure costs in all, saving included")
    columns = ("ended", 7), ("first", 8), ("lost it.", 9), ("stall", 7), ("cost", 9), ("n", 4)
    print(f"{'saving':<7}{'every':>6} {'standby':<8}" + "".join(f"{name:>{width}}" for name, width in columns))
    for key in dict.fromkeys((r.mode, r.interval, r.warm) for r in found):
        rows = [r for r in found if (r.mode, r.interval, r.warm) == key]

        def middle(name: str, rows: list[Restart] = rows) -> float:
            return float(statistics.median(getattr(r, name) for r in rows))

        cost = statistics.median(r.cost(mtbf_s) for r in rows)
        print(
            f"{key[0]:<7}{key[1]:>6} {'warm' if key[2] else 'cold':<8}{middle('ended_s'):>7.2f}"
            f"{middle('first_iteration_s'):>8.2f}{middle('lost_iterations'):>9.1f}{middle('stall_s'):>7.2f}{cost:>9.1f}"
            f"{len(rows):>4}"
        )
    warm = [r for r in found if r.warm] or found
    mode, interval, cost = choose_interval(warm, mtbf_s)
    print(f"best at {mtbf_s / 3600:g} h between failures: {mode}, every {interval}: {cost:.1f} s a failure")
    if kills:
        ours = statistics.median(k.first_iteration_s + k.lost_iterations * k.iteration_s for k in kills)
        ours += statistics.median(k.blocked_share for k in kills) * mtbf_s
        print(f"DeadPool, the same sum: {ours:.1f} s a failure")
        ratio = statistics.median(r.first_iteration_s for r in warm) / statistics.median(
            k.first_iteration_s for k in kills
        )
        print(f"kill to first iteration, restart / DeadPool: {ratio:.1f}")


def _show_ratios(others: list[Outage], kills: list[Recovery]) -> None:
    if not kills:
        return
    ours = statistics.median(k.disturbance_s for k in kills)
    print("disturbance, torchft / DeadPool (s):")
    for name in dict.fromkeys(o.settings for o in others):
        theirs = statistics.median(o.disturbance_s for o in others if o.settings == name)
        print(f"  {name}: {theirs:.3f} / {ours:.3f} = {theirs / ours:.1f}")


def _draw(kills: list[Recovery], found: list[Restart], path: str, others: Sequence[Outage] = ()) -> int:
    from deadpool_megatron.observe.figures import COLOURS, MissingPlots, new_figure, save

    rows: list[tuple[str, dict[str, float]]] = [("DeadPool", medians(kills))]
    for key in dict.fromkeys((r.mode, r.interval, r.warm) for r in found):
        same = [r for r in found if (r.mode, r.interval, r.warm) == key]
        ended = statistics.median(r.ended_s for r in same)
        first = statistics.median(r.first_iteration_s for r in same)
        again = statistics.median(r.lost_iterations * r.iteration_s for r in same)
        label = f"restart, {key[0]}, every {key[1]}" + ("" if key[2] else ", cold")
        parts = {"job ended": ended, "start, load, first iteration": first - ended, "lost iterations": again}
        rows.append((label, parts))
    for settings in dict.fromkeys(o.settings for o in others):
        each = [o.breakdown() for o in others if o.settings == settings]
        parts = {f"torchft: {name}": statistics.median(row[name] for row in each) for name in each[0]}
        rows.append((f"torchft, {settings}", parts))
    try:
        figure, axes = new_figure(1.6 + 0.3 * len(rows))
    except MissingPlots as err:
        say(f"deadpool: {err}")
        return 1
    colours = [*COLOURS, "#999999", "#7F3C8D", "#8C564B", "#D7B5A6", "#2E4A1E", "#FF9DA7"]
    names: dict[str, Any] = {}
    for y, (_, parts) in enumerate(rows):
        left = 0.0
        for name, seconds in parts.items():
            if seconds <= 0.0005:
                continue
            colour = names.setdefault(name, colours[len(names) % len(colours)])
            axes.barh(y, seconds, left=left, height=0.6, color=colour, linewidth=0)
            left += seconds
        axes.text(left, y, f" {left:.2f} s", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds from the kill (medians)")
    axes.set_title("From a kill to the first iteration after it, and what is lost", loc="left")
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in names.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=8)
    save(figure, path)
    return 0
