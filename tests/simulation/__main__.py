"""``python -m simulation --seeds N [--first K] | --seed S [--trace]``: many runs, or one told message by message.

With ``--mixed`` each seed has one of all kinds, as `simulation.many.mixed` says. ``--without FIX`` takes a fix back
first (`simulation.mutants`), and stops at the first seed that finds it missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from simulation.faults import Profile
from simulation.many import many, mixed, summary
from simulation.mutants import MUTANTS
from simulation.run import simulate


def main() -> int:
    """Exit code 1: a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m simulation", description="A simulated job per seed.")
    parser.add_argument("--seeds", type=int, default=2000, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first of their seeds")
    parser.add_argument("--processes", type=int, default=1, help="that share them")
    parser.add_argument("--results", type=Path, metavar="FILE", help="what they gave; what it has is not run again")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every message")
    parser.add_argument("--without", choices=MUTANTS, help="take this fix back first; stop at the first violation")
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="draw only this kind of faults")
    parser.add_argument("--mixed", action="store_true", help="all kinds below, one a seed")
    parser.add_argument("--durable", action="store_true", help="give every run a durable directory")
    parser.add_argument("--rivals", action="store_true", help="and another job that wants it")
    parser.add_argument("--shards", action="store_true", help="give every run parity, constants or failure domains")
    parser.add_argument("--restarts", action="store_true", help="every recovery needs other processes")
    parser.add_argument("--rehearsals", action="store_true", help="spares set up coordinates ahead of time")
    parser.add_argument("--standbys", action="store_true", help="processes stand by, and workers end at once")
    parser.add_argument("--checks", action="store_true", help="spares are checked, and some fail")
    parser.add_argument("--moves", action="store_true", help="every run has drains that something happens to")
    parser.add_argument("--together", action="store_true", help="workers of several nodes die within a moment")
    parser.add_argument("--signs", action="store_true", help="a GPU is at fault, and its machine tells so")
    parser.add_argument("--shrinks", action="store_true", help="fewer replicas go on when no spare is left")
    parser.add_argument("--replaced", type=float, default=0.0, help="how likely a packet is lost with its connection")
    args = parser.parse_args()
    profile = Profile(
        only=tuple(args.only),
        durable=args.durable or args.rivals or args.shrinks or None,
        shards=args.shards or None,
        rivals=args.rivals or None,
        restarts=args.restarts,
        rehearsals=args.rehearsals,
        standbys=args.standbys,
        checks=args.checks,
        moves=args.moves or None,
        signs=args.signs,
        together=args.together,
        shrinks=args.shrinks,
        replaced=args.replaced,
    )
    if args.mixed and profile != Profile():
        parser.error("--mixed draws the kind of each run itself: leave --only, --durable and the like out")
    with pytest.MonkeyPatch.context() as patch:
        if args.without:
            MUTANTS[args.without](patch)
        if args.seed is not None:
            return _one(args.seed, mixed(args.seed)[1] if args.mixed else profile, args.trace)
        blocks = []
        try:
            for block in many(
                args.first, args.seeds, None if args.mixed else profile, args.processes, args.results,
                bool(args.without),
            ):  # fmt: skip
                print("".join(f"{each}\n" for each in block["violations"]), end="", flush=True)
                blocks.append(block)
        except ValueError as err:
            parser.error(str(err))
    print(summary(blocks))
    return int(any(block["violations"] for block in blocks))


def _one(seed: int, profile: Profile, trace: bool) -> int:
    one = simulate(seed, profile, trace)
    print("\n".join([*one.trace, f"seed {seed}: {one.shape}; {', '.join(one.faults) or 'no fault'}"]))
    print(f"{one.epochs} recoveries, {one.seconds:.1f} s, {one.events} events: {one.violation or one.end}")
    return int(bool(one.violation))


if __name__ == "__main__":
    sys.exit(main())
