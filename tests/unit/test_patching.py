"""A patch set adds its lines to exactly the files it was made for, takes them out again, and refuses any other tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deadpool_megatron.cli import main
from deadpool_megatron.intree.patching import (
    PatchError,
    PatchSet,
    State,
    blob_id,
    change,
    find,
    load_sets,
    make,
    parse,
)
from upstream import VERSIONS, git

ENTRY = "pretrain_gpt.py"
ARGUMENTS = "megatron/training/arguments.py"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Something with the shape of a checkout."""
    root = tmp_path / "checkout"
    files = {
        "megatron/core/package_info.py": "MAJOR = 0\n",
        ENTRY: "import time\n\nimport json\nprint(json)\n",
        ARGUMENTS: "def add_megatron_arguments(parser):\n    parser = more(parser)\n\n    return parser\n",
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / ENTRY).chmod(0o755)
    return root


def contents(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in sorted(tree.rglob("*")) if p.is_file()}


def made(tree: Path) -> list[PatchSet]:
    return [parse("made", make(tree))]


def test_what_is_applied_is_reverted_to_the_last_byte_and_keeps_its_mode(tree: Path) -> None:
    before, sets = contents(tree), made(tree)
    assert change(tree, sets, State.APPLIED) == (sets[0], True)
    after = contents(tree)
    assert set(after) == set(before) and after[ENTRY] != before[ENTRY] and after[ARGUMENTS] != before[ARGUMENTS]
    assert all(b"deadpool" in after[path] for path in (ENTRY, ARGUMENTS))
    compile(after[ENTRY], ENTRY, "exec")
    compile(after[ARGUMENTS], ARGUMENTS, "exec")
    assert change(tree, sets, State.APPLIED) == (sets[0], False) and contents(tree) == after
    assert change(tree, sets, State.CLEAN) == (sets[0], True) and contents(tree) == before
    assert (tree / ENTRY).stat().st_mode & 0o777 == 0o755


def test_without_the_package_a_patched_script_is_what_it_was(tree: Path) -> None:
    change(tree, made(tree), State.APPLIED)
    bare = [sys.executable, "-S", "-E"]  # no site directory, so no package

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*bare, *words], cwd=tree, capture_output=True, text=True, check=False)

    plain = run(ENTRY, "--num-layers", "2")
    assert plain.returncode == 0 and "module 'json'" in plain.stdout, plain.stderr
    asked = run(ENTRY, "--deadpool")
    assert asked.returncode == 1 and asked.stderr.splitlines() == [
        "deadpool: --deadpool: the package deadpool-megatron is not installed for this Python"
    ]
    call = "from megatron.training import arguments as a; a.more = list; print(a.add_megatron_arguments(()))"
    assert run("-c", call).stdout == "[]\n"


def test_git_reads_the_same_sets(tree: Path, tmp_path: Path) -> None:
    before, patch = contents(tree), tmp_path / "set.patch"
    patch.write_bytes(make(tree))
    subprocess.run(["git", "apply", "--unidiff-zero", str(patch)], cwd=tree, check=True)
    by_git = contents(tree)
    change(tree, [parse("made", patch.read_bytes())], State.CLEAN)
    assert contents(tree) == before
    change(tree, [parse("made", patch.read_bytes())], State.APPLIED)
    assert contents(tree) == by_git


@pytest.mark.parametrize("path", [ENTRY, ARGUMENTS])
def test_a_changed_file_is_named_and_nothing_is_touched(tree: Path, path: str) -> None:
    sets = made(tree)
    with (tree / path).open("a") as f:
        f.write("# mine\n")
    before = contents(tree)
    with pytest.raises(PatchError, match=f"{path} has been changed"):
        change(tree, sets, State.APPLIED)
    assert contents(tree) == before


def test_a_missing_file_an_unknown_version_and_no_checkout_are_told_apart(tree: Path, tmp_path: Path) -> None:
    sets = made(tree)
    (tree / ENTRY).unlink()
    with pytest.raises(PatchError, match=f"{ENTRY} is not there"):
        find(tree, sets)
    (tree / ENTRY).write_text("other\n")
    (tree / ARGUMENTS).write_text("other\n")
    with pytest.raises(PatchError, match="of none of the versions there are patches for"):
        find(tree, sets)
    with pytest.raises(PatchError, match="no Megatron-LM checkout"):
        find(tmp_path, sets)


def test_an_apply_that_was_interrupted_is_completed_or_undone(tree: Path) -> None:
    before, sets = contents(tree), made(tree)
    change(tree, sets, State.APPLIED)
    (tree / ENTRY).write_bytes(before[ENTRY])
    assert find(tree, sets)[1] == {ENTRY: State.CLEAN, ARGUMENTS: State.APPLIED}
    change(tree, sets, State.APPLIED)
    assert set(find(tree, sets)[1].values()) == {State.APPLIED}
    (tree / ENTRY).write_bytes(before[ENTRY])
    change(tree, sets, State.CLEAN)
    assert contents(tree) == before


def test_a_set_with_anything_but_added_lines_is_refused(tree: Path) -> None:
    text = make(tree)
    with pytest.raises(PatchError, match="not made of added lines alone"):
        parse("bad", text.replace(b"\n+        attach()\n", b"\n-        attach()\n"))
    with pytest.raises(PatchError, match="unexpected line"):
        parse("bad", text.replace(b"@@ -2,0", b"@@ -2,1"))
    with pytest.raises(PatchError, match="no patch set"):
        parse("bad", b"")


def test_a_damaged_set_changes_nothing(tree: Path) -> None:
    before, text = contents(tree), make(tree)
    with pytest.raises(PatchError, match="damaged"):
        change(tree, [parse("bad", text.replace(b"+        attach()", b"+        detach()"))], State.APPLIED)
    assert contents(tree) == before


def test_the_command_says_what_it_did_in_one_line(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "check", "--megatron", str(tree)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"deadpool: {tree}: ") and said.count("\n") == 1
    assert main(["patch", "make", "--megatron", str(tree)]) == 0
    assert parse("made", capsys.readouterr().out.encode()) == made(tree)[0]


def test_blob_ids_are_gits() -> None:
    done = subprocess.run(["git", "hash-object", "--stdin"], input=b"DeadPool\n", capture_output=True, check=True)
    assert blob_id(b"DeadPool\n") == done.stdout.decode().strip()


def test_there_is_a_set_for_every_supported_version_and_its_lines_are_ours() -> None:
    sets = load_sets()
    assert [s.name for s in sets] == list(VERSIONS)
    for patch_set in sets:
        assert [f.path for f in patch_set.files] == [ENTRY, ARGUMENTS]
        assert all(hunk == patch_set.files[0].hunks[0][1] for _, hunk in patch_set.files[0].hunks)


@pytest.mark.parametrize("name", VERSIONS)
def test_each_set_fits_its_upstream_version_applies_and_reverts(name: str, tmp_path: Path) -> None:
    for path in (ENTRY, ARGUMENTS, "megatron/core/package_info.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(git("show", f"{VERSIONS[name]}:{path}"))
    before = contents(tmp_path)
    cli = [sys.executable, "-m", "deadpool_megatron.cli", "patch"]
    for action, said in (("check", "can be applied"), ("apply", "applied"), ("check", "is applied")):
        done = subprocess.run([*cli, action, "--megatron", str(tmp_path)], capture_output=True, text=True, check=True)
        assert done.stdout == f"deadpool: {tmp_path}: {name} {said}\n"
    assert (tmp_path / ENTRY).read_bytes().count(b"attach()") == 1
    subprocess.run([*cli, "revert", "--megatron", str(tmp_path)], capture_output=True, check=True)
    assert contents(tmp_path) == before
    assert parse(name, make(tmp_path)) in load_sets()
