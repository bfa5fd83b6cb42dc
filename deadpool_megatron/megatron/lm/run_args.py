"""Fields of Megatron's ``args`` that are state of the run, not settings: whoever changes them.

Found by looking, not by a list: a field is state once a checkpoint that is loaded has changed it, or once it differs
from what it was when training began.
"""

from __future__ import annotations

import contextlib
import copy
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any, Final

from deadpool_megatron.megatron.host import Fields
from deadpool_megatron.megatron.optimizer_state import is_plain

# State from the first iteration on, although upstream's set-up may leave them as they are.
_ALWAYS: Final = (
    "iteration",
    "curr_iteration",
    "consumed_train_samples",
    "consumed_valid_samples",
    "skipped_train_samples",
    "num_floating_point_operations_so_far",
    "do_train",
    "do_valid",
    "do_test",
    "eval_iters",
    "deadpool_first_iteration",
)
# A spare loads no checkpoint, and a process writes where it is told to.
_OWN: Final = frozenset(("load", "pretrained_checkpoint", "save", "async_save", "rank", "local_rank"))
_MISSING: Final = object()


class RunArgs(Fields):
    """Which fields are state, and what they are now.

    Attributes:
        flops: operations so far, which ``train`` counts in a local variable.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self.flops: float = 0.0
        self.settings = _plain(args)  # as the command line says, the same for the whole job
        self._names = set(_ALWAYS)
        self._before: dict[str, Any] = {}
        self._objects: dict[str, Any] = {}
        self._lists: list[str] = []

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        before = _plain(self._args)
        yield
        self._names.update(name for name, value in _plain(self._args).items() if before.get(name, _MISSING) != value)

    def training_begins(self) -> None:
        self.flops = self._args.num_floating_point_operations_so_far
        self._before = _plain(self._args)
        self._objects = dict(vars(self._args))
        self._lists = [name for name, value in self._before.items() if isinstance(value, list)]

    def read(self, iteration: int) -> dict[str, Any]:
        fields, objects = vars(self._args), self._objects
        out = {name: fields[name] for name in self._names if name in fields}
        replaced = [name for name, value in fields.items() if objects.get(name, _MISSING) is not value]
        for name in (*replaced, *self._lists):
            value = fields.get(name, _MISSING)
            if name not in _OWN and is_plain(value) and self._before.get(name, _MISSING) != value:
                out[name] = value
        # train() keeps these two in local variables; args has the values train() began with.
        return out | {"iteration": iteration, "num_floating_point_operations_so_far": self.flops}

    def write(self, saved: dict[str, Any]) -> None:
        """What has changed since `read` is as it was when training began."""
        for name in self.read(0).keys() - saved.keys():
            if name in self._before:
                setattr(self._args, name, copy.copy(self._before[name]))
            else:
                delattr(self._args, name)
        self.put(saved)
        self.flops = saved["num_floating_point_operations_so_far"]
        # Exactly these: a process that takes this up has not seen them change, and an older generation has fewer.
        self._names = {*_ALWAYS, *saved}

    def put(self, saved: Mapping[str, Any]) -> None:
        for name, value in saved.items():
            setattr(self._args, name, value)


def _plain(args: Namespace) -> dict[str, Any]:
    return {name: copy.copy(v) for name, v in vars(args).items() if name not in _OWN and is_plain(v)}
