"""Where upstream adds up for its log in the process, and not in the model or the optimizer.

Most of it is of one iteration's microbatches, and zero between iterations. Multi-token prediction counts on from
iteration to iteration, under names that begin with ``cumulative_``.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import torch

_MTP: Final = ("megatron.core.transformer.multi_token_prediction", "MTPLossLoggingHelper")
_HOLDERS: Final = (
    ("megatron.core.transformer.moe.moe_logging", "_MOE_METRICS_TRACKER"),
    _MTP,
    ("megatron.core.transformer.experimental_attention_variant.dsa", "DSAIndexerLossLoggingHelper"),
)
_CUMULATIVE: Final = "cumulative_"
_KEY: Final = "mtp."  # of a count among the sums of the log


def _entries(module: str, name: str) -> dict[str, Any]:
    """A holder's sums by name; empty where nothing has been added up yet."""
    holder = getattr(sys.modules.get(module), name, None)
    found: dict[str, Any] = getattr(holder, "metrics", None) or getattr(holder, "tracker", {})
    return found


def clear_sums() -> None:
    """Take back what a broken step has added to sums of its iteration."""
    for holder in _HOLDERS:
        for name, entry in _entries(*holder).items():
            values: Any = entry if torch.is_tensor(entry) else getattr(entry, "values", None)
            if torch.is_tensor(values) and not name.startswith(_CUMULATIVE):
                values.zero_()


def cumulative() -> dict[str, torch.Tensor]:
    """The counts that go on, each by a key of its own; they are the live ones."""
    return {
        f"{_KEY}{name}.{i}": value[i]
        for name, value in _entries(*_MTP).items()
        if name.startswith(_CUMULATIVE)
        for i in range(len(value))
    }


def put_cumulative(log: dict[str, Any]) -> dict[str, Any]:
    """Make the counts those of `cumulative` that are in ``log``; returns the rest of it."""
    tracker = _entries(*_MTP)
    for name in [name for name in tracker if name.startswith(_CUMULATIVE)]:
        del tracker[name]
    parts: dict[str, list[torch.Tensor]] = {}
    for key in [key for key in log if key.startswith(_KEY)]:
        parts.setdefault(key.removeprefix(_KEY).rsplit(".", 1)[0], []).append(log.pop(key))
    tracker.update({name: torch.stack(values) for name, values in parts.items()})
    return log
