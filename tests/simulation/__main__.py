"""``python -m simulation --seeds N [--first K] | --seed S [--trace]``: many runs, or one told message by message."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from simulation.run import simulate


def main() -> int:
    """Exit code 1: a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first of their seeds")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="print every message")
    args = parser.parse_args()
    if args.seed is not None:
        one = simulate(args.seed, trace=args.trace)
        print("\n".join(one.trace))
        print(f"seed {one.seed}: {one.shape}; {', '.join(one.faults) or 'no fault'}")
        print(
            f"{one.epochs} epochs, {one.seconds:.1f} s, {one.events} events; {one.violation or (one.code, one.message)}"
        )
        return int(bool(one.violation))
    begun, codes, bad, epochs, faults = time.process_time(), Counter[int](), 0, 0, 0
    for seed in range(args.first, args.first + args.seeds):
        one = simulate(seed)
        codes[one.code] += 1
        epochs += one.epochs
        faults += len(one.faults)
        if one.violation:
            bad += 1
            print(f"seed {seed}: {one.violation} [{one.shape}; {', '.join(one.faults)}]", flush=True)
    seconds = time.process_time() - begun
    ends = ", ".join(f"{codes[code]} with {code}" for code in sorted(codes) if code >= 0)
    print(
        f"{args.seeds} runs from seed {args.first}: {faults} faults, {epochs} recoveries; ends: {ends}; "
        f"{bad} violations; {seconds:.1f} s of CPU, {1000 * seconds / max(1, args.seeds):.1f} ms a run"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
