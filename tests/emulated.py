"""Tests whose bodies run in a process under the emulation, with Transformer Engine imported: one for a test module.

The process of pytest itself is never emulated: other tests would find another torch.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deadpool_megatron import emulation

__all__ = ["emulated_process", "in_emulation", "ranks_together"]

_pool: ProcessPoolExecutor | None = None


def _begin(environment: dict[str, str]) -> None:
    import os

    os.environ.update(environment)
    emulation.install()
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def emulated_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """The process; to be imported by the modules that use `in_emulation`. A module's EMULATED is its environment."""
    global _pool
    context = multiprocessing.get_context("forkserver")
    environment = getattr(request.module, "EMULATED", {})
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(environment,)) as _pool:
        yield
    _pool = None


def in_emulation[**P](test: Callable[P, None]) -> Callable[P, None]:
    """Run the test there. Its arguments must be such as can be pickled."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if emulation.is_installed():
            test(*args, **kwargs)
            return
        assert _pool is not None, "the module does not import emulated_process"
        _pool.submit(run, *args, **kwargs).result()

    return run


def ranks_together(rank: Callable[[int, str], None], number: int, directory: Path) -> None:
    """``rank(rank, directory)`` in a process for each of so many ranks, which emulates what it wants; all end well."""
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=rank, args=(each, str(directory))) for each in range(number)]
    try:
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
            assert each.exitcode == 0
    finally:
        for each in ranks:
            each.kill()


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Relative to the largest element."""
    got, want = got.detach().float(), want.detach().float()
    assert got.shape == want.shape
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    worst = (got - want).abs().max().item() if want.numel() else 0.0
    assert worst <= tolerance * scale, f"off by {worst:.3g}, of at most {scale:.3g}"
