"""DeadPool's series reach Megatron's own writers: TensorBoard's event files of a real run hold them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flags import tiny_gpt
from jobs import Jobs, launch_flags


def test_tensorboard_gets_our_series_also_from_the_spare_that_took_the_writer_over(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    jobs = Jobs(tmp_path)
    board = tmp_path / "board"
    flags = [*tiny_gpt("none", iters=8), "--tensor-model-parallel-size", "1", "--tensorboard-dir", str(board)]
    try:
        job = jobs.start("run", launch_flags(3, 1, slots=1), [*flags, "--tensorboard-log-interval", "1"], held=True)
        job.arm((1, 4, 1))  # the node of the last rank, which has Megatron's writer
        job.finished()
    finally:
        jobs.end()
    series: dict[str, dict[int, float]] = {}
    for path in board.glob("events.out.*"):
        data = EventAccumulator(str(path))
        data.Reload()
        for tag in data.Tags()["scalars"]:
            series.setdefault(tag, {}).update({e.step: e.value for e in data.Scalars(tag)})
    assert set(series["deadpool/blocked-seconds"]) == set(range(1, 9))
    # What the lost node logged last may have died in the queue of its writer's thread.
    assert set(range(1, 9)) - {4} <= set(series["lm loss"]) <= set(range(1, 9))
    assert all(value >= 0 for value in series["deadpool/blocked-seconds"].values())
    assert set(series["deadpool/replicas"].values()) == {2}
    assert series["deadpool/epoch"][2] == 0 and series["deadpool/epoch"][8] == 1
    assert series["deadpool/recoveries"][8] == 1 and series["deadpool/last-recovery-seconds"][8] > 0
    # An iteration whose generation was skipped has copied nothing: no slot was free, the agents were slow.
    copied = series["deadpool/snapshot-bytes"].values()
    assert any(copied) and all(value == 0 or value > 1_000_000 for value in copied)
