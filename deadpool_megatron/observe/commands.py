"""The commands that look at a run: `deadpool status`, `timeline` and `report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

COMMANDS = ("status", "timeline", "report")
_USAGE = 2


def add_commands(commands: Any) -> None:
    """Add the parsers of all three to the subparsers of `deadpool`."""
    status = commands.add_parser("status", help="what a job is doing")
    status.add_argument("--run-dir", required=True, metavar="DIR", help="the job's run directory")
    status.add_argument("--json", action="store_true", help="all of it as JSON (with --watch: one line a second)")
    status.add_argument("--watch", action="store_true", help="show it live, until the job ends")
    timeline = commands.add_parser("timeline", help="pictures of a run's recoveries, and a trace for Perfetto")
    timeline.add_argument("run", metavar="RUN", help="run directory")
    timeline.add_argument("--out", metavar="DIR", help="where the files go (default: RUN/timeline)")
    report = commands.add_parser("report", help="everything about a run in a single HTML file")
    report.add_argument("run", metavar="RUN", help="run directory")
    report.add_argument("--out", metavar="FILE", help="the file (default: RUN/report.html)")


def run_command(options: argparse.Namespace) -> int:
    """Run one of them; returns the exit code. Pictures and terminals are imported only here."""
    from deadpool_megatron.observe.report import NoRun, write_report, write_timeline
    from deadpool_megatron.observe.status import NoStatus, show_status

    try:
        if options.command == "status":
            show_status(options.run_dir, options.json, options.watch)
            return 0
        run = Path(options.run)
        if options.command == "timeline":
            written = write_timeline(run, Path(options.out) if options.out else run / "timeline")
        else:
            written = [write_report(run, Path(options.out) if options.out else run / "report.html")]
    except (NoStatus, NoRun, OSError) as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return _USAGE
    except KeyboardInterrupt:  # the way out of --watch
        return 0
    for path in written:
        print(path)
    return 0
