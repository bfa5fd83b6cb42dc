"""Which loop a script runs is read from what it imports; Megatron-Bridge's own command line is left to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deadpool_megatron.config import without_ours

pytest.importorskip("megatron.core")

from deadpool_megatron.hosts import host_of
from deadpool_megatron.megatron.bridge import MegatronBridge
from deadpool_megatron.megatron.lm import MegatronLM


@pytest.mark.parametrize(
    "text",
    [
        "from megatron.bridge.training.pretrain import pretrain",
        "def main():\n    import megatron.bridge.training.finetune",
        "from megatron.bridge import training",
        "from recipes import own",
        "import recipes.own as recipe",
        "import recipes.another",
        "import recipes.near",
    ],
)
def test_a_script_that_imports_bridges_training_runs_bridges_loop(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.py").write_text("import script, megatron.bridge.training.config")
    (tmp_path / "recipes" / "another.py").write_text("from recipes.own import recipe")
    (tmp_path / "recipes" / "__init__.py").write_text("")
    (tmp_path / "recipes" / "near.py").write_text("from . import own")
    script = tmp_path / "script.py"
    script.write_text(text)
    assert isinstance(host_of(str(script)), MegatronBridge)


def test_a_file_that_cannot_be_read_by_us_is_left_to_who_runs_it(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("print 'Python 2'")
    script = tmp_path / "script.py"
    script.write_bytes("# coding: latin-1\nimport old  # für später\nimport megatron.training\n".encode("latin-1"))
    assert isinstance(host_of(str(script)), MegatronLM)


@pytest.mark.parametrize("text", ["from megatron.training import pretrain", "from megatron.bridge import AutoBridge"])
def test_any_other_script_runs_megatron_lms(tmp_path: Path, text: str) -> None:
    (tmp_path / "megatron").mkdir()  # a checkout, which may name Bridge here and there
    (tmp_path / "megatron" / "training.py").write_text("import megatron.bridge.training")
    script = tmp_path / "script.py"
    script.write_text(text)
    assert isinstance(host_of(str(script)), MegatronLM)


def test_a_script_without_our_parser_gets_its_overrides_alone() -> None:
    overrides = ["train.train_iters=4", "+a=b", "~c", "--recipe", "llama", "--", "-x"]
    ours = ["--deadpool", "--deadpool-lease", "5", "--deadpool-transport=tcp"]
    assert without_ours([*overrides[:2], *ours, *overrides[2:]]) == overrides
