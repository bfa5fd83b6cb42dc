"""`deadpool timeline` and `deadpool report`: the pictures, the trace and the pages of a run."""

from __future__ import annotations

import base64
import contextlib
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from deadpool_megatron.cluster.records.exits import what_to_do
from deadpool_megatron.observe import figures
from deadpool_megatron.observe.narrative import count_text, paragraph, seconds_text
from deadpool_megatron.observe.recoveries import MEANING, Recovery, Story
from deadpool_megatron.observe.rundir import read_events, read_node_logs
from deadpool_megatron.observe.status import JobView, NoStatus, event_line
from deadpool_megatron.observe.strict_json import strict_json
from deadpool_megatron.observe.timeline import deaths, timeline
from deadpool_megatron.observe.trace import chrome_trace

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
img { width: 100%; height: auto; } pre { background: #f6f6f6; padding: 0.8em; overflow-x: auto; font-size: 12.5px; }
table { border-collapse: collapse; margin: 0.6em 0; } td, th { padding: 2px 12px 2px 0; text-align: left;
 white-space: pre-wrap; border-bottom: 1px solid #eee; vertical-align: top; } td.n, th.n { text-align: right;
 font-variant-numeric: tabular-nums; }
p.note { color: #666; }
"""


class Page:
    """A self-contained HTML page: no script, font or picture from elsewhere. Collects parts; `text` is all of it."""

    def __init__(self, title: str, head: str = "") -> None:
        self._title = title
        self._head = head
        self.without_pictures = ""
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str, note: bool = False) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p{' class=note' if note else ''}>{escape(text)}</p>")

    def plain(self, text: str) -> None:
        """Text as a terminal shows it."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def raw(self, html: str) -> None:
        """HTML made here, such as `figures.as_image` gives."""
        self._parts.append(html)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> None:
        """A table; ``numbers`` are the columns set flush right."""

        def cells(tag: str, row: Sequence[str]) -> str:
            return "".join(
                f"<{tag}{' class=n' if i in numbers else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(row)
            )

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
        self._parts.append(f"<table><tr>{cells('th', header)}</tr>{body}</table>")

    def picture(self, draw: Callable[[], Any], alt: str) -> None:
        """What ``draw`` draws; where matplotlib is not installed, once how to get it."""
        try:
            self.raw(figures.as_image(draw(), alt))
        except figures.MissingPlots as err:
            if not self.without_pictures:
                self.without_pictures = str(err)
                self.paragraph(f"No picture here or below: {err}", note=True)

    @property
    def text(self) -> str:
        return (
            f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{escape(self._title)}</title>"
            f"{self._head}<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(self._parts) + "\n</body></html>\n"
        )


class NoRun(Exception):
    """There is nothing to draw; the message is one line."""


def _told(events: Sequence[Mapping[str, Any]]) -> tuple[Story, list[tuple[Recovery, str]]]:
    """The whole story, and each recovery with its paragraph as it was written when it was complete."""
    story = Story()
    out: list[tuple[Recovery, str]] = []
    for event in events:
        done = story.take(event)
        if done is not None:
            out.append((done, paragraph(done, len(out) + 1, story)))
    if story.under_way is not None:
        out.append((story.under_way, "under way"))
    return story, out


def _load(run_dir: Path) -> list[dict[str, Any]]:
    events = read_events(run_dir)
    if not events:
        raise NoRun(f"no events in {run_dir}: name the run directory of a job (--run-dir of deadpool launch)")
    return events


def _add_recovery(page: Page, number: int, recovery: Recovery, text: str, moments: Any) -> None:
    line = timeline(recovery, moments)
    if not line.bars:  # the job ended with the loss
        page.paragraph(text)
        return
    page.picture(lambda: figures.timeline_figure(line, number), f"recovery {number}")
    if not line.exact and line.zero < recovery.began:
        page.paragraph("The moment of the failure is not known; detection took at most what is shown.", note=True)
    page.paragraph(text)
    rows = [("detection", seconds_text(recovery.began - line.zero), "from the failure to the coordinator's knowing")]
    rows += [(name, seconds_text(s), MEANING[name]) for name, s in recovery.durations.items() if name != "detected"]
    page.table(("phase", "took", "what is true then"), rows, numbers=(1,))


def write_timeline(run_dir: Path, out: Path) -> list[Path]:
    """Write ``recovery-N.png`` for each recovery, ``timeline.html`` and ``trace.json``; returns what was written.

    Without matplotlib there are no pictures. Raises NoRun and OSError.
    """
    events = _load(run_dir)
    moments = deaths(run_dir, events)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "trace.json"]
    written[0].write_text(strict_json(chrome_trace(events, read_node_logs(run_dir), moments)))
    _, told = _told(events)
    page = Page(f"Recoveries of {run_dir.name}")
    if not told:
        page.paragraph("There was none: nothing failed in this run.")
    for number, (recovery, text) in enumerate(told, 1):
        line = timeline(recovery, moments)
        if line.bars and not page.without_pictures:
            with contextlib.suppress(figures.MissingPlots):  # the page says so
                figures.save(figures.timeline_figure(line, number), out / f"recovery-{number}.png")
                written.append(out / f"recovery-{number}.png")
        page.heading(f"Recovery {number}")
        _add_recovery(page, number, recovery, text, moments)
    written.append(out / "timeline.html")
    written[-1].write_text(page.text)
    return written


def _marks(told: Sequence[tuple[Recovery, str]], zero: float) -> Any:
    def draw(axes: Any) -> None:
        for number, (r, _) in enumerate(told):
            label = "recovery" if number == 0 else None
            axes.axvspan(r.began - zero, r.ended - zero, color=figures.COLOURS[1], alpha=0.35, lw=0, label=label)

    return draw


def _iteration_marks(told: Sequence[tuple[Recovery, str]]) -> Any:
    def draw(axes: Any) -> None:
        marks = [r.generation for r, _ in told if r.generation is not None]
        for number, iteration in enumerate(marks):
            label = "training went on from here after a recovery" if number == 0 else None
            axes.axvline(iteration, color=figures.COLOURS[1], lw=1.2, ls="--", label=label)

    return draw


def _pace_pictures(page: Page, events: Sequence[Mapping[str, Any]], told: Sequence[tuple[Recovery, str]]) -> None:
    steps = [e for e in events if e["event"] == "iteration"]
    if not steps:
        return
    zero = events[0]["t"]
    marks = _marks(told, zero)
    at = [e["t"] - zero for e in steps]
    x = "time since the start of the job (s)"
    page.heading("Loss")
    name = next(iter(steps[0]["losses"]), "loss")
    losses = (next(iter(e["losses"].values()), None) for e in steps)
    loss = [math.nan if value is None else value for value in losses]
    series = [(name, [e["iteration"] for e in steps], loss)]
    at_iterations = _iteration_marks(told)
    page.picture(lambda: figures.line_figure(series, "iteration", name, "Loss", at_iterations, from_zero=False), "loss")
    page.heading("Pace")
    pace = [("one iteration", at, [e["seconds"] for e in steps])]
    page.picture(
        lambda: figures.line_figure(pace, x, "seconds", "Length of an iteration", marks), "length of an iteration"
    )
    blocked = [100 * e.get("blocked_s", 0.0) / e["seconds"] if e["seconds"] else 0.0 for e in steps]
    title = "Share of an iteration that training was blocked on DeadPool"
    page.picture(
        lambda: figures.line_figure([("blocked", at, blocked)], x, "percent", title, marks),
        "share of an iteration blocked",
    )
    quiet = [b for b, e in zip(blocked, steps, strict=True) if e["iteration"] > 0]
    if quiet:
        page.paragraph(
            f"{len(steps)} iterations reported; median {seconds_text(statistics.median(e['seconds'] for e in steps))}; "
            f"blocked on DeadPool: mean {statistics.mean(quiet):.2f} %, median {statistics.median(quiet):.2f} %, "
            f"most {max(quiet):.2f} % (all iterations but the very first, nothing trimmed)."
        )


def _commit_picture(page: Page, lines: Sequence[Mapping[str, Any]], zero: float, marks: Any) -> None:
    shards = [x for x in lines if x["event"] == "shard"]
    if not shards:
        return
    page.heading("Snapshots and commits")
    series = []
    for node in sorted({x["node"] for x in shards})[: len(figures.COLOURS)]:
        mine = sorted((x for x in shards if x["node"] == node), key=lambda x: x["stored"])
        xs = [x["stored"] - zero for x in mine]
        series.append((f"node {node}", xs, [1e3 * (x["stored"] - x["opened"]) for x in mine]))
    title = "From a snapshot's first byte until its shard is in two vaults"
    x = "time since the start of the job (s)"
    page.picture(
        lambda: figures.line_figure(series, x, "milliseconds", title, marks, height=3.0, line=""), "time to commit"
    )
    times = [x["stored"] - x["opened"] for x in shards]
    page.paragraph(
        f"{len(shards)} shards of {min(x['bytes'] for x in shards):,} to {max(x['bytes'] for x in shards):,} bytes; "
        f"median {seconds_text(statistics.median(times))}, most {seconds_text(max(times))}."
    )


def write_report(run_dir: Path, out: Path) -> Path:
    """Write the one page of a run, without matplotlib one without pictures. Raises NoRun and OSError."""
    text = report_text(run_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    return out


def report_text(run_dir: Path, head: str = "") -> str:
    """That page; ``head``: more HTML for its head. Raises NoRun."""
    events = _load(run_dir)
    lines = list(read_node_logs(run_dir))
    moments = deaths(run_dir, events)
    story, told = _told(events)
    page = Page(f"DeadPool run {run_dir.name}", head)
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(events[0]["t"]))
    ended = story.ended
    try:
        view: JobView | None = JobView(run_dir)
    except NoStatus as err:
        view, why_not = None, str(err)
    how = f"ended without a word: {view.gone}" if view is not None and view.gone else "still running"
    if ended is not None:
        how = f"{ended['event']}, exit code {ended.get('code', 0)}"
        how += f": {ended['message']}" if ended.get("message") else ""
    advice = what_to_do(ended.get("code", 0)) if ended is not None else ""
    started = next((e for e in events if e["event"] == "started"), {})
    machines = list(dict.fromkeys(filter(None, story.names.values())))
    page.table(
        ("", ""),
        [
            ("started", when),
            ("length", seconds_text(events[-1]["t"] - events[0]["t"])),
            ("end", how),
            *([("next", advice)] if advice else []),
            *([("command", shlex.join(command))] if (command := started.get("command")) else []),
            *([("versions", ", ".join(f"{k} {v}" for k, v in started["versions"].items()))] if command else []),
            *([("machines", ", ".join(machines))] if machines else []),
            ("last iteration", str(story.iteration)),
            ("newest committed generation", str(story.committed)),
            ("recoveries", str(len(told))),
        ],
    )
    if view is not None:
        console = Console(width=100, no_color=True, highlight=False)
        with console.capture() as shown:
            console.print(view.render(console))
        page.heading("Status")
        page.plain(shown.get())
    else:
        page.paragraph(why_not, note=True)
    page.heading(f"Recoveries: {count_text(len(told), 'recovery').replace('recoverys', 'recoveries')}")
    if not told:
        page.paragraph("Nothing failed in this run.")
    for number, (recovery, text) in enumerate(told, 1):
        _add_recovery(page, number, recovery, text, moments)
    _pace_pictures(page, events, told)
    _commit_picture(page, lines, events[0]["t"], _marks(told, events[0]["t"]))
    doctor = run_dir / "doctor.txt"
    if doctor.exists():
        page.heading("Doctor")
        page.plain(doctor.read_text(errors="replace"))
    page.heading("Events")
    notable = [e for e in events if e["event"] not in ("iteration", "committed", "step")]
    page.plain("\n".join(event_line(e, 120) for e in notable))
    trace = base64.b64encode(strict_json(chrome_trace(events, lines, moments)).encode()).decode()
    page.raw(
        f'<p><a download="trace.json" href="data:application/json;base64,{trace}">trace.json</a> '
        "opens in ui.perfetto.dev or chrome://tracing.</p>"
    )
    return page.text
