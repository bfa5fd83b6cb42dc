"""Data iterators at a position of a generation: for a spare, at the start of a new job, and for a way back so far that
nobody remembers the microbatches any more."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

from deadpool_megatron.cluster import records as r
from deadpool_megatron.megatron.run_args import apply_args
from deadpool_megatron.snapshot import decode
from deadpool_megatron.vault import SlotWriter, Version

__all__ = ["DataPosition"]


class DataPosition:
    """Builds Megatron's data iterators where a generation stands, and again where another one does.

    Upstream builds them in ``pretrain``, once a model chunk; what it was called with is remembered here.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[[Any], Any], Any]] = []

    def build(self, original: Callable[[Any], Any], provider: Any, args: Namespace, at: r.Generation | None) -> Any:
        """What upstream's ``build_train_valid_test_data_iterators`` returns, at the position of a generation.

        Args:
            at: the generation, in the own vault; None: where ``args`` stand.
        """
        self._calls.append((original, provider))
        if at is None:
            return original(provider)
        saved = _saved_args(at)
        apply_args(args, saved)
        iterators = original(provider)
        apply_args(args, saved)  # a spare's are not those that the others have agreed on by broadcast
        return iterators

    def rebuild(self, args: Namespace, at: r.Generation) -> list[Any]:
        """All train and validation iterators anew, at a generation in the own vault, without any communication.

        In the order of the model chunks: [train, valid], or [[train ...], [valid ...]].
        """
        saved = _saved_args(at)
        built: list[Any] = []
        for original, provider in self._calls:
            apply_args(args, saved)
            with _alone():
                built.append(original(provider))
        apply_args(args, saved)
        return [[each[0] for each in built], [each[1] for each in built]]


def _saved_args(at: r.Generation) -> dict[str, Any]:
    writer = SlotWriter(at.path)
    small, _ = writer.read(Version(at.version_epoch, at.generation))
    writer.close()
    saved: dict[str, Any] = decode(small)["args"]
    return saved


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
