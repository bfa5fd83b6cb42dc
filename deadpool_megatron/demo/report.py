"""The tables after both runs: recovery by phases, survivors' processes, losses side by side, hashes, the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from deadpool_megatron.demo.evidence import Evidence, Step, compare, hash_pairs
from deadpool_megatron.observe.narrative import ranks_text, seconds_text
from deadpool_megatron.observe.recoveries import Recovery
from deadpool_megatron.observe.tables import new_table, phases_table

_MOST_DIFFERENCES = 10
_DIGITS = 8  # of a digest: six parts of them fit into 80 columns


def show_recovery(
    console: Console, recovery: Recovery, died: float, first_after: tuple[int, float], usual_s: float
) -> float:
    """The way back, phase by phase.

    Args:
        died: unix seconds at which the victim's agent was seen dead.
        first_after: the first iteration completed after it, and when.
        usual_s: what an undisturbed iteration of the same run takes.

    Returns:
        Seconds from the death to the end of that iteration, beyond the normal time of one.
    """
    iteration, when = first_after
    disturbance = when - died - usual_s
    sources = ", ".join(f"rank {rank} from node {node}" for rank, node in sorted(recovery.sources.items()))
    _caption(console, "the recovery, timed from the moment the node was seen dead")
    console.print(phases_table(console, recovery, died, [("redone", f"iteration {iteration} is complete", when)]))
    generation = recovery.generation or 0
    _line(console, f"resumed from iteration {generation} (Megatron's log counts from 1 and prints {generation + 1})")
    _line(console, f"lost shards came from peers' vaults: {sources or 'none were needed'}")
    _line(console, f"{recovery.groups} process groups a rank; re-formed in place: {_formed(recovery)}")
    _line(
        console,
        f"death to first iteration: {seconds_text(when - died)}, {seconds_text(disturbance)} beyond a normal one "
        f"({seconds_text(usual_s)})",
    )
    return disturbance


def _formed(recovery: Recovery) -> str:
    if recovery.formed is None:
        return "all"
    changed, of = recovery.formed
    return f"{changed} of all ranks' {of}, the others had not changed"


def _line(console: Console, text: str, style: str = "") -> None:
    """A sentence: never wrapped, so that it stays one line wherever it is copied to."""
    console.print(Text(text, style), soft_wrap=True)


def _caption(console: Console, text: str) -> None:
    console.print()
    _line(console, text, "bold")


def _mark(same: bool) -> Text:
    return Text("equal", "green") if same else Text("DIFFERS", "bold red")


def _processes(console: Console, evidence: Evidence) -> None:
    _caption(console, "the survivors' processes, by id and time of creation")
    table = new_table(console)
    for name in ("rank", "pid before", "pid after", ""):
        table.add_column(name, justify="right" if name else "left")
    for rank, before in sorted(evidence.before.items()):
        after = evidence.after.get(rank)
        cells = [str(p.pid) if p is not None else "not seen" for p in (before, after)]
        table.add_row(str(rank), *cells, _mark(before is not None and before == after))
    console.print(table)


def _losses(console: Console, evidence: Evidence, redone: int | None) -> None:
    _caption(console, "loss by iteration, all digits")
    table = new_table(console)
    for name in ("iteration", "undisturbed", "node killed", "same?"):
        table.add_column(name, justify="right" if name == "iteration" else "left", no_wrap=True)
    table.add_column("")
    reference = {step.iteration: step for step in evidence.undisturbed}
    for iteration in range(evidence.expected):
        want = reference.get(iteration)
        done: list[Step | None] = [s for s in evidence.disturbed if s.iteration == iteration]
        for step in done or [None]:
            note = f"redone, epoch {step.epoch}" if step and step.epoch and iteration == redone else ""
            if step is None and iteration in evidence.mute:
                table.add_row(str(iteration), want.loss if want else "-", "-", "", "report lost")
                continue
            same = want is not None and step is not None and want.exact == step.exact
            table.add_row(str(iteration), want.loss if want else "-", step.loss if step else "-", _mark(same), note)
    console.print(table)


def _hashes(console: Console, evidence: Evidence) -> None:
    pairs = hash_pairs(evidence)
    parts = list(dict.fromkeys(part for _, part, _, _ in pairs))
    _caption(console, "SHA-256 of the state at the end, first digits (of both where they differ)")
    table = new_table(console)
    table.add_column("rank", justify="right")
    for part in parts:
        table.add_column(part, no_wrap=True)
    for rank in dict.fromkeys(rank for rank, _, _, _ in pairs):
        cells = {part: (left, right) for r, part, left, right in pairs if r == rank}
        row = []
        for part in parts:
            left, right = cells.get(part, (None, None))
            if left is not None and left == right:
                row.append(Text(left[:_DIGITS], "green"))
            else:
                row.append(Text(f"{(left or 'none')[:_DIGITS]}\n{(right or 'none')[:_DIGITS]}", "bold red"))
        table.add_row(rank, *row)
    equal = sum(left is not None and left == right for _, _, left, right in pairs)
    console.print(table)
    _line(console, f"{equal} of {len(pairs)} digests equal")
    console.print()


def show_evidence(console: Console, evidence: Evidence, redone: int | None) -> None:
    """Everything that is compared, side by side. ``redone`` is the iteration that was done again."""
    _processes(console, evidence)
    _losses(console, evidence, redone)
    _hashes(console, evidence)


def show_verdict(
    console: Console, evidence: Evidence, recovery: Recovery, killed_in: int, disturbance_s: float
) -> bool:
    """One line, after a line for each difference; True when nothing differs. ``killed_in`` is the iteration."""
    differences = compare(evidence)
    for line in differences[:_MOST_DIFFERENCES]:
        _line(console, line, "red")
    if len(differences) > _MOST_DIFFERENCES:
        _line(console, f"... and {len(differences) - _MOST_DIFFERENCES} differences more", "red")
    lost = f"node {ranks_text(recovery.lost)} lost in iteration {killed_in}, resumed from {recovery.generation}"
    if differences:
        _line(console, f"DIFFERENT: {lost}; {len(differences)} things are not as undisturbed", "bold red")
        return False
    _line(
        console,
        f"EQUAL: {lost}; {evidence.expected} losses, {len(hash_pairs(evidence))} SHA-256 and {len(evidence.before)} "
        f"surviving processes as undisturbed; {seconds_text(disturbance_s)} of time lost",
        "bold green",
    )
    return True


def usual_seconds(seconds: Sequence[float]) -> float:
    """The normal time of one iteration: the median without the first, which warms up."""
    return statistics.median(seconds[1:] or seconds)
