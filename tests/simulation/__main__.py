"""``python -m simulation --seeds N [--first K] | --seed S [--trace]``: many runs, or one told message by message.

``--without FIX`` takes a fix back first (`simulation.mutants`), and stops at the first seed that finds it missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import pytest

from simulation.faults import Profile
from simulation.mutants import MUTANTS
from simulation.run import simulate


def main() -> int:
    """Exit code 1: a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m simulation", description="A simulated job per seed.")
    parser.add_argument("--seeds", type=int, default=2000, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first of their seeds")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every message")
    parser.add_argument("--without", choices=MUTANTS, help="take this fix back first; stop at the first violation")
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="draw only this kind of faults")
    parser.add_argument("--durable", action="store_true", help="give every run a durable directory")
    parser.add_argument("--rivals", action="store_true", help="another job wants each durable directory")
    parser.add_argument("--shards", action="store_true", help="give every run parity, constants or failure domains")
    parser.add_argument("--restarts", action="store_true", help="every recovery needs other processes")
    args = parser.parse_args()
    profile = Profile(
        only=tuple(args.only),
        durable=args.durable or None,
        shards=args.shards or None,
        rivals=args.rivals or None,
        restarts=args.restarts,
    )
    with pytest.MonkeyPatch.context() as patch:
        if args.without:
            MUTANTS[args.without](patch)
        if args.seed is not None:
            return _one(args.seed, profile, args.trace)
        return _many(range(args.first, args.first + args.seeds), profile, bool(args.without))


def _one(seed: int, profile: Profile, trace: bool) -> int:
    one = simulate(seed, profile, trace)
    print("\n".join([*one.trace, f"seed {seed}: {one.shape}; {', '.join(one.faults) or 'no fault'}"]))
    print(f"{one.epochs} recoveries, {one.seconds:.1f} s, {one.events} events: {one.violation or one.end}")
    return int(bool(one.violation))


def _many(seeds: range, profile: Profile, stop: bool) -> int:
    begun, codes, bad, epochs, faults = time.process_time(), Counter[int](), 0, 0, 0
    for seed in seeds:
        one = simulate(seed, profile)
        codes[one.code] += 1
        epochs += one.epochs
        faults += len(one.faults)
        if one.violation:
            bad += 1
            print(f"seed {seed}: {one.violation} [{one.shape}; {', '.join(one.faults)}]", flush=True)
            if stop:
                return 1
    seconds = time.process_time() - begun
    ends = ", ".join(f"{codes[code]} with {code}" for code in sorted(codes) if code >= 0)
    print(
        f"{len(seeds)} runs from seed {seeds.start}: {faults} faults, {epochs} recoveries; ends: {ends}; "
        f"{bad} violations; {seconds:.1f} s of CPU, {1000 * seconds / max(1, len(seeds)):.1f} ms a run"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
