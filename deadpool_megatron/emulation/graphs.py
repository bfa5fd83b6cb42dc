"""``torch.cuda.CUDAGraph`` on the CPU: a tape of the operators that ran during capture, run again on the same memory.

As on a device, a replay runs no Python of the captured function: neither hooks nor schedule nor random number trackers.
Unlike there the capture computes, so the first replay after it has nothing left to do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

_NEW_MEMORY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


def _same_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor on the memory that ``tensor`` has now: setting its ``data`` does not move this one."""
    return tensor.detach()


class _Tape(TorchDispatchMode):  # type: ignore[misc]  # torch has no types for it
    """Notes each operator with the memory it read and wrote."""

    now: ClassVar[_Tape | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Callable[[], None]] = []
        self.waiting = False
        self._asked: dict[Any, int] = {}  # the works of the capture, by their number on the tape
        self._works: dict[int, list[Any]] = {}  # those of a replay that nobody has waited for yet

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        given = [_same_memory(each) if isinstance(each, torch.Tensor) else each for each in leaves]
        out = func(*args, **kwargs)
        if self.waiting:
            return out
        results = tree_flatten(out)[0]
        if func.namespace == "c10d":
            number = len(self.entries)
            self._asked.update(dict.fromkeys(_works_in(results), number))
            self.entries.append(lambda: self._communicate(number, func, given, spec))
            return out
        memory = {each.untyped_storage().data_ptr() for each in given if isinstance(each, torch.Tensor)}
        fresh = [
            (place, _same_memory(each))
            for place, each in enumerate(results)
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in memory
        ]
        name = func._schema.name.split("::")[-1]
        if func._schema.is_mutable or (fresh and name not in _NEW_MEMORY):
            self.entries.append(lambda: self._compute(func, given, spec, fresh))
        return out

    def _compute(self, func: Any, given: list[Any], spec: Any, fresh: list[tuple[int, torch.Tensor]]) -> None:
        args, kwargs = tree_unflatten(given, spec)
        results = tree_flatten(func(*args, **kwargs))[0]
        for place, target in fresh:
            target.copy_(results[place])

    def _communicate(self, number: int, func: Any, given: list[Any], spec: Any) -> None:
        args, kwargs = tree_unflatten(given, spec)
        self._works[number] = _works_in(tree_flatten(func(*args, **kwargs))[0])

    def waited_for(self, work: Any) -> None:
        """The captured function has waited for ``work`` here."""
        number = self._asked.get(work)
        if number is not None:
            self.entries.append(lambda: self._wait(number))

    def _wait(self, number: int) -> None:
        for work in self._works.pop(number, ()):
            work.wait()

    def replay(self) -> None:
        """To its end: behind a kernel that is aborted the others run all the same, on garbage. Then raises what the
        first one has raised."""
        self._works.clear()
        broken: Exception | None = None
        rest: list[Callable[[], None]] = [functools.partial(self._wait, number) for number in self._asked.values()]
        with torch.no_grad():
            for entry in (*self.entries, *rest):
                try:
                    entry()
                except Exception as err:  # noqa: BLE001 - whatever a collective raises
                    broken = broken or err
        if broken is not None:
            raise broken


def _works_in(results: list[Any]) -> list[Any]:
    """The works among what an operator of c10d returns."""
    boxed = [each for each in results if isinstance(each, torch.ScriptObject)]
    return [torch._C._distributed_c10d.Work.unbox(each) for each in boxed]


_samples = False


@contextlib.contextmanager
def captured_with_samples() -> Iterator[None]:
    """What graphs compute while they are captured herein is not wanted: their first replay runs, as on a device."""
    global _samples
    before, _samples = _samples, True
    try:
        yield
    finally:
        _samples = before


class CUDAGraph:
    """As `torch.cuda.CUDAGraph`, of which it has what Megatron uses."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.tape: _Tape | None = None
        self._computed = False

    def register_generator_state(self, state: torch.Generator) -> None:
        """Nothing to do: the tape holds the generators it has used."""

    def captured(self, tape: _Tape) -> None:
        self.tape, self._computed = tape, not _samples

    def replay(self) -> None:
        """Run what was captured on the memory of then. Raises what a collective raises."""
        if self.tape is None:
            raise RuntimeError("nothing has been captured in this graph")
        if self._computed:
            self._computed = False
        else:
            self.tape.replay()

    def reset(self) -> None:
        self.tape = None


class Capture:
    """``with torch.cuda.graph(graph):``"""

    def __init__(self, graph: CUDAGraph, *args: Any, **kwargs: Any) -> None:
        self._graph = graph
        self._tape = _Tape()

    def __enter__(self) -> None:
        _Tape.now = self._tape
        self._tape.__enter__()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._tape.__exit__(kind, value, trace)
        _Tape.now = None
        if kind is None:
            self._graph.captured(self._tape)


def install() -> None:
    """Work that Gloo does while it is waited for belongs to the collective, which the tape has. There are no pools."""
    native = torch._C._distributed_c10d.Work.wait

    @functools.wraps(native)
    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        tape = _Tape.now
        if tape is None:
            return native(self, *args, **kwargs)
        tape.waiting = True
        try:
            return native(self, *args, **kwargs)
        finally:
            tape.waiting = False
            tape.waited_for(self)

    torch._C._distributed_c10d.Work.wait = wait
    for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        setattr(torch._C, name, lambda *args: None)


def is_capturing() -> bool:
    return _Tape.now is not None


def noted(change: Callable[[], None]) -> None:
    """Do what no operator does, and at its place in each replay of the graph that is being captured."""
    tape = _Tape.now
    if tape is None:
        change()
        return
    tape.waiting = True
    try:
        change()
    finally:
        tape.waiting = False
    tape.entries.append(change)


def launched(kernel: Callable[..., Any], *args: Any) -> Any:
    """What ``kernel(*args)`` returns, one entry on the tape whatever operators it runs: in a replay it is called with
    the same memory, and its tensors of that time, whose shapes are the same, go where the first ones are."""
    tape = _Tape.now
    if tape is None:
        return kernel(*args)
    given = [_same_memory(each) if isinstance(each, torch.Tensor) else each for each in args]
    tape.waiting = True
    try:
        out = kernel(*args)
    finally:
        tape.waiting = False
    targets = [_same_memory(each) if isinstance(each, torch.Tensor) else None for each in tree_flatten(out)[0]]

    def again() -> None:
        for target, result in zip(targets, tree_flatten(kernel(*given))[0], strict=True):
            if target is not None:
                target.copy_(result)

    tape.entries.append(again)
    return out


class DefaultGenerator:
    """The device's default generator, whose state can be exchanged in a way that graphs see, as CUDA's."""

    def __init__(self) -> None:
        self._state: torch.Generator | None = None

    def clone_state(self) -> torch.Generator:
        """A state like the present one."""
        return torch.default_generator.clone_state()

    def graphsafe_get_state(self) -> torch.Generator:
        """The state in use, the object itself."""
        if self._state is None:
            self._state = torch.default_generator.clone_state()
        noted(self._take)
        return self._state

    def graphsafe_set_state(self, state: torch.Generator) -> None:
        """From now on numbers are drawn from ``state``."""
        noted(lambda: self._put(state))

    def _take(self) -> None:
        assert self._state is not None
        self._state.set_state(torch.default_generator.get_state())

    def _put(self, state: torch.Generator) -> None:
        self._state = state
        torch.default_generator.set_state(state.get_state())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.default_generator, name)
