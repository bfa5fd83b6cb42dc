"""Step 1: this machine, `tests/gpu`, and several NCCL ranks on one device: blocked, aborted, replaced."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from deadpool_bench.gpu_kit.step import Step
from deadpool_bench.paths import ROOT

_FREE_S: Final = 1.0  # from the abort until a rank that was blocked in a kernel is back in Python
_LOST: Final = 256 << 20  # bytes of the device that ten rounds may cost
_COPIES: Final = re.compile(r"pinned copy ([\d.]+) GB/s, into the vault ([\d.]+) GB/s")


def check_machine(step: Step) -> None:
    """Run the tests that need one device, then the ranks that share it: over sockets, and over IPC with NCCL 2.30."""
    _tests(step)
    ways = ["sockets"] if step.dry else ["sockets", "ipc"]
    for place, way in enumerate(ways):
        if way == "ipc" and not _newer_nccl():
            for name, _ in _SCENARIOS.values():
                step.check(f"{name}-ipc", False, "no NCCL 2.30: run scripts/gpu_kit.sh prepare")
            continue
        _ranks(step, way, step.left_s() / (len(ways) - place))


def _newer_nccl() -> str:
    """The library that scripts/gpu_kit.sh has unpacked; empty without it."""
    path = os.environ.get("GPU_KIT_NCCL", "")
    return path if Path(path).is_file() else ""


# ---- tests/gpu


def _tests(step: Step) -> None:
    report = step.scratch / "gpu.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    command += [f"--junitxml={report}", "-o", "junit_logging=system-out"]
    step.command(command, {"CUDA_VISIBLE_DEVICES": ""} if step.dry else {}, step.left_s() / 2)
    cases = _cases(report) if report.exists() else []
    for case in cases:
        step.record("test", **case)
    bad = [case["name"] for case in cases if case["outcome"] == "failed"]
    ran = [case for case in cases if case["outcome"] == "passed"]
    # Without a device all are skipped; that they were collected is what a dry run can say.
    passed = bool(cases) and not bad and (step.dry or bool(ran))
    step.check(
        "tests-gpu", passed, f"{len(ran)} of {len(cases)} passed" + (f", failed: {', '.join(bad)}" if bad else "")
    )
    if found := next((m for case in cases if (m := _COPIES.search(case["output"]))), None):
        ceiling, reached = map(float, found.groups())
        step.check("copies", reached >= 0.9 * ceiling, f"{reached:.1f} GB/s of {ceiling:.1f} GB/s with pinned memory")
    elif not step.dry:
        step.check("copies", False, "not measured")


def _cases(report: Path) -> list[dict[str, Any]]:
    out = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        tags = {child.tag: child for child in case}
        bad = tags.get("failure", tags.get("error"))
        outcome = "failed" if bad is not None else "skipped" if "skipped" in tags else "passed"
        output = (tags["system-out"].text or "") if "system-out" in tags else ""
        why = (bad.get("message") or "")[:500] if bad is not None else ""
        name = case.get("name") or ""
        out.append(
            {"name": name, "outcome": outcome, "seconds": case.get("time"), "output": output[-2000:], "why": why}
        )
    return out


# ---- ranks that share the device


def _ranks(step: Step, way: str, limit_s: float) -> None:
    """Each scenario by itself: one that crashes takes none along."""
    environment = {"SHARED_WAY": way, "SHARED_DRY": str(int(step.dry)), "SHARED_ROUNDS": "3" if step.dry else "10"}
    if way == "ipc":
        environment["SHARED_PRELOAD"] = _newer_nccl()
    end = step.left_s() - limit_s
    for place, (scenario, (name, judge)) in enumerate(_SCENARIOS.items()):
        found: list[dict[str, Any]] = []

        def line(text: str, found: list[dict[str, Any]] = found) -> None:
            if text.startswith('{"scenario"'):
                found.append(json.loads(text))
                step.record("ranks", way=way, **found[-1])

        command = [sys.executable, str(ROOT / "tests" / "gpu" / "shared_device.py")]
        share = (step.left_s() - end) / (len(_SCENARIOS) - place)
        code = step.command(command, {**environment, "SHARED_SCENARIO": scenario}, share, line)
        how = "over Gloo" if step.dry else f"NCCL {next((f['nccl'] for f in found if f.get('nccl')), '?')} over {way}"
        passed, figure = judge(found)
        if code != 0:
            figure += f"; the ranks ended with {code if code is not None else 'the time'}"
        done = any(row["what"] == "done" for row in found)
        step.check(f"{name}-{way}", passed and done and code == 0, f"{how}: {figure}")


type _Rows = list[dict[str, Any]]


def _freed(rows: _Rows) -> tuple[bool, str]:
    free = [row["free_s"] for row in rows if "free_s" in row]
    stuck = sum(row.get("stuck", 0) for row in rows)
    figure = f"{len(free)} blocked ranks free after at most {max(free, default=0):.3f} s, {stuck} stuck"
    return bool(free) and max(free) < _FREE_S and not stuck, figure


def _freed_for_good(rows: _Rows) -> tuple[bool, str]:
    passed, figure = _freed(rows)
    lost = max((row["lost_bytes"] for row in rows if "lost_bytes" in row), default=0)
    return passed and lost < _LOST, f"{figure}, {lost / (1 << 20):.0f} MiB of the device lost"


def _connected(rows: _Rows) -> tuple[bool, str]:
    passed, figure = _freed([row for row in rows if row["what"] == "again"])
    first = next((row["free_s"] for row in rows if row["what"] == "first" and "free_s" in row), None)
    held = "not seen" if first is None else f"free after {first:.3f} s"
    return passed, f"in a first message {held}; after a recovery {figure}"


def _compared(rows: _Rows) -> tuple[bool, str]:
    """No figure to reach: what it costs is to be known."""
    kinds = ("blocking", "nonblocking")
    of = {kind: [row for row in rows if row["what"] == kind] for kind in kinds}
    if not all(of.values()):
        return False, "not measured"
    host, both = (
        " and ".join(f"{statistics.median(row[what] for row in of[kind]):.0f}" for kind in kinds)
        for what in ("host_us", "all_us")
    )
    return True, f"a small all-reduce, blocking and nonblocking: {host} us of the host, {both} us in all"


# In this order; the name of what each proves.
_SCENARIOS: Final[dict[str, tuple[str, Callable[[_Rows], tuple[bool, str]]]]] = {
    "takeover": ("replaced", _freed),
    "fresh": ("connected", _connected),
    "latency": ("latency", _compared),
    "rounds": ("abort", _freed_for_good),
}
