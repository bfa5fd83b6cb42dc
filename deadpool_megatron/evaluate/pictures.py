"""Pictures of a measurement, with matplotlib (the extra ``bench``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import itertools

from matplotlib import pyplot

__all__ = ["draw_control", "draw_overhead"]

_COLOURS = {"forward": "#7aa6d8", "backward": "#4c72b0", "gate": "#c44e52", "begin": "#8c8c8c", "end": "#ffffff"}


def draw_overhead(directory: Path, results: dict[str, Any]) -> list[Path]:
    """``cdf.png``: iteration times with and without. ``timeline-P.png``: copies under one iteration's passes."""
    out = [directory / "cdf.png"]
    figure, axes = pyplot.subplots(1, len(results), figsize=(5.5 * len(results), 3.6), squeeze=False)
    for axis, (precision, found) in zip(axes[0], results.items(), strict=True):
        for name, colour in (("off", "#8c8c8c"), ("on", "#c44e52")):
            seconds = np.sort(np.asarray(found["seconds"][name]))
            label = {"on": "with snapshots", "off": "without"}[name]
            axis.plot(1e3 * seconds, np.arange(1, len(seconds) + 1) / len(seconds), colour, label=label)
        c = found["blocks"]
        axis.set(
            title=f"{precision}: ratio {c['ratio']:.4f} ({c['low']:.4f} to {c['high']:.4f})",
            xlabel="iteration time (ms)",
            ylabel="share of iterations",
        )
        axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(out[0], dpi=120)
    pyplot.close(figure)
    for precision, found in results.items():
        timeline = found["timeline"]
        if timeline and timeline["marks"]:
            out.append(directory / f"timeline-{precision}.png")
            _draw_timeline(out[-1], timeline, precision)
    return out


def _draw_timeline(path: Path, timeline: dict[str, Any], precision: str) -> None:
    marks = timeline["marks"]
    zero = marks[0][0]
    figure, axis = pyplot.subplots(figsize=(11, 2.4))
    for (begin, what), (end, _) in itertools.pairwise(marks):
        axis.broken_barh(
            [(1e3 * (begin - zero), 1e3 * (end - begin))], (1, 0.8), color=_COLOURS[what], edgecolor="white"
        )
    for begin, end, _ in timeline["copies"]:
        width = max(1e3 * (end - begin), 1e-3 * (marks[-1][0] - zero))
        axis.broken_barh([(1e3 * (begin - zero), width)], (0, 0.8), color="#55a868")
    total = sum(nbytes for *_, nbytes in timeline["copies"])
    axis.set(
        yticks=[0.4, 1.4],
        yticklabels=["copies", "training"],
        xlabel="ms since the iteration began",
        title=f"one iteration of one rank, {precision}: {total:,} bytes copied under {len(marks)} marks "
        "(light: forward, dark: backward, red: from the gate on)",
    )
    axis.title.set_fontsize(9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_control(directory: Path, results: list[dict[str, Any]]) -> Path:
    """``control.png``: the phases of the control part of a recovery, and the coordinator's CPU, against agents."""
    out = directory / "control.png"
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    styles = {"embedded": "-o", "etcd": "--s"}
    for store in dict.fromkeys(each["store"] for each in results):
        mine = [each for each in results if each["store"] == store]
        agents = [each["agents"] for each in mine]
        for what, colour in (
            ("detect_s", "#8c8c8c"),
            ("notify_s", "#4c72b0"),
            ("agree_s", "#55a868"),
            ("total_s", "#c44e52"),
        ):
            values = [[1e3 * kill[what] for kill in each["kills"]] for each in mine]
            middle = [float(np.median(v)) for v in values]
            spread = [
                [m - min(v) for m, v in zip(middle, values, strict=True)],
                [max(v) - m for m, v in zip(middle, values, strict=True)],
            ]
            label = f"{what.removesuffix('_s')}, {store}"
            axes[0].errorbar(agents, middle, yerr=spread, fmt=styles[store], color=colour, label=label, capsize=3)
        cpu = [float(np.median([kill["coordinator_cpu_s"] for kill in each["kills"]])) for each in mine]
        axes[1].plot(agents, cpu, styles[store], color="#4c72b0", label=f"coordinator, {store}")
        stored = [float(np.median([kill["store_cpu_s"] for kill in each["kills"]])) for each in mine]
        if any(stored):
            axes[1].plot(agents, stored, styles[store], color="#dd8452", label=store)
        steady = [(each["agents"], 100 * each["steady"]["coordinator_cpu"]) for each in mine if each["steady"]]
        if steady:
            axes[2].plot(*zip(*steady, strict=True), styles[store], color="#4c72b0", label=f"coordinator, {store}")
    axes[0].set(title="the control part of a recovery", ylabel="ms (median, least and most)")
    axes[1].set(title="CPU seconds of one recovery", ylabel="s")
    axes[2].set(title="CPU in failure-free time", ylabel="% of a core")
    for axis in axes:
        axis.set(xscale="log", xlabel="agents (8 ranks each)")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    axes[0].set(yscale="log")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out
