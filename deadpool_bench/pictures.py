"""Pictures of a measurement. Each function raises MissingPlots when matplotlib is not installed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from deadpool_megatron.observe.figures import COLOURS, new_figure, save

_PASSES: Final = {"begin": "#999999", "forward": "#56B4E9", "backward": "#0072B2", "gate": "#D55E00"}
_WORDS: Final = {"begin": "opening", "gate": "from the gate on: optimizer"}
_COPIES: Final = "#009E73"
_PARTS: Final = (("total_s", "total"), ("agree_s", "agree"), ("notify_s", "notify all"), ("detect_s", "detect"))


def draw_overhead(directory: Path, results: dict[str, Any]) -> list[Path]:
    """``cdf.png``: iteration times with and without. ``timeline-P.png``: copies under one iteration's passes."""
    out = [directory / "cdf.png"]
    figure, axes = new_figure(2.8, 1, len(results), squeeze=False)
    for axis, (precision, found) in zip(axes[0], results.items(), strict=True):
        for name, label, colour in (("off", "without", "#999999"), ("on", "with snapshots", COLOURS[1])):
            times = sorted(1e3 * each for each in found["seconds"][name])
            shares = [(place + 1) / len(times) for place in range(len(times))]
            axis.plot(times, shares, color=colour, label=label, linewidth=1.2)
        c = found["blocks"]
        axis.set_title(f"{precision}: ratio {c['ratio']:.4f}\n({c['low']:.4f} to {c['high']:.4f})", loc="left")
        axis.set(xlabel="iteration time (ms)", ylabel="share of iterations")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8)
    save(figure, out[0])
    for precision, found in results.items():
        timeline = found["timeline"]
        if timeline and timeline["marks"]:
            out.append(directory / f"timeline-{precision}.png")
            _draw_timeline(out[-1], timeline, precision)
    return out


def _draw_timeline(path: Path, timeline: dict[str, Any], precision: str) -> None:
    from matplotlib.patches import Patch

    marks = timeline["marks"]
    zero, end = marks[0][0], marks[-1][0]
    figure, axis = new_figure(2.0)
    for (begin, what), (until, _) in itertools.pairwise(marks):
        place = [(1e3 * (begin - zero), 1e3 * (until - begin))]
        axis.broken_barh(place, (1, 0.8), color=_PASSES.get(what, "#FFFFFF"), edgecolor="white", linewidth=0.5)
    for begin, until, _ in timeline["copies"]:
        width = max(1e3 * (until - begin), 1e-3 * (end - zero))
        axis.broken_barh([(1e3 * (begin - zero), width)], (0, 0.8), color=_COPIES)
    total = sum(nbytes for *_, nbytes in timeline["copies"])
    axis.set(yticks=[0.4, 1.4], yticklabels=["copies", "training"], xlabel="ms since the iteration began")
    axis.grid(False, axis="y")
    axis.set_title(f"One iteration of one rank, {precision}: {total / 1e6:.1f} MB copied", loc="left")
    shown = [what for what in _PASSES if any(what == mark for _, mark in marks)]
    handles = [Patch(color=_PASSES[what], label=_WORDS.get(what, what)) for what in shown]
    handles.append(Patch(color=_COPIES, label="copies into the vault"))
    figure.legend(handles=handles, loc="outside lower left", ncols=5, fontsize=8)
    save(figure, path)


def draw_control(directory: Path, results: Sequence[dict[str, Any]]) -> Path:
    """``control.png``: the phases of the control part of a recovery, and the coordinator's CPU, against agents."""
    out = directory / "control.png"
    stores = list(dict.fromkeys(each["store"] for each in results))
    figure, axes = new_figure(5.4, 2, max(2, len(stores)), squeeze=False, sharex=True)
    for axis, store in zip(axes[0], stores, strict=False):
        _draw_phases(axis, [each for each in results if each["store"] == store])
        axis.set_title(f"Control part of a recovery, {store}", loc="left")
        axis.set(yscale="log", ylabel="ms: median, least, most")
    for store, line, colour in zip(stores, ("-o", "--s"), (COLOURS[3], COLOURS[4]), strict=False):
        mine = [each for each in results if each["store"] == store]
        spent = [statistics.median(kill["coordinator_cpu_s"] for kill in each["kills"]) for each in mine]
        axes[1][0].plot([e["agents"] for e in mine], spent, line, color=colour, label=f"CPU, {store}", markersize=4)
        steady = [(each["agents"], 100 * each["steady"]["coordinator_cpu"]) for each in mine if each["steady"]]
        if steady:
            axes[1][1].plot(*zip(*steady, strict=True), line, color=colour, markersize=4)
    axes[1][0].set_title("Coordinator, one recovery", loc="left")
    axes[1][0].set(ylabel="CPU seconds")
    axes[1][1].set_title("Coordinator, failure-free", loc="left")
    axes[1][1].set(ylabel="% of a core")
    sizes = sorted({each["agents"] for each in results})
    for axis in axes[1]:
        axis.set(xscale="log", xlabel="agents of 8 ranks")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
    for unused in axes[0][len(stores) :]:
        unused.set_visible(False)
    both = [axes[0][0].get_legend_handles_labels(), axes[1][0].get_legend_handles_labels()]
    handles, labels = (list(itertools.chain(*each)) for each in zip(*both, strict=True))
    figure.legend(handles, labels, loc="outside lower left", ncols=6, fontsize=8)
    save(figure, out)
    return out


def _draw_phases(axis: Any, mine: Sequence[dict[str, Any]]) -> None:
    agents = [each["agents"] for each in mine]
    for (what, label), colour in zip(_PARTS, ("#000000", *COLOURS), strict=False):
        values = [[1e3 * kill[what] for kill in each["kills"]] for each in mine]
        middle = [statistics.median(v) for v in values]
        spread = [
            [m - min(v) for m, v in zip(middle, values, strict=True)],
            [max(v) - m for m, v in zip(middle, values, strict=True)],
        ]
        axis.errorbar(agents, middle, yerr=spread, fmt="-o", color=colour, label=label, capsize=2, markersize=4)
