"""`deadpool status`: what a job is doing, once or again and again."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from deadpool_megatron.cluster.records.exits import what_to_do
from deadpool_megatron.observe.narrative import count_text, ranks_text, seconds_text
from deadpool_megatron.observe.recoveries import PHASES, Recovery, Story
from deadpool_megatron.observe.rundir import STATUS, EventTail
from deadpool_megatron.observe.tables import grid_table, make_console, nodes_table, phases_table

_SHOWN_EVENTS = 6
_REFRESH_S = 0.25
# Seconds without a new status after which a coordinator whose process is not there is gone, and any other one too.
_GONE_S: Final = (10.0, 120.0)
_QUIET: Final = frozenset({"iteration", "committed", "step", "evaluated", "logged"})
_WORDS: Final = ("node", "ranks", "cause", "reason", "iteration", "message", "directory", "code", "advice", "fault")


class NoStatus(Exception):
    """There is no job to show; the message is one line."""


def event_line(event: Mapping[str, Any], columns: int = 80) -> str:
    """One event in one line: time, name, and what it says that matters to a person."""
    when = time.strftime("%H:%M:%S", time.localtime(event["t"]))
    parts: list[str] = []
    for name in _WORDS:
        value = event.get(name)
        if value is None or value in ("", []):
            continue
        text = ranks_text(value) if name == "ranks" else str(value).splitlines()[0]
        parts.append(text if name in ("cause", "reason", "message") else f"{name} {text}")
    line = f"{when}  {event['event']:<10} {', '.join(parts)}".rstrip()
    return line if len(line) <= columns else line[: columns - 3] + "..."


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def snapshot_lines(said: Mapping[str, Any] | None) -> list[str]:
    """A line of what a generation takes, and one of what it costs and is worth; none before the first iteration.

    Times and bytes are those of the coordinate that reports losses, medians over the last iterations where one value
    would mislead.
    """
    if not said or not said.get("planned_bytes"):
        return []
    planned = f"{_bytes(said['planned_bytes'])} a generation over all coordinates"
    if said["expected_bytes"]:
        planned += f" ({100 * (said['planned_bytes'] / said['expected_bytes'] - 1):+.2f} % of the arithmetic)"
    if said["copied_bytes"] is None:
        return [f"snapshots: {planned}"]
    moved = f"last one here: {_bytes(said['copied_bytes'])} copied at {_bytes(said['copy_bandwidth'])}/s"
    if said["sent_bytes"]:
        moved += f", {_bytes(said['sent_bytes'])} sent at {_bytes(said['send_bandwidth'])}/s"
    lines = [f"snapshots: {planned}; {moved}"]
    worth = f"blocked {seconds_text(said['blocked_s'])}, stalled {seconds_text(said['stall_s'])} on the host and "
    worth += f"{seconds_text(said['device_stall_s'])} on the device; {said['skipped_generations']} skipped so far"
    if said["commit_share"] is not None:
        worth += (
            f"; committed after {said['commit_share']:.2f} of an iteration, so a loss costs "
            f"{said['expected_lost_iterations']:.2f} iterations ({seconds_text(said['expected_lost_s'])}) on average"
        )
    return [*lines, worth]


class JobView:
    """A job as its run directory shows it; `refresh` looks again. Raises NoStatus when there is none."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.story = Story()
        self.status: dict[str, Any] = {}
        self.last: deque[dict[str, Any]] = deque(maxlen=_SHOWN_EVENTS)
        self._tail = EventTail(run_dir)
        self.refresh()

    def refresh(self) -> None:
        """Read the status and what is new of the events."""
        path = self.run_dir / STATUS
        try:
            self.status = json.loads(path.read_text())
        except OSError as err:
            raise NoStatus(f"no status at {path}: {err.strerror}") from None
        for event in self._tail.read():
            self.story.take(event)
            if event["event"] not in _QUIET:
                self.last.append(event)

    @property
    def over(self) -> bool:
        """The job has ended, or nobody is left who would write its status."""
        return bool(self.status["phase"] == "ended") or bool(self.gone)

    @property
    def silent_s(self) -> float:
        """Seconds since the coordinator wrote the status; while it lives it does so every few seconds."""
        return max(0.0, time.time() - float(self.status["t"]))

    @property
    def gone(self) -> str:
        """Why the job is over though it has not said so, in words; empty while it may live."""
        pid, host = self.status.get("coordinator_pid"), self.status.get("coordinator_host", "")
        if self.status["phase"] == "ended" or self.silent_s < _GONE_S[0]:
            return ""
        known = pid is not None and host == socket.gethostname()
        if (known and not Path(f"/proc/{pid}").exists()) or self.silent_s > _GONE_S[1]:
            where = f"process {pid} on {host or 'an unknown host'}"
            return f"its coordinator ({where}) has not written for {_age(self.silent_s)}"
        return ""

    def protection(self) -> str:
        """How much may be lost now, in words."""
        said = self.status.get("protection")
        if isinstance(said, Mapping) and said.get("groups"):
            now, full = said["survives_now"], said["survives_when_full"]
            text = f"any {count_text(now, 'node')} may be lost now" if now else "no node may be lost now"
            if not said["full"]:
                text += f" (any {full} once node {ranks_text(said['not_covered_yet'])} has its copies back)"
            return f"{text}; when fully redundant: {said['tolerated']}"
        if self.story.committed_epoch < self.status["epoch"] or self.status["generation"]["committed"] < 0:
            return "not complete: no generation of this epoch is committed yet"
        return "every shard is in two vaults; any one node may be lost"

    def as_json(self) -> dict[str, Any]:
        """The status with what the events add: pace, protection, recoveries, last events."""
        known = [*self.story.recoveries, *([self.story.under_way] if self.story.under_way else [])]
        return {
            **self.status,
            "pace_s": self.story.pace_s,
            "protection": self.status.get("protection") or {"text": self.protection()},
            "recoveries": [asdict(r) for r in known],
            "last_events": list(self.last),
        }

    # ---- for people

    def render(self, console: Console) -> RenderableType:
        """All of it, for a terminal or for a file."""
        known = [*self.story.recoveries, *([self.story.under_way] if self.story.under_way else [])]
        parts: list[RenderableType] = [*self._summary()]
        grid = grid_table(console, self.status, moved={rank for r in known for rank in r.replaced})
        if grid is not None:
            parts += [Text(), grid]
        parts += [Text(), nodes_table(console, self.status)]
        if known:
            parts += [Text(), *self._last_recovery(console, known[-1], len(known))]
        if self.last:
            parts += [Text(), Text("last events", "bold")]
            parts += [Text(event_line(e, console.width), no_wrap=True) for e in self.last]
        return Group(*parts)

    def _summary(self) -> list[Text]:
        status = self.status
        # The events are written at once, the status of a busy coordinator seconds later.
        iteration = max(status["iteration"], self.story.iteration)
        committed = max(status["generation"]["committed"], self.story.committed)
        first = Text()
        if self.gone:
            first.append("ended without a word", "bold red")
        else:
            first.append(status["phase"], "bold red" if self.story.under_way else "bold")
        end = status.get("end") or {}
        if self.over and end:
            first.append(f", exit code {end['code']}", "bold red" if end["code"] else "bold green")
        first.append(f", epoch {status['epoch']}")
        first.append(f", last iteration {iteration}" if iteration >= 0 else ", no iteration yet")
        first.append(f", committed generation {committed}" if committed >= 0 else ", nothing committed yet")
        durable = status["generation"].get("durable", -1)
        if durable >= 0:
            first.append(f", durable generation {durable}")
        out = [first]
        if self.gone:
            out.append(Text(f"{self.gone}: it was killed, or its machine is gone", "red"))
        if end.get("code"):
            out += [Text(line, "red") for line in [*end["message"].splitlines(), what_to_do(end["code"])]]
        if self.over:
            return out
        if self.story.pace_s is not None:
            out.append(Text(f"pace: {seconds_text(self.story.pace_s)} an iteration"))
        out.append(Text(f"protection: {self.protection()}"))
        if behind := status.get("behind"):
            lost = f"{count_text(behind['iterations'], 'iteration')}, {seconds_text(behind['seconds'])}"
            out.append(
                Text(f"protection is behind: a loss would cost {lost} of training: {behind['cause']}", "bold red")
            )
        out += [Text(line) for line in snapshot_lines(status.get("snapshot"))]
        ready = [s["node"] for s in status["spares"] if s["state"] == "parked"]
        cold = [s["node"] for s in status["spares"] if s["state"] != "parked"]
        words = [f"{count_text(len(ready), 'spare')} parked warm"] if ready else []
        words += [f"{count_text(len(cold), 'spare')} starting"] if cold else []
        out.append(Text(f"spares: {', '.join(words) or ('none left' if status['epoch'] else 'none')}"))
        if self.silent_s > 2 * _GONE_S[0]:
            out.append(Text(f"nothing new for {_age(self.silent_s)}: does the coordinator run?", "yellow"))
        return out

    def _last_recovery(self, console: Console, last: Recovery, count: int) -> list[RenderableType]:
        how = {
            None: "under way",
            "resumed": f"resumed from iteration {last.generation}",
            "saved": f"a checkpoint of iteration {last.generation} was saved, the job ended",
            "stopped": "the job ended",
        }[last.end]
        after: list[tuple[str, str, float]] = []
        if last.end is None:
            reached = [name for name in PHASES if name in last.times]
            following = PHASES[min(PHASES.index(reached[-1]) + 1, len(PHASES) - 1)] if reached else PHASES[0]
            after.append(("...", f"on the way to {following}", time.time()))
        elif last.redone is not None:
            after.append(("redone", f"iteration {last.redone_iteration} is complete", last.redone))
        title = Text(f"last recovery (of {count}): {last.what}; {how}", "bold")
        return [title, phases_table(console, last, last.began, after)]


def show_status(run_dir: str, as_json: bool, watch: bool) -> None:
    """Print the status; with ``watch`` until the job ends (or Ctrl-C). Raises NoStatus."""
    view = JobView(run_dir)
    if as_json:
        while True:
            print(json.dumps(view.as_json(), indent=None if watch else 1), flush=True)
            if not watch or view.over:
                return
            time.sleep(1.0)
            view.refresh()
    console = make_console()
    if not watch:
        console.print(view.render(console))
        return
    if not console.is_terminal:
        # Nothing can be redrawn here: the status as it is, then each event as it comes.
        console.print(view.render(console))
        shown = view.last[-1] if view.last else None
        while not view.over:
            time.sleep(_REFRESH_S)
            view.refresh()
            fresh = list(view.last)
            if shown is not None and shown in fresh:
                fresh = fresh[fresh.index(shown) + 1 :]
            for event in fresh:
                print(event_line(event), flush=True)
                shown = event
        return
    with Live(view.render(console), console=console, screen=True, auto_refresh=False) as live:
        while not view.over:
            time.sleep(_REFRESH_S)
            view.refresh()
            live.update(view.render(console), refresh=True)
    console.print(view.render(console))
    sys.stdout.flush()
