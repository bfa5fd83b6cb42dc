"""How much longer iterations are with something than without it, and how sure that is. Pure numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of a set of iterations."""

    count: int
    mean: float
    median: float
    p99: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Iterations with and without. ``ratio`` is that of the means; ``low`` and ``high`` end its 95 % interval.

    The interval is a bootstrap over pairs of neighbouring blocks (or runs), so that slow drifts of the machine count
    for what they are, and iterations of a block are not taken for independent. ``median_ratio`` is that of medians.
    """

    on: Spread
    off: Spread
    ratio: float
    low: float
    high: float
    median_ratio: float
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def spread(seconds: Sequence[float]) -> Spread:
    """Mean, median and 99th percentile. Raises ValueError when there are none."""
    if not len(seconds):
        raise ValueError("no iterations were measured")
    values = np.asarray(seconds, dtype=np.float64)
    return Spread(
        len(values), float(values.mean()), float(np.median(values)), float(np.percentile(values, 99, method="higher"))
    )


def compare(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], resamples: int = 20_000, seed: int = 0
) -> Comparison:
    """Compare pairs of (iterations with, iterations without), each pair taken close together in time.

    Raises ValueError for fewer than two pairs.
    """
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} pairs of blocks are too few for an interval: measure more iterations")
    sums = np.array([[sum(on), len(on), sum(off), len(off)] for on, off in pairs], dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(pairs), (resamples, len(pairs)))
    drawn = sums[chosen].sum(axis=1)
    ratios = (drawn[:, 0] / drawn[:, 1]) / (drawn[:, 2] / drawn[:, 3])
    low, high = np.percentile(ratios, [2.5, 97.5])
    on = spread([s for one, _ in pairs for s in one])
    off = spread([s for _, one in pairs for s in one])
    return Comparison(on, off, on.mean / off.mean, float(low), float(high), on.median / off.median, len(pairs))
