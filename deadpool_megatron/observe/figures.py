"""Pictures, with matplotlib: at page width (7 inches), axes with units, a legend that covers nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from deadpool_megatron.observe.timeline import ACTS, Timeline

WIDTH: Final = 7.0  # inches, a page's text
# Okabe and Ito's colours, to be told apart by everybody.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_ACT_COLOURS: Final = {
    "detect": "#D55E00",
    "abort": "#E69F00",
    "agree": "#000000",
    "prepare": "#0072B2",
    "re-form": "#009E73",
    "gather": "#CC79A7",
    "compare": "#999999",
    "start": "#F0E442",
    "redo": "#56B4E9",
    "wait": "#DDDDDD",
}


class MissingPlots(Exception):
    """matplotlib is not installed; the message is one line that says how to get it."""


def _pyplot() -> Any:
    try:
        import matplotlib
        from cycler import cycler
    except ModuleNotFoundError:
        raise MissingPlots("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#E5E5E5",
            "axes.axisbelow": True,
            "legend.frameon": False,
            "figure.dpi": 150,
            "svg.hashsalt": "deadpool",  # the same picture is the same file
            "axes.prop_cycle": cycler(color=COLOURS),
        }
    )
    return pyplot


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of page width and ``height`` inches with its axes. Raises MissingPlots."""
    return _pyplot().subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)  # type: ignore[no-any-return]


def save(figure: Any, path: str | Path) -> None:
    """Write a picture; the suffix says in which format. The figure is closed."""
    figure.savefig(path)
    _pyplot().close(figure)


def as_image(figure: Any, alt: str) -> str:
    """An ``<img>`` element that holds the picture itself. The figure is closed."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    _pyplot().close(figure)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'


def timeline_figure(line: Timeline, number: int) -> Any:
    """One recovery: a row for the job and one a node. Raises MissingPlots."""
    used = [act for act in ACTS if any(b.act == act for b in line.bars)]
    legend_rows = -(-len(used) // 2)
    height = 1.3 + 0.28 * len(line.rows) + 0.19 * legend_rows
    figure, axes = new_figure(height)
    span = max((b.end for b in line.bars), default=1.0)
    scale, unit = (1e3, "ms") if span < 1.0 else (1.0, "s")
    for b in line.bars:
        y = line.rows.index(b.row)
        axes.barh(
            y, max(b.end - b.start, span / 400) * scale, left=b.start * scale, height=0.62,
            color=_ACT_COLOURS[b.act], linewidth=0,
        )  # fmt: skip
    axes.set_yticks(range(len(line.rows)), line.rows)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.axhline(0.5, color="#999999", linewidth=0.8)
    axes.set_xlim(0, span * scale * 1.02)
    since = "the failure" if line.exact else "the last sign of life of what failed"
    axes.set_xlabel(f"time since {since} ({unit})")
    r = line.recovery
    who = r.what.split(":", 1)[0]
    start = "" if r.generation is None else f", from generation {r.generation}"
    more = f"; {line.left_out} more nodes not shown" if line.left_out else ""
    axes.set_title(f"Recovery {number} (epoch {r.epoch}): {who}{start}{more}", loc="left")
    from matplotlib.patches import Patch

    handles = [Patch(color=_ACT_COLOURS[act], label=ACTS[act]) for act in used]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=8, handlelength=1.2)
    return figure


def line_figure(
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    title: str,
    decorate: Callable[[Any], None] | None = None,
    height: float = 2.6,
    from_zero: bool = True,
    line: str = "-",
) -> Any:
    """Lines over a common axis, with a legend below where there are several. Raises MissingPlots.

    ``line`` is matplotlib's line style, an empty text for points alone.
    """
    figure, axes = new_figure(height)
    for label, xs, ys in series:
        marker = "." if len(xs) < 60 or not line else None
        axes.plot(xs, ys, label=label, linewidth=1.2, linestyle=line or "none", marker=marker, markersize=4)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left")
    if decorate is not None:
        decorate(axes)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower left", ncols=3, fontsize=8)
    return figure
