"""The promise: a TensorBoard directory without room costs what is not written there, and no training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deadpool_megatron.megatron.writers import Series, never_fails


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_a_full_disk_has_no_room_for_is_dropped_and_later_series_are_written(
    tmp_path: Path, room: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    now, said = 0.0, ""
    writer: Any = SummaryWriter(str(tmp_path), max_queue=1)
    never_fails(writer, lambda: now)
    room(200)
    while "cannot be written" not in said:
        writer.add_scalar("loss", 1.0, 7)
        time.sleep(0.01)
        said += capsys.readouterr().err
    writer.add_scalar("loss", 1.0, 8)
    writer.flush()
    room(1 << 30)
    now = 61.0
    writer.add_scalar("loss", 1.0, 9)
    writer.close()
    assert said.count("deadpool: ") == 1
    newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [each.step for each in EventAccumulator(str(newest)).Reload().Scalars("loss")] == [9]


def test_a_writer_is_guarded_once() -> None:
    writer = SimpleNamespace(add_scalar=lambda: 1, flush=lambda: 2, log_dir="")
    series, host = Series(), SimpleNamespace(writers=(writer, None))
    for _ in range(2):
        series.spare(host)  # type: ignore[arg-type]
    assert writer.add_scalar() == 1 and not hasattr(writer.add_scalar.__wrapped__, "__wrapped__")
