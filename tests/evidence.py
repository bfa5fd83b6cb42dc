"""``pytest --evidence``: which features of `support` had a test that passed, with a node lost in it.

What counts is a job that lost a node, went on, and was found equal bit for bit to the undisturbed one
(`jobs.assert_same_training`). The record is docs/measurements/features.json, from which docs/support.md is written; it
grows with each run, and a test that fails now is taken out of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from deadpool_megatron import support

RECORD = Path(__file__).resolve().parents[1] / support.RECORD


def note(test: str, jobs: Sequence[tuple[Sequence[str], int]], path: Path = RECORD) -> None:
    """Write down what a test has shown, by its jobs, each with its flags and the workers of a node: nothing if there
    are none, as for one that failed."""
    recorded = json.loads(path.read_text()) if path.exists() else {}
    told = [each for each in jobs if "--yaml-cfg" not in each[0]]  # what a file says is not read here
    shown = {each.name for flags, slots in told for each in support.used(support.parse(flags), slots) if each.name}
    for name in sorted(shown | recorded.keys()):
        tests = {*recorded.get(name, ())} - {test} | ({test} if name in shown else set())
        recorded[name] = sorted(tests)
    path.write_text(json.dumps({k: v for k, v in sorted(recorded.items()) if v}, indent=2) + "\n")
