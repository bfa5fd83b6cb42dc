"""Pictures of a measurement, with matplotlib (the extra ``bench``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import itertools

from matplotlib import pyplot

__all__ = ["draw_overhead"]

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
