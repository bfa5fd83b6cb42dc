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
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.utils.data

_CHILD = "deadpool_megatron.emulation.child"


_HELPERS = "megatron.core.datasets.utils"


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


def _without_helpers(module: ModuleType) -> None:
    # The wheel has the dataset helpers compiled, but upstream's function runs `make`, whose Makefile it lacks.
    module.compile_helpers = lambda: None  # type: ignore[attr-defined]


class _Loader(importlib.abc.Loader):
    """Runs the module's own loader, then `_without_helpers`."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _without_helpers(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds that module with the other finders and puts `_Loader` around its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname == _HELPERS else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
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


class _Gathering:
    """The work of an all-gather into padded tensors; waiting for it cuts them to size."""

    def __init__(self, work: Any, padded: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
        self._work = work
        self._padded = padded
        self._wanted = wanted

    def wait(self, *args: Any) -> bool:
        """As `Work.wait`."""
        done: bool = self._work.wait(*args)
        with torch.no_grad():
            for whole, part in zip(self._padded, self._wanted, strict=True):
                part.view(-1).copy_(whole[: part.numel()])
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _gather_unlike_sizes() -> None:
    """What NCCL can and Gloo cannot: an all-gather of tensors whose sizes differ, as layer-wise optimizers do it."""
    native = c10d.all_gather

    @functools.wraps(native)
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        sizes = {each.numel() for each in tensor_list}
        if len(sizes) < 2:
            return native(tensor_list, tensor, group, async_op)
        padded = [each.new_zeros(max(sizes)) for each in tensor_list]
        mine = tensor.new_zeros(max(sizes))
        with torch.no_grad():
            mine[: tensor.numel()].copy_(tensor.reshape(-1))
        work = native(padded, mine, group, True)
        if work is None:  # this rank is not in the group
            return None
        gathering = _Gathering(work, padded, tensor_list)
        if async_op:
            return gathering
        gathering.wait()
        return None

    for module in (c10d, dist):
        module.all_gather = all_gather


def install() -> None:
    """Install all of it. Modules that are imported already are changed at once."""
    for name in ("init_process_group", "new_group"):
        _on_gloo(name)
    _gather_unlike_sizes()
    _emulate_children()
    loader: Any = torch.utils.data.DataLoader
    original_init = loader.__init__

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["pin_memory"] = False
        original_init(self, *args, **kwargs)

    loader.__init__ = init
    # It warns at every fork of the tracker that device and CPU generator are one; here they are, by design.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    if _HELPERS in sys.modules:
        _without_helpers(sys.modules[_HELPERS])
    sys.meta_path.insert(0, _Finder())
