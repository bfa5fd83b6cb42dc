"""What the emulation changes in torch.distributed, the data loader and, once imported, in Megatron's modules."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import logging
import multiprocessing.forkserver
import multiprocessing.spawn
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.utils.data

_CHILD = "deadpool_megatron.emulation.child"


def _without_helpers(module: ModuleType) -> None:
    # The wheel has the dataset helpers compiled, but upstream's function runs `make`, whose Makefile it lacks.
    module.compile_helpers = lambda: None  # type: ignore[attr-defined]


def _quiet(module: ModuleType) -> None:
    # It warns at every fork of the tracker that device and CPU generator are one; here they are, by design.
    logging.getLogger(module.__name__).setLevel(logging.ERROR)


_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.datasets.utils": _without_helpers,
    "megatron.core.tensor_parallel.random": _quiet,
}


def _emulate_children() -> None:
    """Processes that multiprocessing starts are emulated too; forked ones are so already.

    Megatron's persistent checkpoint worker comes out of a fork server.
    """
    multiprocessing.forkserver.set_forkserver_preload([_CHILD, "__main__"])
    native = multiprocessing.spawn.get_command_line

    @functools.wraps(native)
    def get_command_line(**kwargs: Any) -> list[str]:
        line = list(native(**kwargs))
        if "-c" in line:  # else a frozen program, which has no such line
            code = line.index("-c") + 1
            line[code] = f"import {_CHILD}; {line[code]}"
        return line

    multiprocessing.spawn.get_command_line = get_command_line


class _Loader(importlib.abc.Loader):
    """Runs the module's own loader, then the change."""

    def __init__(self, inner: importlib.abc.Loader, change: Callable[[ModuleType], None]) -> None:
        self._inner = inner
        self._change = change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._change(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `_AFTER_IMPORT` with the other finders and puts `_Loader` around theirs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = _AFTER_IMPORT.get(fullname)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, change)
        return spec


def _on_gloo(name: str) -> None:
    """``init_process_group`` / ``new_group`` with Gloo in the place of NCCL, wherever they are looked up."""
    original = getattr(c10d, name)
    place = list(inspect.signature(original).parameters).index("backend")

    @functools.wraps(original)
    def on_gloo(*args: Any, **kwargs: Any) -> Any:
        backend = args[place] if len(args) > place else kwargs.get("backend")
        # WORLD without a backend would get one for every device type; a subgroup without one gets that of WORLD.
        chosen_by_device = backend is None and name == "init_process_group"
        if chosen_by_device or (isinstance(backend, str) and "nccl" in backend.lower()):
            if len(args) > place:
                args = (*args[:place], "gloo", *args[place + 1 :])
            else:
                kwargs["backend"] = "gloo"
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        return original(*args, **kwargs)

    setattr(c10d, name, on_gloo)
    setattr(dist, name, on_gloo)


def install() -> None:
    """Install all of it. Modules that are imported already are changed at once."""
    for name in ("init_process_group", "new_group"):
        _on_gloo(name)
    _emulate_children()
    loader: Any = torch.utils.data.DataLoader
    original_init = loader.__init__

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["pin_memory"] = False
        original_init(self, *args, **kwargs)

    loader.__init__ = init
    for name, change in _AFTER_IMPORT.items():
        if name in sys.modules:
            change(sys.modules[name])
    sys.meta_path.insert(0, _Finder())
