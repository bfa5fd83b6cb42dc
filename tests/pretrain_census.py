"""A pre-training script that writes down, at the begin of every iteration, all that lives in Megatron's process.

``CENSUS_DIR``/rank-R-PID.json: by iteration, every value that can be reached from the model, the optimizer, the
scheduler, ``args``, the data iterators, and the globals and class attributes of all ``megatron`` modules, by its path,
as a digest. The environment has the script too (``CENSUS_SCRIPT``).
"""

from __future__ import annotations

import enum
import json
import os
import random
import runpy
import sys
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xxhash
from megatron.training import get_args, training

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_MOST = 4096  # entries of a container that are looked at


class Census:
    """One look. Objects are named by the first path that leads to them."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._seen: set[int] = set()
        self._alive: list[Any] = []

    def visit(self, path: str, value: Any) -> None:
        """Take down ``value`` and all it leads to."""
        if isinstance(value, (enum.Enum, torch.dtype, torch.device, torch.Size)):
            self.found[path] = str(value)
        elif isinstance(value, (np.generic, *_PLAIN)):
            text = repr(value)
            self.found[path] = text if len(text) < 40 else xxhash.xxh3_64_hexdigest(text.encode())
        elif isinstance(value, torch.Tensor):
            self._tensor(path, value)
        elif isinstance(value, torch.Generator):
            self.found[path] = xxhash.xxh3_64_hexdigest(value.get_state().numpy().tobytes())
        elif isinstance(value, np.ndarray):
            if value.dtype != object:
                self.found[path] = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, (dict, list, tuple, deque, set, frozenset)):
            self._container(path, value)
        elif _is_megatrons(value) and self._first(value):
            for name, each in sorted(vars(value).items()):
                self.visit(f"{path}.{name}", each)

    def _first(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        self._alive.append(value)
        return True

    def _tensor(self, path: str, value: torch.Tensor) -> None:
        flat = value.detach().contiguous().reshape(-1)
        self.found[path] = xxhash.xxh3_64_hexdigest(flat.view(torch.uint8).numpy().tobytes())
        if value.grad is not None:
            self.visit(f"{path}.grad", value.grad)
        for name in ("main_grad", "main_param"):
            if hasattr(value, name):
                self.visit(f"{path}.{name}", getattr(value, name))

    def _container(self, path: str, value: Any) -> None:
        if not self._first(value) and not isinstance(value, tuple):
            return
        if isinstance(value, (set, frozenset)):
            plain = sorted(repr(each) for each in value if isinstance(each, _PLAIN))
            self.found[path] = f"{len(value)} {xxhash.xxh3_64_hexdigest(repr(plain).encode())}"
            return
        self.found[f"{path}#"] = str(len(value))
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, each in items[:_MOST]:
            name = key if isinstance(key, (str, int)) else type(key).__name__
            self.visit(f"{path}[{name}]", each)


def _is_megatrons(value: Any) -> bool:
    if isinstance(value, (type, ModuleType)) or (callable(value) and not isinstance(value, torch.nn.Module)):
        return False
    if isinstance(value, (torch.nn.Module, torch.optim.Optimizer)) or type(value).__name__ == "Namespace":
        return hasattr(value, "__dict__")
    return type(value).__module__.startswith("megatron.") and hasattr(value, "__dict__")


def look(model: Any, optimizer: Any, scheduler: Any, data: Any) -> dict[str, str]:
    """Everything, by path."""
    census = Census()
    census.visit("rng.torch", torch.get_rng_state())
    census.visit("rng.device", torch.cuda.get_rng_state())
    census.visit("rng.python", list(random.getstate()[1]))
    census.visit("rng.numpy", np.random.get_state()[1])
    roots = {"args": get_args(), "model": model, "optimizer": optimizer, "scheduler": scheduler, "data": data}
    for name, root in roots.items():
        census.visit(name, root)
    for module_name in sorted(name for name in sys.modules if name.split(".")[0] == "megatron"):
        module = sys.modules[module_name]
        for name, value in sorted(vars(module).items() if isinstance(module, ModuleType) else ()):
            if name.startswith("__"):
                continue
            if isinstance(value, type):
                for attribute, each in sorted(vars(value).items() if value.__module__ == module_name else ()):
                    if not attribute.startswith("__"):
                        census.visit(f"{module_name}:{name}.{attribute}", each)
            else:
                census.visit(f"{module_name}:{name}", value)
    return census.found


_step = training.train_step
_looks: dict[int, dict[str, str]] = {}


def train_step(*args: Any, **kwargs: Any) -> Any:
    """Upstream's, after a look."""
    _, data, model, optimizer, scheduler, *_ = args
    _looks[get_args().curr_iteration] = look(model, optimizer, scheduler, data)
    file = Path(os.environ["CENSUS_DIR"]) / f"rank-{os.environ['RANK']}-{os.getpid()}.json"
    new = file.with_suffix(".new")
    new.write_text(json.dumps(_looks))
    new.rename(file)
    return _step(*args, **kwargs)


training.train_step = train_step
script = os.environ["CENSUS_SCRIPT"]
sys.argv[0] = script
sys.path.insert(0, str(Path(script).parent))
runpy.run_path(script, run_name="__main__")
