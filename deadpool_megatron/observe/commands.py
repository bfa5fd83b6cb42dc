"""The commands that look at a run: `deadpool status`, `nodes`, `timeline`, `report` and `page`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from deadpool_megatron.options import count

RUN_DIR = "runs/latest"
COMMANDS = ("status", "nodes", "timeline", "report", "page")
_USAGE = 2


def add_commands(commands: Any) -> None:
    """Add their parsers to the subparsers of `deadpool`."""
    status = commands.add_parser("status", help="what a job is doing")
    add_run_dir(status)
    status.add_argument("--json", action="store_true", help="all of it as JSON (with --watch: one line a second)")
    status.add_argument("--watch", action="store_true", help="show it live, until the job ends")
    status.add_argument(
        "--detail", action="store_true", help="every coordinate, process and phase, in a pager on a terminal"
    )
    nodes = commands.add_parser("nodes", help="the machines of a job: what each does, and what has failed there")
    add_run_dir(nodes)
    nodes.add_argument("--json", action="store_true", help="as JSON")
    timeline = commands.add_parser("timeline", help="pictures of a run's recoveries, and a trace for Perfetto")
    add_run_dir(timeline)
    timeline.add_argument("--out", metavar="DIR", help="where the files go (default: timeline in the run directory)")
    report = commands.add_parser("report", help="everything about a run in a single HTML file")
    add_run_dir(report)
    report.add_argument("--out", metavar="FILE", help="the file (default: report.html in the run directory)")
    page = commands.add_parser("page", help="status and report as a live page for a browser on this machine")
    add_run_dir(page)
    page.add_argument(
        "--port", type=count(0, 65535), default=8470, metavar="P", help="on 127.0.0.1 (default: 8470; 0: any)"
    )


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """The option by which every command takes a job's run directory."""
    parser.add_argument(
        "--run-dir", default=RUN_DIR, metavar="DIR", help=f"the job's run directory (default: {RUN_DIR})"
    )


def run_command(options: argparse.Namespace) -> int:
    """Run one of them; returns the exit code. Pictures and terminals are imported only here."""
    from deadpool_megatron.observe.nodes import NoNodes, show_nodes
    from deadpool_megatron.observe.report import NoRun, write_report, write_timeline
    from deadpool_megatron.observe.status import NoStatus, show_status

    try:
        if options.command == "status":
            show_status(options.run_dir, options.json, options.watch, options.detail)
            return 0
        if options.command == "nodes":
            show_nodes(options.run_dir, options.json)
            return 0
        run = Path(options.run_dir)
        if options.command == "page":
            from deadpool_megatron.observe.page import serve

            serve(run, options.port)
            return 0
        if options.command == "timeline":
            written = write_timeline(run, Path(options.out) if options.out else run / "timeline")
        else:
            written = [write_report(run, Path(options.out) if options.out else run / "report.html")]
    except (NoStatus, NoNodes, NoRun, OSError) as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return _USAGE
    except KeyboardInterrupt:  # the way out of --watch
        return 0
    for path in written:
        print(path)
    return 0
