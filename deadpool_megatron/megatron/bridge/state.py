"""What of Megatron-Bridge's ``GlobalState`` is state of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from deadpool_megatron.megatron.bridge.settings import arguments
from deadpool_megatron.megatron.host import Fields
from deadpool_megatron.megatron.optimizer_state import is_plain

_LOGGED: Final = "_flops_at_last_log"  # operations when the log had its last line; kept beside ``TrainState``
# A spare loads no checkpoint, and a process is where it is.
_OWN: Final = frozenset(("load", "pretrained_checkpoint", "save", "async_save", "rank", "local_rank"))


class Counters(Fields):
    """All of ``TrainState``, which a checkpoint that is loaded replaces by another object. Settings do not change."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._logged: float | None = None  # of a generation, until the log goes on where that was
        now = arguments(state)
        counters = vars(state.train_state)
        self.settings = {k: v for k, v in now.items() if k not in counters and k not in _OWN and is_plain(v)}

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        yield

    def training_begins(self) -> None: ...

    def read(self, iteration: int) -> dict[str, Any]:
        logged = getattr(self._state, _LOGGED, 0.0) if self._logged is None else self._logged
        return {**vars(self._state.train_state), "step": iteration, _LOGGED: logged}

    def write(self, saved: dict[str, Any]) -> None:
        vars(self._state.train_state).clear()
        self._logged = saved[_LOGGED]
        self.put({name: value for name, value in saved.items() if name != _LOGGED})

    def put(self, saved: Mapping[str, Any]) -> None:
        vars(self._state.train_state).update(saved)

    def log_begins(self, goes_on: bool) -> None:
        """The first look at the log since ``train`` was entered, which begins anew to count the operations of the next
        line. With ``goes_on`` that line began where the generation says."""
        if goes_on and self._logged is not None:
            setattr(self._state, _LOGGED, self._logged)
        self._logged = None
