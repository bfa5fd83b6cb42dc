"""What each node has told of its own progress, for the status and the event log; decides nothing."""

from __future__ import annotations

from typing import Any

from deadpool_megatron.cluster import records as r


class Progress:
    """Follows the records the coordinator receives: the newest step and the newest generation of every node."""

    def __init__(self) -> None:
        self._steps: dict[int, tuple[int, str]] = {}
        self._committed: dict[int, int] = {}

    def took(self, record: r.AgentRecord) -> dict[str, Any] | None:
        """Take a record; the fields of a ``step`` event (``epoch``, ``node``, ``step``) if it is one."""
        if isinstance(record, r.Committed):
            self._committed[record.node] = record.generation
            return None
        step = r.STEPS.get(type(record))
        if step is None:
            return None
        epoch, node = int(getattr(record, "epoch", 0)), int(getattr(record, "node", -1))
        if self._steps.get(node, (-1, ""))[0] > epoch:
            return None
        self._steps[node] = (epoch, step)
        return {"epoch": epoch, "node": node, "step": step}

    def generation(self, node: int) -> int | None:
        """The newest generation that all coordinates of a node have committed; None when there is none yet."""
        return self._committed.get(node)

    def step(self, node: int, epoch: int) -> str | None:
        """The last step of the recovery of ``epoch`` that a node has reached."""
        at, step = self._steps.get(node, (-1, ""))
        return step if at == epoch else None
