"""Recipes of Megatron-Bridge, by name, with their settings as its set-up leaves them. Nothing is started or trained.

To be used under the emulation of CUDA, so that a machine without a device can judge recipes for any.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import math
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.bridge import hub
from deadpool_megatron.megatron.bridge.settings import refusals, values
from deadpool_megatron.support import PROCESSES_PER_NODE

# Devices a node, and the compute capability, of the machines that names of recipes say; of others 8, and a Hopper's.
# The first are those of Bridge's scripts/performance/argument_parser.py.
_PER_NODE: Final = {"gb200": 4, "gb300": 4, "vr200": 4, "r100": 1}
_CAPABILITY: Final = {"h100": "9.0", "b200": "10.0", "gb200": "10.0", "b300": "10.3", "gb300": "10.3"}
_NEWEST: Final = "10.3"
_PUBLISHED: Final = re.compile(r"_(\d+)gpu_([a-z0-9]+)_")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One, built for a job of some size.

    Attributes:
        name: as it was asked for.
        cfg: Bridge's ``ConfigContainer``.
        values: its settings by the names of Megatron-LM's ``args``.
        refused: settings of Bridge's own that are not supported, and why.
        machine: that its name says; "" where it says none.
        world_size: processes that train.
        per_node: processes a node.
        assumed: architectures that were not read from the hub, by name: whether their size is the model's.
        complaint: why Bridge would not train it as it is here (data that are not named, as a rule); nothing: it would.
    """

    name: str
    cfg: Any
    values: dict[str, Any]
    refused: list[tuple[str, str]]
    machine: str
    world_size: int
    per_node: int
    assumed: dict[str, bool]
    complaint: str


def version() -> str:
    """Bridge's."""
    from megatron.bridge import package_info

    return str(package_info.__shortversion__)


def performance_recipes() -> dict[str, Callable[[], Any]]:
    """Functions of Bridge's performance recipes of pre-training, by name; those of video models are left out."""
    out: dict[str, Callable[[], Any]] = {}
    for module in _modules("megatron.bridge.perf_recipes"):
        if ".wan." in f"{module.__name__}.":  # diffusion: no language model
            continue
        for name, function in list(vars(module).items()):
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if own and "_pretrain_" in name and name.endswith("_config") and not name.startswith("_"):
                out[name] = function
    return out


def build(
    name: str,
    overrides: Sequence[str] = (),
    nodes: int | None = None,
    per_node: int | None = None,
    function: Callable[[], Any] | None = None,
) -> Recipe:
    """A recipe with its settings as set-up leaves them.

    Args:
        name: of a performance recipe or of one of the library, as Bridge's ``run_recipe.py`` takes it, or
            ``module:function`` of one's own.
        overrides: ``section.field=value``, in Hydra's style.
        nodes: that train; else as many as take the processes that the name says, or the fewest that the layout fills,
            but two, so that one can be lost.
        per_node: processes a node; else of the machine that the name says, else 8.
        function: of that name, where it has been found already.

    Raises:
        UserError: there is no such recipe, its architecture cannot be had, or Bridge does not accept it.
    """
    published, machine = _published(name)
    per_node = per_node or _PER_NODE.get(machine, PROCESSES_PER_NODE)
    with _environment({"DEADPOOL_EMULATED_CAPABILITY": _capability(machine)}), hub.one_try_each() as assumed:
        try:
            cfg = (function or _find(name))()
            if overrides:
                _override(cfg, overrides)
            filled = math.lcm(fewest(cfg.model), per_node)
            world_size = nodes * per_node if nodes else published or max(filled, 2 * per_node)
            os.environ["WORLD_SIZE"] = str(world_size)
            complaint = _set_up(cfg)
            return Recipe(name, cfg, values(cfg), refusals(cfg), machine, world_size, per_node, assumed, complaint)
        except UserError as err:
            raise UserError(f"recipe {name}: {err}") from None
        except Exception as err:  # noqa: BLE001 - whatever Bridge, Megatron or the recipe cannot do here
            raise UserError(f"recipe {name}: {told(err)}") from None


def _published(name: str) -> tuple[int, str]:
    found = _PUBLISHED.search(name)
    return (int(found[1]), found[2]) if found else (0, "")


def _capability(machine: str) -> str:
    return _CAPABILITY.get(machine, _NEWEST) if machine else _CAPABILITY["h100"]


def _modules(package: str) -> Iterator[Any]:
    root = importlib.import_module(package)
    yield root
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
        yield importlib.import_module(found.name)


def _find(name: str) -> Callable[[], Any]:
    module, colon, function = name.partition(":")
    if colon:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            found: Callable[[], Any] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as err:
            raise UserError(f"{err}") from None
        return found
    from megatron.bridge import recipes

    library = {each: function for each, function in vars(recipes).items() if inspect.isfunction(function)}
    every = library | performance_recipes()  # in this order where both have it, as Bridge's run_recipe.py
    if name not in every:
        near = ", ".join(difflib.get_close_matches(name, every, 3))
        raise UserError(f"Megatron-Bridge has none of that name{'; near it: ' * bool(near)}{near}")
    return every[name]


def _override(cfg: Any, overrides: Sequence[str]) -> None:
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    process_config_with_overrides(cfg, cli_overrides=list(overrides))
    if any(word.lstrip("+").startswith("dataset.seq_length=") for word in overrides):
        cfg.model.seq_length = cfg.dataset.seq_length  # as Bridge's run_recipe.py does


def fewest(model: Any) -> int:
    """Processes that the layout of a model takes at least."""
    stages: int = model.pipeline_model_parallel_size
    tensors = model.tensor_model_parallel_size
    experts = (model.expert_model_parallel_size or 1) * (model.expert_tensor_parallel_size or tensors)
    return stages * math.lcm(tensors * model.context_parallel_size, experts if model.num_moe_experts else 1)


def _set_up(cfg: Any) -> str:
    """What Bridge's ``runtime_config_update`` does. Returns what its checks, which come last, find wrong."""
    from megatron.bridge.training import config
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    config.apply_environment_variables(cfg)
    if isinstance(cfg.mixed_precision, str):
        cfg.mixed_precision = get_mixed_precision_config(cfg.mixed_precision)
    if cfg.mixed_precision is not None:
        cfg.mixed_precision.finalize()
        cfg.mixed_precision.setup(cfg.model, cfg.optimizer, cfg.ddp)
    cfg.set_data_parallel_size()
    if cfg.comm_overlap is not None:
        cfg.comm_overlap.finalize()
        cfg.comm_overlap.setup(cfg.model, cfg.optimizer, cfg.ddp)
    try:
        cfg.validate()
    except (AssertionError, ValueError) as err:
        return told(err)
    return ""


def told(err: Exception) -> str:
    """An exception in one line."""
    return f"{type(err).__name__}: {next(iter(str(err).strip().splitlines()), '')}"


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """Recipes set variables for the process that trains."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
