"""The promise: loggers that cannot be written, or made, cost what is not written there, and no training."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deadpool_megatron.megatron.writers import Series, is_over, may_be_missing, never_fails


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


def test_a_spare_goes_without_a_logger_that_cannot_be_made_and_does_not_try_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried = 0

    class State:
        @property
        def wandb_logger(self) -> object:
            nonlocal tried
            tried += 1
            raise ConnectionError("Weights & Biases is away\nfor a while")

    taking_over = True
    may_be_missing(State, "wandb_logger", lambda: taking_over)
    state = State()
    assert state.wandb_logger is None
    taking_over = False
    assert state.wandb_logger is None and tried == 1
    said = capsys.readouterr().err
    assert said == "deadpool: this spare goes without what wandb_logger makes: Weights & Biases is away\n"


def test_upstreams_writer_of_weights_and_biases_may_be_missing_on_a_spare_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("megatron.training")
    from megatron.training import global_vars

    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    name, first = "_set_wandb_writer", global_vars._set_wandb_writer
    args = SimpleNamespace(wandb_project="p", wandb_exp_name="n", wandb_save_dir="", save="", rank=1, world_size=2)
    for taking_over in (False, True):
        monkeypatch.setattr(global_vars, name, first)
        may_be_missing(global_vars, name, lambda: taking_over)  # noqa: B023 - called in this round
        if taking_over:
            global_vars._set_wandb_writer(args)
        else:
            with pytest.raises(ModuleNotFoundError):
                global_vars._set_wandb_writer(args)
    assert global_vars._GLOBAL_WANDB_WRITER is None and "goes without" in capsys.readouterr().err


def test_a_run_of_weights_and_biases_that_is_finished_is_over() -> None:
    """The package is the writer; after ``finish`` its ``run`` is None, and ``log`` an error."""
    assert is_over(SimpleNamespace(run=None)) and not is_over(SimpleNamespace(run=object())) and not is_over(None)
