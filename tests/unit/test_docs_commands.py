"""Every `deadpool` command in the documentation is one that the command takes; those that need no job are run."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from deadpool_megatron import cli
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.launcher.agent_options import check_agent
from docs_commands import PAGES, ROOT, commands

PLACEHOLDERS = {
    "N": "3", "S": "1", "P": "2", "R": "0", "T": "2", "K": "5", "I": "0", "G": "4", "HOST:PORT": "host:1234",
    "SCRIPT": "train.py", "$R": "0", "$HEAD": "10.0.0.1", "$rank": "0", "$ARGS": "--bf16",
}  # fmt: skip


def _words(command: str) -> list[str]:
    """The words behind ``deadpool``, placeholders filled in, what is optional given."""
    command = re.sub(r"\$\([^)]*\)", "--bf16", command)
    command = re.sub(r"[\[\]]", "", command).replace("...", "").rstrip(" &")
    command = re.split(r"\s[>|]\s", command)[0]
    return [PLACEHOLDERS.get(word, word) for word in shlex.split(command)[1:]]


class _Parsed(Exception):
    pass


CASES = [(page.name, command) for page in PAGES for command in commands(page, "deadpool")]


def test_there_are_commands_to_look_at() -> None:
    assert len(CASES) > 20 and len({page for page, _ in CASES}) > 5


@pytest.mark.parametrize(("page", "command"), CASES, ids=[f"{page}:{i}" for i, (page, _) in enumerate(CASES)])
def test_a_documented_command_is_one_that_deadpool_takes(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
        parse(parser, words)
        raise _Parsed

    if _words(command)[0] in ("check", "plan"):  # they start nothing
        monkeypatch.chdir(ROOT)
        without_bridge = "--recipe" in command and find_spec("megatron.bridge") is None
        assert cli.main(_words(command)) == (Exit.USAGE if without_bridge else 0)
        said = capsys.readouterr()
        assert "install megatron-bridge" in said.err if without_bridge else said.out
        return
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        try:
            cli.main(_words(command))
        except _Parsed:
            pass
        except SystemExit as ended:
            if ended.code:
                pytest.fail(f"{command}: {capsys.readouterr().err}")


def test_the_agents_of_the_page_for_ones_own_job_could_start(tmp_path: Path) -> None:
    from deadpool_megatron.launcher import add_agent_arguments

    found = [command for name, command in CASES if name == "megatron.md" and command.startswith("deadpool agent")]
    assert len(found) == 2
    for command in found:
        parser = argparse.ArgumentParser()
        add_agent_arguments(parser)
        options = parser.parse_args(_words(command)[1:])
        (tmp_path / "train.py").write_text("")
        options.script = str(tmp_path / "train.py")
        plan = check_agent(options, {})
        assert plan.launch.config.deadpool and plan.launch.nodes > plan.launch.spare_nodes > 0


def test_files_and_pages_that_the_documentation_names_are_there() -> None:
    missing = []
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#]+?\.(?:md|json))(?:#[^)]*)?\)", text):
            if not target.startswith("http") and not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
        for path in re.findall(r"`((?:scripts|configs|examples|tests|docs)/[\w./-]+?\.\w+)`", text):
            if not (ROOT / path).exists():
                missing.append(f"{page.name}: {path}")
    assert not missing


def test_headings_that_links_name_are_there() -> None:
    wrong = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*?\.md)?#([^)]+)\)", page.read_text()):
            text = (page.parent / target).read_text() if target else page.read_text()
            headings = [re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
                        for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]  # fmt: skip
            if anchor not in headings:
                wrong.append(f"{page.name}: {target}#{anchor}")
    assert not wrong
