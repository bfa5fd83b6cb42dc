"""What the steps have found, as a page of docs/measurements and as the GPU column of docs/evaluation.md."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from deadpool_bench.paths import ROOT

BEGIN: Final = "<!-- gpu: the last column is written by scripts/gpu_kit.sh report -->\n"
END: Final = "<!-- end of gpu -->\n"
NOT_RUN: Final = "not run"
_CELLS: Final = 5  # of a line of the table when it is cut at its bars
_TOY: Final = "[overhead.md](measurements/overhead.md)"
# What a check of the kit proves, and what proves it on CPUs.
CLAIMS: Final[Mapping[str, tuple[str, str]]] = {
    "tests-gpu": ("the tests of `tests/gpu` pass", "skipped there"),
    "copies": ("copies into the vault reach 0.9 of what pinned memory gives", "bitwise: `test_emulation.py`"),
    "abort-sockets": ("ranks blocked in NCCL kernels are freed, no memory lost", "Gloo: `test_comm_abort.py`"),
    "replaced-sockets": ("a killed rank of NCCL groups is replaced in place", "Gloo: `test_comm_takeover.py`"),
    "connected-sockets": ("after a recovery no first message of a peer holds a rank", "`test_comm_over_nccl.py`"),
    "latency-sockets": ("what a nonblocking communicator costs a small all-reduce", "cannot be tried"),
    "abort-ipc": ("blocked ranks are freed over NCCL 2.30 and CUDA IPC", "cannot be tried"),
    "replaced-ipc": ("a killed rank is replaced over NCCL 2.30 and CUDA IPC", "cannot be tried"),
    "connected-ipc": ("no first message holds a rank, over NCCL 2.30 and CUDA IPC", "cannot be tried"),
    "latency-ipc": ("a nonblocking communicator's cost over NCCL 2.30 and CUDA IPC", "cannot be tried"),
    "swap-pipeline": ("equal bit for bit after a hot swap over NCCL, PP2 x DP2", "Gloo: `test_hot_swap.py`"),
    "swap-tensor": ("the same, TP2 x PP2 x DP2 with sequence parallelism", "Gloo, without it: `test_hot_swap.py`"),
    "overhead-bf16": ("1.3B parameters in BF16: ratio at most 1.003, nothing skipped", f"toy size: {_TOY}"),
    "overhead-fp32": ("1.3B parameters in FP32: ratio at most 1.003, nothing skipped", f"toy size: {_TOY}"),
    "swap-graphs": ("a node lost while a CUDA graph of the iteration is replayed", "emulated: `test_graphs.py`"),
    "vault": ("16 GB a generation between two agents, ratio at most 1.01", f"toy size: {_TOY}"),
    "soak": ("kill after kill over NCCL is recovered", "Gloo: `test_soak.py`"),
}


class NoResults(RuntimeError):
    """There is nothing to report; one line."""


@dataclass
class Results:
    """The last run of each step: where it ran, what it checked, and how it ended."""

    machine: dict[str, Any] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    at: float = 0.0
    checks: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    verdicts: dict[int, Mapping[str, Any] | None] = field(default_factory=dict)
    records: list[Mapping[str, Any]] = field(default_factory=list)


def read_results(out: Path, dry: bool) -> Results:
    """Read what the steps have written to ``out``; a step that was killed counts as far as it came.

    Raises NoResults: there are none, or they are of dry runs (or of real ones, with ``dry``).
    """
    found = Results()
    for path in sorted(out.glob("step-*.jsonl")):
        number = int(path.stem.removeprefix("step-"))
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        begins = [place for place, line in enumerate(lines) if line["kind"] == "begin" and line["dry"] == dry]
        if not begins:
            continue
        mine = [line for line in lines[begins[-1] :] if line["dry"] == dry]
        found.verdicts[number] = next((line for line in mine if line["kind"] == "verdict"), None)
        found.checks |= {line["name"]: line for line in mine if line["kind"] == "check"}
        found.machine = mine[0]["machine"]
        found.sources.append(mine[0]["source"])
        found.at = max(found.at, mine[0]["at"])
        found.records += mine
    if not found.verdicts:
        raise NoResults(f"{out}: no step has been run {'dry' if dry else 'on a GPU'}; run 'scripts/gpu_kit.sh run 1'")
    return found


def column(checks: Mapping[str, Mapping[str, Any]], page: str = "", before: str = "") -> str:
    """The table of claims: on CPUs, and on a GPU as ``checks`` say, which ``page`` has in full.

    What was not checked stays as the table ``before`` has it, or has not been run.
    """
    kept = {}
    for line in before.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == _CELLS:
            kept[cells[1]] = cells[3]
    lines = ["| claim | on CPUs | on a GPU |", "|---|---|---|"]
    for name, (claim, cpus) in CLAIMS.items():
        told = kept.get(claim, NOT_RUN)
        if check := checks.get(name):
            told = f"{_word(check)}: {check['figure'].replace('|', '/')}, [{page}](measurements/{page})"
        lines.append(f"| {claim} | {cpus} | {told} |")
    return "\n".join(lines) + "\n"


def _word(check: Mapping[str, Any]) -> str:
    return "yes" if check["passed"] else "**no**"


def report(out: Path, dry: bool, docs: Path = ROOT / "docs") -> str:
    """Write the page, and the GPU column; the paths. Of a dry run only a page, into ``out``. Raises NoResults."""
    found = read_results(out, dry)
    card = re.sub("[^a-z0-9]+", "-", found.machine.get("card", "none").lower().removeprefix("nvidia ")).strip("-")
    name = f"gpu-{'dry' if dry else card}-{time.strftime('%Y-%m-%d', time.gmtime(found.at))}.md"
    if dry:
        (out / name).write_text(_page(found, dry))
        return str(out / name)
    page = docs / "measurements" / name
    page.write_text(_page(found, dry))
    evaluation = docs / "evaluation.md"
    before, rest = evaluation.read_text().split(BEGIN)
    table, after = rest.split(END)
    evaluation.write_text(before + BEGIN + column(found.checks, name, table) + END + after)
    return f"{page}, {evaluation}"


def _page(found: Results, dry: bool) -> str:
    when = time.strftime("%Y-%m-%d", time.gmtime(found.at))
    lines = [f"# {'A dry run of the kit, without a GPU' if dry else found.machine.get('card', 'A GPU')}, {when}", ""]
    lines += ["What `scripts/gpu_kit.sh` printed there, nothing left out.", "", "| | |", "|---|---|"]
    sources = ", ".join(sorted({source for source in found.sources if source})) or "not known"
    facts = {**found.machine, "commit": sources}
    lines += [f"| {key.replace('_gib', ', GiB')} | {value} |" for key, value in facts.items()]
    lines += ["", "## Checks", "", "| check | passed | figure |", "|---|---|---|"]
    lines += [f"| {key} | {_word(check)} | {check['figure']} |" for key, check in found.checks.items()]
    lines += ["", "## Steps", "", "| step | end |", "|---|---|"]
    for number, verdict in found.verdicts.items():
        end = "killed before its end" if verdict is None else f"{'passed' if verdict['passed'] else '**failed**'}"
        lines.append(f"| {number} | {end} |")
    lines += _rounds(found.records) + _phases(found.checks) + _kills(found.records) + _errors(found.records)
    return "\n".join(lines) + "\n"


def _rounds(records: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [r for r in records if r["kind"] == "ranks" and r["what"] == "round"]
    if not rows:
        return []
    head = ["", "## Aborts with a kernel that waits", "", "Seconds; the largest of the ranks.", ""]
    head += ["| way | round | free | abort | form |", "|---|---|---|---|---|"]
    for way, epoch in dict.fromkeys((r["way"], r["epoch"]) for r in rows):
        same = [r for r in rows if (r["way"], r["epoch"]) == (way, epoch)]
        worst = [max(r.get(key, 0.0) for r in same) for key in ("free_s", "abort_s", "form_s")]
        head.append(f"| {way} | {epoch} | " + " | ".join(f"{each:.3f}" for each in worst) + " |")
    return head


def _phases(checks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    swaps = {name: check["phases"] for name, check in checks.items() if check.get("phases")}
    if not swaps:
        return []
    names = list(dict.fromkeys(name for phases in swaps.values() for name in phases))
    lines = ["", "## Hot swaps", "", "Seconds from the kill to each phase.", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for swap, phases in swaps.items():
        lines.append(f"| {swap} | " + " | ".join(f"{phases[n]:.3f}" if n in phases else "" for n in names) + " |")
    return lines


def _kills(records: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [r for r in records if r["kind"] == "kill"]
    if not rows:
        return []
    lines = [
        "",
        "## Soak",
        "",
        "| job | node | kill to first iteration (s) | iterations done again |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| {r['job']} | {r['node']} | {r['first_iteration_s']:.3f} | {r['lost_iterations']} |" for r in rows
    ]


def _errors(records: Sequence[Mapping[str, Any]]) -> list[str]:
    errors = [r for r in records if r["kind"] == "error"]
    bad = [r for r in records if r["kind"] == "test" and r["outcome"] == "failed"]
    if not errors and not bad:
        return []
    lines = ["", "## What went wrong", ""]
    lines += [f"* `{r['name']}`: {' '.join(r['why'].split())}" for r in bad]
    return lines + [f"* {r['job']}: {r['error']}" for r in errors]
