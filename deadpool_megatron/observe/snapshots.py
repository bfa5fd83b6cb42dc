"""What `deadpool status` says of snapshots, out of ``status.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deadpool_megatron.observe.narrative import seconds_text


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def snapshot_lines(said: Mapping[str, Any] | None) -> list[str]:
    """A line of what a generation takes, and one of what it costs and is worth; none before the first iteration.

    Times and bytes are those of the coordinate that reports losses, medians over the last iterations where one value
    would mislead.
    """
    if not said or not said.get("planned_bytes"):
        return []
    planned = f"{_bytes(said['planned_bytes'])} a generation over all coordinates"
    if said["expected_bytes"]:
        planned += f" ({100 * (said['planned_bytes'] / said['expected_bytes'] - 1):+.2f} % of the arithmetic)"
    if said["copied_bytes"] is None:
        return [f"snapshots: {planned}"]
    moved = f"last one here: {_bytes(said['copied_bytes'])} copied at {_bytes(said['copy_bandwidth'])}/s"
    if said["sent_bytes"]:
        moved += f", {_bytes(said['sent_bytes'])} sent at {_bytes(said['send_bandwidth'])}/s"
    lines = [f"snapshots: {planned}; {moved}"]
    worth = f"blocked {seconds_text(said['blocked_s'])}, stalled {seconds_text(said['stall_s'])} on the host and "
    worth += f"{seconds_text(said['device_stall_s'])} on the device; {said['skipped_generations']} skipped so far"
    if said["commit_share"] is not None:
        worth += (
            f"; committed after {said['commit_share']:.2f} of an iteration, so a loss costs "
            f"{said['expected_lost_iterations']:.2f} iterations ({seconds_text(said['expected_lost_s'])}) on average"
        )
    return [*lines, worth]
