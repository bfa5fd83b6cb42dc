"""Many runs, of all kinds, in several processes; what they gave is in a file at once, so that they can be continued."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deadpool_megatron.launcher.processes import end_with_parent
from simulation.faults import DURABLE_KINDS, KINDS, Profile
from simulation.run import simulate

__all__ = ["MIX", "Block", "code_digest", "many", "mixed", "summary"]

# By flags of the command line, how many of sixteen seeds have what profile.
MIX: dict[str, tuple[int, Profile]] = {
    "": (6, Profile()),
    "--durable": (3, Profile(durable=True)),
    "--shards": (2, Profile(shards=True)),
    "--durable --shards": (2, Profile(durable=True, shards=True)),
    "--rivals": (2, Profile(durable=True, rivals=True)),
    "--restarts": (1, Profile(restarts=True)),
}
_TURNS = [flags for flags, (share, _) in MIX.items() for _ in range(share)]
_REHEARSED = 0.2  # of them have spares that rehearse besides
_STANDBYS = 0.25  # of them have processes that stand by
_CHECKED = 0.2  # of them have spares that are checked besides
_SIGNS = 0.2  # of them have a GPU at fault besides
_TOGETHER = 0.2  # of them lose workers by the dozen besides
_SHRINKS = 0.4  # of those with a durable directory that nobody else wants have fewer replicas when no spare is left
_BLOCK = 200  # runs
_COLLECT = 50
Block = dict[str, Any]  # a line of the file


def mixed(seed: int) -> tuple[str, Profile]:
    """The kind of this seed's run, as flags, and its profile: every second one has few kinds of faults, so that these
    meet each other more often than where all are drawn."""
    flags = _TURNS[seed % len(_TURNS)]
    rehearsed = random.Random(f"rehearsed {seed}").random() < _REHEARSED
    signs = random.Random(f"has signs {seed}").random() < _SIGNS
    narrows = bool(MIX[flags][1].durable) and not MIX[flags][1].rivals
    shrinks = narrows and random.Random(f"has fewer {seed}").random() < _SHRINKS
    standbys = random.Random(f"standbys {seed}").random() < _STANDBYS
    checks = random.Random(f"has checks {seed}").random() < _CHECKED
    profile = replace(
        MIX[flags][1], rehearsals=rehearsed, signs=signs, standbys=standbys, checks=checks, shrinks=shrinks
    )
    profile = replace(profile, together=random.Random(f"together {seed}").random() < _TOGETHER)
    few = random.Random(f"few {seed}")
    if few.random() < 0.5:
        return flags, profile
    kinds = few.sample([*KINDS], few.randint(1, 4)) + few.sample([*DURABLE_KINDS], few.randint(0, 2))
    return flags, replace(profile, only=tuple(kinds))


def code_digest() -> str:
    """Of all that is run: results of one state of the code are not mixed with those of another."""
    there = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for directory in (there / "deadpool_megatron", there / "tests" / "simulation"):
        for path in sorted(directory.rglob("*.py")):
            digest.update(path.relative_to(there).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(task: tuple[int, int, Profile | None, bool]) -> Block:
    """One block of seeds; without a profile, each seed's kind is that of `mixed`."""
    first, count, profile, stop = task
    kinds: dict[str, Counter[str]] = {}
    faults, bad = Counter[str](), []
    begun = time.process_time()
    for seed in range(first, first + count):
        flags, drawn = mixed(seed) if profile is None else ("as told", profile)
        one = simulate(seed, drawn)
        of = kinds.setdefault(flags, Counter())
        of.update(runs=1, recoveries=one.epochs, events=one.events, faults=len(one.faults))
        of[f"ended with {one.code}" if not one.violation else "violations"] += 1
        faults.update(one.kinds)
        if one.violation:
            shape = f"{one.shape}; {', '.join(one.faults)}"
            bad.append(f"{'--mixed ' * (profile is None)}--seed {seed}: {one.violation} [{flags}; {shape}]")
            if stop:
                break
        if seed % _COLLECT == 0:
            gc.collect()
    return {
        "first": first, "seeds": count, "cpu_s": round(time.process_time() - begun, 3), "kinds": kinds,
        "faults": faults, "violations": bad,
    }  # fmt: skip


def _begin(parent: int) -> None:
    """Of a child: it ends with the process that the user has started, however that ends."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _quiet()


def _quiet() -> None:
    gc.collect()
    gc.freeze()  # what the imports made is looked at no more
    gc.disable()


def many(
    first: int,
    seeds: int,
    profile: Profile | None,
    processes: int = 1,
    results: Path | None = None,
    stop: bool = False,
) -> Iterator[Block]:
    """Blocks as they come; those that the file has already come first. ``stop``: at the first violation.

    Raises ValueError when the file is of other code, or of other profiles.
    """
    wanted = {"code": code_digest(), "profile": repr(profile)}
    done: dict[tuple[int, int], Block] = {}
    if results is not None and results.exists():
        lines = results.read_text().split("\n")
        head, *blocks = [json.loads(line) for line in lines[:-1]]  # the last one may have been cut off
        if head != wanted:
            raise ValueError(f"{results} has runs of {head}, and these would be {wanted}: take another file")
        done = {(block["first"], block["seeds"]): block for block in blocks}
        results.write_text("".join(f"{line}\n" for line in lines[:-1]))
    elif results is not None:
        results.write_text(json.dumps(wanted) + "\n")
    tasks = [(at, min(_BLOCK, first + seeds - at)) for at in range(first, first + seeds, _BLOCK)]
    yield from (done[task] for task in tasks if task in done)
    left = [(*task, profile, stop) for task in tasks if task not in done]
    fork = multiprocessing.get_context("fork")
    with fork.Pool(processes, _begin, (os.getpid(),)) if processes > 1 else _Here() as pool:
        for block in pool.imap_unordered(_run, left):
            if results is not None:
                with results.open("a") as file:
                    file.write(json.dumps(block) + "\n")
            yield block
            if stop and block["violations"]:
                return


class _Here:
    """One process is this one."""

    def __enter__(self) -> _Here:
        _quiet()
        return self

    def __exit__(self, *args: object) -> None:
        gc.enable()
        gc.unfreeze()

    def imap_unordered(self, call: Any, tasks: Iterable[Any]) -> Iterator[Any]:
        return map(call, tasks)


def summary(blocks: Iterable[Block]) -> str:
    """What was run: kinds, faults, ends, violations."""
    kinds: dict[str, Counter[str]] = {}
    faults, seconds, bad, first, last = Counter[str](), 0.0, 0, sys.maxsize, 0
    for block in blocks:
        first, last = min(first, block["first"]), max(last, block["first"] + block["seeds"])
        seconds, bad = seconds + block["cpu_s"], bad + len(block["violations"])
        faults.update(block["faults"])
        for flags, of in block["kinds"].items():
            kinds.setdefault(flags, Counter()).update(of)
    runs = sum(of["runs"] for of in kinds.values())
    lines = []
    for flags in sorted(kinds):
        of = kinds[flags]
        ends = ", ".join(f"{of[end]} {end}" for end in sorted(of) if end.startswith("ended"))
        lines.append(
            f"{flags or 'no flag'}: {of['runs']} runs, {of['faults']} faults, {of['recoveries']} recoveries; {ends}"
        )
    lines.append("faults: " + ", ".join(f"{count} {kind}" for kind, count in faults.most_common()))
    lines.append(
        f"{runs} runs of seeds {first} to {last - 1}; {bad} violations; {seconds:.0f} s of CPU, "
        f"{1000 * seconds / max(1, runs):.1f} ms a run; code {code_digest()}"
    )
    return "\n".join(lines)
