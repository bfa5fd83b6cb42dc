"""`deadpool status`: what a job is doing, once or again and again."""

from __future__ import annotations

import contextlib
import os
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
from deadpool_megatron.observe.rundir import STATUS, EventTail, NotWhole, read_whole
from deadpool_megatron.observe.screen import Node, compose, named, nodes_of, waits_for
from deadpool_megatron.observe.strict_json import strict_json
from deadpool_megatron.observe.tables import grid_table, make_console, nodes_table, phases_table

_NEEDED: Final = ("t", "phase", "epoch", "iteration", "generation", "nodes", "coordinates", "spares")
_SHOWN_EVENTS = 15
_MOST_DRAINS: Final = 3  # lines
_PLAIN_HEIGHT = 50  # lines, where there is no terminal
_ALARMS: Final = ("straggler", "damaged", "unlike", "no_room", "durable_failed", "durable_taken", "worker_error")
_REFRESH_S = 0.25
# Seconds without a new status after which a coordinator whose process is not there is gone, and any other one too.
_GONE_S: Final = (10.0, 120.0)
_CLOCKS_S: Final = 24 * 3600.0  # the clocks of two hosts differ by less, whatever time zone one was set to
_QUIET: Final = frozenset({"iteration", "committed", "step", "evaluation"})
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


def _alive(pid: Any) -> bool:
    """A process of this machine has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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
        self.status: dict[str, Any] = {}
        self.nodes: list[Node] = []
        self._tail = EventTail(run_dir)
        self._begin()
        self._written = 0  # when the status was, in nanoseconds
        self._same_since = time.monotonic()  # as far as this view has looked
        self._seen_to_change = False
        self.refresh()

    def _begin(self) -> None:
        """Nothing is known of a run yet."""
        self.story = Story()
        self.last: deque[dict[str, Any]] = deque(maxlen=_SHOWN_EVENTS)
        self.alarms: dict[str, dict[str, Any]] = {}  # the last event of each kind that is one, oldest first

    def refresh(self) -> bool:
        """Read the status and what is new of the events; whether anything was."""
        path = self.run_dir / STATUS
        try:
            written = path.stat().st_mtime_ns
            changed = written != self._written
            if changed:
                self.status = read_whole(path, _NEEDED)
                self.nodes = nodes_of(self.status)
                self._seen_to_change = self._written > 0
                self._written, self._same_since = written, time.monotonic()
        except NotWhole as err:
            raise NoStatus(str(err)) from None
        except OSError as err:
            raise NoStatus(f"no status at {path}: {err.strerror}; name a job's directory with --run-dir") from None
        run = self._tail.inode
        events = self._tail.read()
        if run != self._tail.inode:
            self._begin()
        for event in events:
            changed = True
            self.story.take(event)
            if event["event"] in _ALARMS:
                self.alarms.pop(event["event"], None)
                self.alarms[event["event"]] = event
            if event["event"] not in _QUIET:
                self.last.append(event)
        return changed

    @property
    def over(self) -> bool:
        """The job has ended, or nobody is left who would write its status."""
        return bool(self.status["phase"] == "ended") or bool(self.gone)

    @property
    def silent_s(self) -> float:
        """Seconds since the coordinator wrote the status; while it lives it does so every few seconds.

        By the clock, but for one on another host, where the clock may be another, as soon as it was seen to do so.
        """
        if self._seen_to_change and not self._is_here:
            return time.monotonic() - self._same_since
        return max(0.0, time.time() - float(self.status["t"]))

    @property
    def _is_here(self) -> bool:
        return bool(self.status.get("coordinator_host", "") == socket.gethostname())

    @property
    def overdue(self) -> bool:
        """The status should have been written again long since."""
        return self.silent_s > 2 * _GONE_S[0] + 2 * float(self.status.get("again_s", 0.0))

    @property
    def gone(self) -> str:
        """Why the job is over though it has not said so, in words; empty while it may live."""
        pid, host = self.status.get("coordinator_pid"), self.status.get("coordinator_host", "")
        if self.status["phase"] == "ended" or self.silent_s < _GONE_S[0]:
            return ""
        known = pid is not None and self._is_here
        by_clock = self._is_here or self.silent_s > _CLOCKS_S
        silent_s = self.silent_s if by_clock else time.monotonic() - self._same_since
        if (known and not _alive(pid)) or (self.overdue and silent_s > _GONE_S[1]):
            where = f"process {pid} on {host or 'an unknown host'}"
            return f"its coordinator ({where}) has not written for {_age(self.silent_s)}"
        return ""

    def protection(self) -> str:
        """How much may be lost now, in words."""
        if not self.status.get("deadpool", True):
            return "none: the job runs without --deadpool"
        said = self.status.get("protection")
        if isinstance(said, Mapping) and said.get("groups"):
            now, full = said["survives_now"], said["survives_when_full"]
            text = f"any {count_text(now, 'node')} may be lost now" if now else "no node may be lost now"
            if not said["full"]:
                back = said["not_covered_yet"]
                who = f"nodes {ranks_text(back)} have their" if len(back) > 1 else f"node {ranks_text(back)} has its"
                text += f" (any {full} once {who} copies back)"
            return f"{text}; when fully redundant: {said['tolerated']}"
        if self.story.committed_epoch < self.status["epoch"] or self.status["generation"]["committed"] < 0:
            return "not complete: no generation of this epoch is committed yet"
        return "none: one node has all copies (--alone)"

    def as_json(self) -> dict[str, Any]:
        """The status with what the events add: pace, protection, recoveries, last events."""
        return {
            **self.status,
            "pace_s": self.story.pace_s,
            "protection": self.status.get("protection") or {"text": self.protection()},
            "recoveries": [asdict(r) for r in self._known()],
            "last_events": list(self.last),
        }

    # ---- for people

    def screen(self, width: int, height: int) -> RenderableType:
        """What fits on a terminal of so many columns and lines; see `observe.screen`."""
        events = [Text(event_line(e, width)) for e in self.last]
        # (of a job that is over nobody trains, and no spare is of use)
        nodes = [n for n in self.nodes if n.state in ("lost", "left")] if self.over else self.nodes
        return Group(*compose(self._head(), self._alarms(), nodes, events, width, height))

    def render(self, console: Console) -> RenderableType:
        """All of it, as long as it gets, for a file or a pager."""
        known = self._known()
        parts: list[RenderableType] = [*self._head(), *self._alarms()]
        if not self.over:
            parts += [Text(line) for line in snapshot_lines(self.status.get("snapshot"))]
        grid = grid_table(console, self.status, moved={rank for r in known for rank in r.replaced})
        if grid is not None:
            parts += [Text(), grid]
        parts += [Text(), nodes_table(console, self.status, self.over)]
        if known:
            parts += [Text(), *self._last_recovery(console, known[-1], len(known))]
        if self.last:
            parts += [Text(), Text("last events", "bold")]
            parts += [Text(event_line(e, console.width), no_wrap=True) for e in self.last]
        return Group(*parts)

    def _known(self) -> list[Recovery]:
        return [*self.story.recoveries, *([self.story.under_way] if self.story.under_way else [])]

    def _head(self) -> list[Text]:
        out = [self._headline()]
        end = self.status.get("end") or {}
        if self.gone:
            out.append(Text(f"{self.gone}: it was killed, or its machine is gone", "red"))
        if end.get("code"):
            out += [Text(line, "red") for line in [*end["message"].splitlines(), what_to_do(end["code"])] if line]
        if not self.over:
            full = (self.status.get("protection") or {}).get("full", True)
            out.append(Text(f"protection: {self.protection()}", "" if full else "yellow"))
            out.append(self._spares())
            out += [Text(line) for line in self.status.get("covered", ())]
            for drain in self.status.get("drains", ())[:_MOST_DRAINS]:
                out.append(Text(f"being drained: node {drain['node']}: {drain['state']}", "magenta"))
        if known := self._known():
            out += self._in_short(known[-1], len(known))
        return out

    def _headline(self) -> Text:
        status = self.status
        # The events are written at once, the status of a busy coordinator seconds later.
        iteration = max(status["iteration"], self.story.iteration)
        committed = max(status["generation"]["committed"], self.story.committed)
        end = status.get("end") or {}
        line = Text()
        if self.gone:
            line.append("ended without a word", "bold red")
        elif self.over:
            line.append("ended", "bold red" if end.get("code") else "bold green")
            line.append(f", exit code {end['code']}" if end else "", "bold red" if end.get("code") else "bold green")
        else:
            recovers = self.story.under_way is not None
            line.append(status["phase"], "bold red" if recovers else "bold green" if iteration >= 0 else "bold")
        line.append(f", epoch {status['epoch']}")
        width, full = status.get("replicas") or (0, 0)
        line.append(f", {width} of {full} replicas" if width < full else "", "yellow")
        line.append(f", last iteration {iteration}" if iteration >= 0 else ", no iteration yet")
        if self.story.pace_s is not None and not self.over:
            line.append(f", {seconds_text(self.story.pace_s)} each")
        line.append(f", committed generation {committed}" if committed >= 0 else ", nothing committed yet")
        durable = status["generation"].get("durable", -1)
        return line.append(f", durable generation {durable}" if durable >= 0 else "")

    def _spares(self) -> Text:
        ready = [n for n in self.nodes if n.state == "spare"]
        cold = [n for n in self.nodes if n.state == "starting"]
        words = [f"{count_text(len(ready), 'spare')} parked warm ({named(ready)})"] if ready else []
        words += [f"{count_text(len(cold), 'spare')} starting ({named(cold)})"] if cold else []
        ranks = {rank for spare in self.status["spares"] for rank in spare.get("rehearsed", ())}
        words += [f"{ranks_text(ranks)} rehearsed"] if ranks else []
        to_be = {(spare["node"], rank) for spare in self.status["spares"] for rank in spare.get("rehearses", ())}
        begun = {rank for _, rank in to_be - self._unrehearsed.keys()} - ranks
        words += [f"{ranks_text(begun)} to be rehearsed"] if begun else []
        none = "none left: bring one (deadpool join)" if self.status["epoch"] else "none"
        standbys = sum(len(node.get("standbys", ())) for node in self.status["nodes"])
        beside = f"; a process stands by for {standbys} of {len(self.status['coordinates'])} workers" * bool(standbys)
        style = "" if words or not self.status["epoch"] else "yellow"
        return Text(f"spares: {', '.join(words) or none}{beside}", style)

    @property
    def _unrehearsed(self) -> dict[tuple[int, int], str]:
        """By spare and rank, why it could not set that up."""
        spares = self.status["spares"]
        return {(s["node"], int(rank)): why for s in spares for rank, why in s.get("unrehearsed", {}).items()}

    def _in_short(self, last: Recovery, count: int) -> list[Text]:
        """The last recovery in two lines."""
        when = time.strftime("%H:%M:%S", time.localtime(last.began))
        out = [Text(f"last recovery (of {count}), {when}: {last.what}; {_how(last)}", "" if last.end else "bold red")]
        durations = {name: s for name, s in last.durations.items() if name != "detected"}
        if last.end is None:
            late = waits_for(self.nodes)
            whom = f", waits for {named(late)}" if late else ""
            following = _following(last)
            out.append(
                Text(f"  under way for {_age(time.time() - last.began)}, on the way to {following}{whom}", "red")
            )
        elif durations:
            steps = ", ".join(f"{name} {seconds_text(s)}" for name, s in durations.items())
            out.append(Text(f"  {seconds_text(last.ended - last.first_sign)} in all: {steps}"))
        return out

    def _alarms(self) -> list[Text]:
        """What is not as it should be, most important first."""
        out: list[Text] = []
        if self.over:
            return out
        if self.overdue:
            by = "" if self._seen_to_change or self._is_here else " by this host's clock"
            out.append(Text(f"nothing new for {_age(self.silent_s)}{by}: does the coordinator run?", "bold red"))
        if behind := self.status.get("behind"):
            lost = f"{count_text(behind['iterations'], 'iteration')}, {seconds_text(behind['seconds'])}"
            out.append(
                Text(f"protection is behind: a loss would cost {lost} of training: {behind['cause']}", "bold red")
            )
        gone = [n for n in self.nodes if n.state == "lost"]
        if gone:
            out.append(Text(f"lost: {named(gone)}", "red"))
        unfit = {spare["node"]: spare["unfit"] for spare in self.status["spares"] if spare.get("unfit")}
        if failing := [n for n in self.nodes if n.number in unfit]:
            why = unfit[failing[0].number]
            out.append(Text(f"failed the last check, and taken last: {named(failing)}: {why}", "yellow"))
        if failed := self._unrehearsed:
            (node, rank), why = min(failed.items())
            others = f", {count_text(len(failed) - 1, 'other')} likewise" * (len(failed) > 1)
            out.append(Text(f"could not be rehearsed: rank {rank} by node {node}: {why}{others}", "yellow"))
        refused = self.status.get("refused") or {}
        if strange := int(refused.get("malformed", 0)) + sum((refused.get("vaults") or {}).values()):
            out.append(Text(f"{strange} packets or copies were refused: is anybody else on this network?", "yellow"))
        return out + [Text(event_line(e, 200), "yellow") for e in reversed(self.alarms.values())]

    def _last_recovery(self, console: Console, last: Recovery, count: int) -> list[RenderableType]:
        after: list[tuple[str, str, float]] = []
        if last.end is None:
            after.append(("...", f"on the way to {_following(last)}", time.time()))
        elif last.redone is not None:
            after.append(("redone", f"iteration {last.redone_iteration} is complete", last.redone))
        title = Text(f"last recovery (of {count}): {last.what}; {_how(last)}", "bold")
        return [title, phases_table(console, last, last.began, after)]


def _how(r: Recovery) -> str:
    return {
        None: "under way",
        "resumed": f"resumed from iteration {r.generation}",
        "shrunk": f"{r.replicas[0]} of {r.replicas[1]} replicas went on from iteration {r.generation}",
        "grown": f"{r.replicas[0]} instead of {r.replicas[1]} replicas went on from iteration {r.generation}",
        "saved": f"a checkpoint of iteration {r.generation} was saved, the job ended",
        "stopped": "the job ended",
        "started_over": "the job began anew",
    }[r.end]


def _following(r: Recovery) -> str:
    """The phase that a recovery under way comes to next."""
    reached = [name for name in PHASES if name in r.times]
    return PHASES[min(PHASES.index(reached[-1]) + 1, len(PHASES) - 1)] if reached else PHASES[0]


def show_status(run_dir: str, as_json: bool, watch: bool, detail: bool = False) -> None:
    """Print the status; with ``watch`` until the job ends (or Ctrl-C). Raises NoStatus."""
    view = JobView(run_dir)
    if as_json:
        while True:
            print(strict_json(view.as_json(), indent=None if watch else 1), flush=True)
            if not watch or view.over:
                return
            time.sleep(1.0)
            view.refresh()
    console = make_console()
    height = console.height - 1 if console.is_terminal else _PLAIN_HEIGHT
    if detail:
        os.environ.setdefault("LESS", "-R")  # colours
        with console.pager(styles=True) if console.is_terminal else contextlib.nullcontext():
            console.print(view.render(console))
        return
    if not watch:
        console.print(view.screen(console.width, height))
        return
    if not console.is_terminal:
        # Nothing can be redrawn here: the status as it is, then each event as it comes.
        console.print(view.screen(console.width, height))
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
        for line in view._head():
            console.print(line)
        return
    with Live(view.screen(*console.size), console=console, screen=True, auto_refresh=False) as live:
        drawn = 0.0
        while not view.over:
            time.sleep(_REFRESH_S)
            if view.refresh() or time.monotonic() - drawn > 1.0:  # times go on
                live.update(view.screen(*console.size), refresh=True)
                drawn = time.monotonic()
    console.print(view.screen(console.width, console.height - 1))
    sys.stdout.flush()
