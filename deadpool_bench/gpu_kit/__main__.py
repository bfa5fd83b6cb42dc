"""``python -m deadpool_bench.gpu_kit``: what `scripts/gpu_kit.sh` calls."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from deadpool_bench.gpu_kit.costs import check_overhead, check_vault
from deadpool_bench.gpu_kit.nccl import NotPruned, prune
from deadpool_bench.gpu_kit.ranks import check_machine
from deadpool_bench.gpu_kit.report import NoResults, report
from deadpool_bench.gpu_kit.step import Step, run_step
from deadpool_bench.gpu_kit.swaps import check_graphs, check_soak, check_swaps
from deadpool_bench.paths import ROOT

STEPS: Final[dict[int, Callable[[Step], None]]] = {
    1: check_machine,
    2: check_swaps,
    3: check_overhead,
    4: check_graphs,
    5: check_vault,
    6: check_soak,
}


def main(argv: list[str] | None = None) -> int:
    """Run a step, write the report, or prune a library; the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_kit.sh", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one step, at most nine minutes")
    run.add_argument("step", type=int, choices=sorted(STEPS))
    run.add_argument("--limit", type=float, default=540.0, metavar="S", help="seconds it may take (default: 540)")
    told = commands.add_parser("report", help="the page of what the steps have found")
    for each in (run, told):
        each.add_argument("--dry", action="store_true", help="without a GPU; says nothing about one")
        each.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-kit", metavar="DIR", help="results")
    pruned = commands.add_parser("prune", help="libnccl.so with the code of one kind of device alone")
    pruned.add_argument("source", type=Path)
    pruned.add_argument("target", type=Path)
    pruned.add_argument("--sm", type=int, default=90, help="compute capability, times ten (default: 90)")
    o = parser.parse_args(argv)
    try:
        if o.command == "run":
            return run_step(o.step, STEPS[o.step], o.dry, o.out, o.limit)
        if o.command == "report":
            print(report(o.out, o.dry))
        else:
            print(prune(o.source, o.target, o.sm))
    except (NotPruned, NoResults, OSError) as err:
        print(f"gpu_kit.sh: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
