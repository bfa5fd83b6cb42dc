"""What a command shows on its terminal: the workers' logs, each line behind the name of its log, and the job's end."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from deadpool_megatron.cluster.agent.workers import ERROR_FILE
from deadpool_megatron.cluster.records.exits import Exit, what_to_do
from deadpool_megatron.observe import ERROR

_AT_ONCE: Final = 1 << 20  # bytes of a log; a line that is longer (a progress bar never ends its own) is shown in parts


class Tee(threading.Thread):
    """Follows the logs of a directory from its construction until `stop`.

    Args:
        directory: where the logs are; files that appear later are followed from their beginning.
        wanted: whether the log of this name (without ``.log``) is shown.
    """

    def __init__(self, directory: Path, wanted: Callable[[str], bool]) -> None:
        super().__init__(name="tee", daemon=True)
        self._directory = directory
        self._wanted = wanted
        self._positions: dict[str, int] = {}
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        """Follow the files until stopped; once more after that."""
        while not self._ended.wait(0.1):
            self._show()
        while self._show():
            pass

    def stop(self) -> None:
        """Show what is left."""
        self._ended.set()
        self.join()

    def _show(self) -> bool:
        """What has come since; True when that is not all."""
        more = False
        for path in sorted(self._directory.glob("*.log")):
            if path.is_symlink() or not self._wanted(path.stem):
                continue
            try:
                with open(path, "rb") as f:
                    f.seek(self._positions.get(path.name, 0))
                    data = f.read(_AT_ONCE)
            except OSError:  # somebody has removed it: the others go on
                continue
            full = len(data) == _AT_ONCE
            more = more or full
            whole = data[: data.rfind(b"\n") + 1] or (data if full else b"")
            self._positions[path.name] = self._positions.get(path.name, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                print(f"[{path.stem}] {line}", flush=True)
        return more


def show_end(code: int, message: str, run_dir: str) -> None:
    """The job's last words on the terminal: how it ended, what to do. An error goes to its launcher too."""
    advice = what_to_do(code) if code != Exit.USAGE else ""  # a message of that kind says it
    for line in filter(None, (message, advice)):
        print(f"deadpool: {line}", file=sys.stderr)
    theirs = os.environ.get(ERROR_FILE)
    if code and theirs:
        with contextlib.suppress(OSError):  # there is none: the coordinator did not come so far
            shutil.copyfile(Path(run_dir) / ERROR, theirs)
