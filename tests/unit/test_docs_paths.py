"""Files that the docs name are there: a newcomer follows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Files of upstream, and what a user would call a script.
_OTHERS = {"pretrain_gpt.py", "gpt_builders.py", "model_provider.py", "train.py", "training.py", "schedules.py"}
_OTHERS |= {f"pretrain_{name}.py" for name in ("hybrid", "mamba", "bert", "t5", "vlm", "vision_*")} | {"train_rl.py"}


def _there(name: str) -> bool:
    if "*" in name or name in _OTHERS or name.startswith("megatron/training/"):
        return True
    bases = (ROOT, ROOT / "deadpool_megatron", ROOT / "deadpool_megatron" / "cluster", ROOT / "tests")
    return any((base / name).exists() for base in bases) or any(ROOT.glob(f"[dts]*/**/{name}"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_file_that_is_named_is_there(page: Path) -> None:
    named = set(re.findall(r"`([\w*/.]+\.py)`", page.read_text()))
    assert not [name for name in sorted(named) if not _there(name)]
