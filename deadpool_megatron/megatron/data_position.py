"""Data iterators at a position of a generation: for a spare, at the start of a new job, and for a way back so far that
nobody remembers the microbatches any more."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

from deadpool_megatron.cluster import records as r
from deadpool_megatron.durable import split_small
from deadpool_megatron.megatron.host import Call, Fields
from deadpool_megatron.snapshot import capture_host_rng, decode, restore_host_rng
from deadpool_megatron.vault import SlotWriter, Version

# What upstream's first call replaces by a number of its own (``--full-validation``), after it has used it.
_REPLACED: Final = ("eval_iters",)


class DataPosition:
    """Builds Megatron's data iterators where a generation stands, and again where another one does.

    Upstream builds them in ``pretrain``, once a model chunk; what it was called with is remembered here.
    """

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def build(self, call: Call, fields: Fields, at: r.Generation | bytes | None) -> Any:
        """What upstream's call returns (train, validation and test data), at the position of a generation.

        Args:
            at: the generation, in the own vault, or its small state; None: where ``fields`` stand.

        Raises VaultError when the vault does not hold it as it was written; nothing has been built then.
        """
        saved = None if at is None else _saved_args(at)
        first = not self._calls
        self._calls.append(call)
        if saved is None:
            return call()
        fields.put(_found(saved, fields, first))
        iterators = build_here(call)
        fields.put(saved)  # a spare's are not those that the others have agreed on by broadcast
        return iterators

    def rebuild(self, fields: Fields, at: r.Generation) -> list[Any]:
        """All train and validation iterators anew, at a generation in the own vault, without any communication.

        In the order of the model chunks: [train, valid], or [[train ...], [valid ...]].
        """
        saved = _saved_args(at)
        built: list[Any] = []
        for number, call in enumerate(self._calls):
            fields.put(_found(saved, fields, number == 0))
            with _alone():
                built.append(build_here(call))
        fields.put(saved)
        return [[each[0] for each in built], [each[1] for each in built]]


def _found(saved: dict[str, Any], fields: Fields, first: bool) -> dict[str, Any]:
    """What upstream's call has found at the start of the job, but for the position."""
    return saved | {name: fields.settings[name] for name in _REPLACED if first and name in saved}


def _saved_args(at: r.Generation | bytes) -> dict[str, Any]:
    if isinstance(at, bytes):
        small = at
    else:
        writer = SlotWriter(at.path)
        small, _ = split_small(writer.read(Version(at.version_epoch, at.generation))[0])
        writer.close()
    saved: dict[str, Any] = decode(small)["args"]
    return saved


def build_here(call: Call) -> Any:
    """Upstream's iterators. Where this node lacks the index of a data set, it is made here.

    Upstream's rank 0 makes those files when a job starts, for itself and for whoever sees its file system; a node that
    comes later, with a disk of its own, has to make its own.
    """
    try:
        return call()
    except FileNotFoundError as err:
        print(f"deadpool: {err}: this node makes the index of its data sets itself", file=sys.stderr, flush=True)
    lock = Path(tempfile.gettempdir()) / f"deadpool-index-{os.getuid()}.lock"
    get_rank = torch.distributed.get_rank
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # not two workers of a node at once, as rank 0 does it before all others
        try:
            torch.distributed.get_rank = lambda group=None: get_rank(group) if group is not None else 0
            return call()
        finally:
            torch.distributed.get_rank = get_rank


def random_numbers() -> Callable[[], None]:
    """Sets Python's, numpy's and torch's (CPU and device) to where they are now."""
    host, device = capture_host_rng(), torch.cuda.get_rng_state()

    def restore() -> None:
        restore_host_rng(host)
        torch.cuda.set_rng_state(device)

    return restore


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Upstream agrees on flags by collectives while it builds iterators; what they agreed on is in the small state."""
    names = ("broadcast", "all_reduce", "barrier")
    kept = {name: getattr(torch.distributed, name) for name in names}
    try:
        for name in names:
            setattr(torch.distributed, name, _nothing)
        yield
    finally:
        for name, function in kept.items():
            setattr(torch.distributed, name, function)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
