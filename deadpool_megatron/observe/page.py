"""`deadpool page`: a job as a live page for a browser. Reads the run directory alone, so nothing in the job serves it.

::

    /             the page: the two below, each renewed by itself
    /screen       what `deadpool status` shows, every second
    /report       what `deadpool report` writes, when there is something new
    /status.json  what `deadpool status --json` prints

It listens on the loopback address only, answers GET only, and only who names it by that address: a page of another
site, to which a name server gives that address, gets nothing.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.terminal_theme import MONOKAI

from deadpool_megatron.observe.report import NoRun, report_text
from deadpool_megatron.observe.rundir import STATUS
from deadpool_megatron.observe.status import JobView, NoStatus
from deadpool_megatron.observe.strict_json import strict_json

_HOST: Final = "127.0.0.1"
_SIZE: Final = (150, 40)  # columns and lines of the screen
_REPORT_S: Final = 20.0  # pictures of a long run take seconds
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-src 'self'",
    "X-Content-Type-Options": "nosniff",
}
_FRAMES: Final = """<!doctype html>
<html lang=en><head><meta charset=utf-8><title>DeadPool</title><style>
body { margin: 0; display: flex; flex-direction: column; height: 100vh; background: #0c0c0c; }
iframe { border: 0; width: 100%; } #screen { flex: 3; } #report { flex: 2; background: #fff; }
</style></head><body><iframe id=screen src=/screen title="the job now"></iframe>
<iframe id=report src=/report title="the run so far"></iframe></body></html>
"""
_SCREEN: Final = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta http-equiv=refresh content=1><title>DeadPool</title></head>
<body style="background: #0c0c0c; color: #cccccc"><pre style="font: 14px/1.35 monospace">{code}</pre></body></html>
"""


class LivePage(ThreadingHTTPServer):
    """Serves the page of one run until `shutdown`. Raises OSError when the port is taken.

    Args:
        port: 0 for any; ``server_port`` has it then.
    """

    daemon_threads = True

    def __init__(self, run_dir: Path, port: int) -> None:
        super().__init__((_HOST, port), _Handler)
        self.run_dir = run_dir
        self._lock = threading.Lock()  # one picture after the other
        self._looking = threading.Lock()
        self._view: JobView | None = None
        self._report: tuple[float, str] = (-_REPORT_S, "")

    def content(self, path: str) -> tuple[str, str] | None:
        """What is at ``path``, and its type; None for nothing. Raises NoStatus, NoRun."""
        match path:
            case "/":
                return _FRAMES, "text/html"
            case "/screen":
                return self._look(_screen), "text/html"
            case "/report":
                return self._renewed_report(), "text/html"
            case "/status.json":
                return self._look(lambda view: strict_json(view.as_json())), "application/json"
        return None

    def _look(self, show: Callable[[JobView], str]) -> str:
        """``show`` of the job as it is now: what has been read of a long run is not read again each second."""
        with self._looking:
            if self._view is None:
                self._view = JobView(self.run_dir)
            else:
                self._view.refresh()
            return show(self._view)

    def _renewed_report(self) -> str:
        with self._lock:
            if time.monotonic() - self._report[0] > _REPORT_S:
                text = report_text(self.run_dir, head=f"<meta http-equiv=refresh content={_REPORT_S:.0f}>")
                self._report = time.monotonic(), text
            return self._report[1]


def _screen(view: JobView) -> str:
    console = Console(record=True, width=_SIZE[0], file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(view.screen(*_SIZE))
    return console.export_html(inline_styles=True, code_format=_SCREEN, theme=MONOKAI)


class _Handler(BaseHTTPRequestHandler):
    server: LivePage
    server_version = "deadpool"
    timeout = 10

    def do_GET(self) -> None:
        """Answer one request."""
        # Whatever the port: `ssh -L` may have another one at its other end.
        if (self.headers.get("Host") or "").partition(":")[0] not in (_HOST, "localhost"):
            self.send_error(403)
            return
        try:
            found = self.server.content(self.path.partition("?")[0])
        except (NoStatus, NoRun) as err:
            found = f"<!doctype html><meta http-equiv=refresh content=1><p>{err}", "text/html"
        if found is None:
            self.send_error(404)
            return
        text, kind = found
        data = text.encode()
        self.send_response(200)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is for the address."""


def serve(run_dir: Path, port: int) -> None:
    """Until Ctrl-C. Raises OSError."""
    with LivePage(run_dir, port) as page:
        print(
            f"deadpool: {run_dir} is shown at http://{_HOST}:{page.server_port}/ (from elsewhere: ssh -L)"
            + ("" if (run_dir / STATUS).exists() else "; no job has begun there yet"),
            flush=True,
        )
        page.serve_forever()
