"""Changes to modules of other packages right after they are imported, whoever imports them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_changes: dict[str, Callable[[ModuleType], None]] = {}


def after_import(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call ``change`` with the module ``name`` once it is imported; now, if it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _changes[name] = change
    if name in sys.modules:
        change(sys.modules[name])


def module(name: str, /, **members: Any) -> ModuleType:
    """A module that is imported under this name from now on."""
    made = sys.modules[name] = ModuleType(name)
    made.__dict__.update(members)
    return made


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
    """Finds those modules on the path and puts `_Loader` around their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = _changes.get(fullname)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, change)
        return spec
