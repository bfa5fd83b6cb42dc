"""Imports between the package's rooms run one way: docs/architecture.md, "The house"."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import deadpool_megatron

ROOT = Path(deadpool_megatron.__file__).parent

# Who knows nobody but these (and itself). What is not named here stands above and may know everybody.
BELOW = {
    "cluster.core": {"cluster.placement", "cluster.records", "vault", "durable"},
    "cluster.placement": {"cluster.records", "vault", "yaml_file"},  # (a file of failure domains)
    "cluster.records": {"points", "durable"},
    "cluster.link": set[str](),
    "cluster.store": set[str](),
    "cluster.coordinator": {
        *("cluster.core", "cluster.link", "cluster.records", "cluster.store"),
        *("durable", "vault", "observe", "points"),
    },
    "cluster.agent": {
        *("cluster.placement", "cluster.records", "cluster.link", "cluster.store", "cluster.notices"),
        *("config", "durable", "vault", "observe", "output", "points"),
    },
    "vault": {"points"},
    "durable": {"vault"},
    "snapshot": {"vault", "points"},
    "comm": set[str](),
    "recovery": {"comm", "vault", "output", "points", "cluster.records"},
    "observe": {"", "cluster.records", "options", "output"},
    "output": set[str](),
    "jobs": {"observe"},
    "options": set[str](),
    "points": set[str](),
    "yaml_file": set[str](),
    "compat": set[str](),
    "support": {"compat"},
    "emulation": set[str](),
    "megatron": {
        *("", "cluster.records", "cluster.agent", "comm", "compat", "config", "durable", "emulation", "points"),
        *("recovery", "snapshot", "support", "vault"),
    },
    "megatron.lm": {"compat", "config", "megatron"},
    "megatron.bridge": {"compat", "config", "megatron", "support"},
    "simulate": {"observe", "options"},
    "doctor": {"compat", "cluster.link", "options"},
}
# The rooms of training loops, and the packages that each is the only one to import.
LOOPS = {"megatron.lm": "megatron.training", "megatron.bridge": "megatron.bridge"}
# Pure packages know no socket, clock, file or torch.
PURE = ("cluster.core", "cluster.placement")
WORLD = {"socket", "time", "os", "pathlib", "threading", "subprocess", "torch", "zmq", "asyncio"}


def _name(path: Path) -> str:
    return ".".join(("deadpool_megatron", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {_name(path): path for path in ROOT.rglob("*.py")}


def _room(module: str) -> str:
    parts = module.split(".")[1:]
    inside = parts[:1] == ["cluster"] or ".".join(parts[:2]) in LOOPS
    return ".".join(parts[: 2 if inside else 1])


def _imports(module: str) -> set[str]:
    out: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = module.split(".") + [""] * (MODULES[module].name == "__init__.py")
            out.add(".".join(base[: -node.level]) + f".{node.module}")
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            out |= full & MODULES.keys() or {str(node.module)}
    return out


@pytest.mark.parametrize("room", BELOW)
def test_a_room_knows_only_those_below_it(room: str) -> None:
    mine = [module for module in MODULES if _room(module) == room]
    assert mine, "there is no such room any more"
    known = {
        (module, other)
        for module in mine
        for other in _imports(module)
        if other.startswith("deadpool_megatron") and _room(other) not in {room, *BELOW[room]}
    }
    assert not known


@pytest.mark.parametrize("room", LOOPS)
def test_one_room_knows_a_training_loop(room: str) -> None:
    """Another loop on megatron.core is another room beside it, and nothing else."""
    loop = LOOPS[room]
    assert {_room(m) for m in MODULES for other in _imports(m) if f"{other}.".startswith(f"{loop}.")} == {room}


def test_no_two_rooms_know_each_other() -> None:
    arrows = {
        (_room(module), _room(other))
        for module in MODULES
        for other in _imports(module)
        if other.startswith("deadpool_megatron.") and _room(other) != _room(module)
    }
    assert {pair for pair in arrows if pair[::-1] in arrows} == set()


def test_nobody_but_the_command_line_names_the_benches() -> None:
    """They know the package and are not installed with it: it must do without them."""
    assert {name for name, path in MODULES.items() if "deadpool_bench" in path.read_text()} == {"deadpool_megatron.cli"}


@pytest.mark.parametrize("room", PURE)
def test_a_pure_room_knows_nothing_of_the_world(room: str) -> None:
    known = {
        (module, other)
        for module in MODULES
        if _room(module) == room
        for other in _imports(module)
        if other.split(".")[0] in WORLD
    }
    assert not known


def test_no_two_test_files_have_one_name() -> None:
    """pytest could not collect them together, as `scripts/test.sh -m slow` does."""
    names = [path.name for path in Path(__file__).parents[1].rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
