"""What one agent sees of its own node, one JSON object a line: ``logs/node-N.jsonl``, of bounded length.

The coordinator's ``events.jsonl`` has what concerns the whole job; here is what would be too much for it: every shard's
snapshot and its way to the peer. Both have the same shape (``t`` in unix seconds, ``event``, further fields).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LIMIT = 32 << 20  # bytes; then the file becomes the ``.old`` one


class NodeLog:
    """Writer of one node's log. Raises OSError when it cannot be made; afterwards a full disk only stops the log."""

    def __init__(self, directory: str | Path, node: int, limit: int = _LIMIT) -> None:
        self.path = Path(directory) / f"node-{node}.jsonl"
        self._limit = limit
        self._node = node
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 - open for the life of the agent

    def write(self, event: str, **fields: Any) -> None:
        """Append one line; ``t`` is now unless given."""
        line = json.dumps({"t": time.time(), "event": event, "node": self._node, **fields})
        try:
            self._file.write(line + "\n")
            if self._file.tell() > self._limit:
                self._file.close()
                os.replace(self.path, f"{self.path}.old")
                self._file = open(self.path, "a", buffering=1)  # noqa: SIM115
        except (OSError, ValueError):
            return  # a log that cannot be written must not end a node; ValueError: closed by such an error before

    def close(self) -> None:
        """Close the file. What a full disk has no room for is lost."""
        with contextlib.suppress(OSError):
            self._file.close()


def read_node_logs(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """All lines of all nodes of a run that are whole, node after node, each in order of time."""
    logs = Path(run_dir) / "logs"
    for path in sorted(logs.glob("node-*.jsonl")):
        for part in (Path(f"{path}.old"), path):
            if not part.exists():
                continue
            for line in part.read_text(errors="replace").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:  # cut off where its node died
                    continue
