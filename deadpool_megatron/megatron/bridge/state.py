"""What of Megatron-Bridge's ``GlobalState`` is state of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from deadpool_megatron.megatron.bridge.settings import arguments
from deadpool_megatron.megatron.host import Fields
from deadpool_megatron.megatron.optimizer_state import is_plain

# A spare loads no checkpoint, and a process is where it is.
_OWN: Final = frozenset(("load", "pretrained_checkpoint", "save", "async_save", "rank", "local_rank"))


class Counters(Fields):
    """All of ``TrainState``, which a checkpoint that is loaded replaces by another object. Settings do not change."""

    def __init__(self, state: Any) -> None:
        self._state = state
        now = arguments(state)
        counters = vars(state.train_state)
        self.settings = {k: v for k, v in now.items() if k not in counters and k not in _OWN and is_plain(v)}

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        yield

    def training_begins(self) -> None: ...

    def read(self, iteration: int) -> dict[str, Any]:
        return {**vars(self._state.train_state), "step": iteration}

    def write(self, saved: dict[str, Any]) -> None:
        vars(self._state.train_state).clear()
        self.put(saved)

    def put(self, saved: Mapping[str, Any]) -> None:
        vars(self._state.train_state).update(saved)
