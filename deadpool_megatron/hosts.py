"""Which training loop a script runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from deadpool_megatron.megatron.host import Host

_BRIDGE: Final = "megatron.bridge.training"


def host_of(script: str) -> Host:
    """Megatron-Bridge's where the script, or a file beside it that it imports, imports that; else Megatron-LM's."""
    if is_bridges(script):
        from deadpool_megatron.megatron.bridge import MegatronBridge

        return MegatronBridge()
    from deadpool_megatron.megatron.lm import MegatronLM

    return MegatronLM()


def is_bridges(script: str) -> bool:
    """Whether that is Megatron-Bridge's. Imports nothing."""
    file = Path(script)
    return _imports(file, file.parent, set())


def _imports(file: Path, root: Path, seen: set[Path]) -> bool:
    """Whether a file imports Bridge's training, or a file under ``root`` that it imports does."""
    seen.add(file)
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # who runs it hears of that
        return False
    for level, name in _imported(tree):
        if not level and f"{name}.".startswith(f"{_BRIDGE}."):
            return True
        if not level and name.partition(".")[0] == "megatron":  # a checkout beside the script is not the script
            continue
        place = (file.parents[level - 1] if level else root).joinpath(*name.split("."))
        for beside in (place.with_suffix(".py"), place / "__init__.py"):
            if beside.is_file() and beside not in seen and _imports(beside, root, seen):
                return True
    return False


def _imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names of modules, and of what may be one, wherever they are imported: the dots before it, and the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node.level, node.module
            package = f"{node.module}." if node.module else ""
            yield from ((node.level, package + alias.name) for alias in node.names)
