"""In-tree use: `deadpool patch check|apply|revert` puts a few lines of ours into a Megatron-LM checkout.

A patch set is one unified diff per upstream version in ``patches/``, with zero context and added lines only, so it
carries nothing of upstream. Lines are placed by number, which is safe because each file's ``index`` line has the full
git blob ids of the file before and after: a tree whose file is neither is refused. `git apply --unidiff-zero` and
`git hash-object` read and check the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from deadpool_megatron.cluster.records.exits import Exit


class PatchError(Exception):
    """A patch set or a tree cannot be used; the message is one line for the user."""


class State(Enum):
    """What a file is to a patch set."""

    CLEAN = "clean"
    APPLIED = "applied"
    OTHER = "other"


def blob_id(content: bytes) -> str:
    """What `git hash-object` prints for this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class FilePatch:
    """Lines to be added to one file.

    Args:
        path: relative to the checkout.
        before, after: git blob ids.
        hunks: (number of upstream's lines that precede, lines without their ends), in order.
    """

    path: str
    before: str
    after: str
    hunks: tuple[tuple[int, tuple[bytes, ...]], ...]

    def state(self, content: bytes) -> State:
        """Whether the content is the file before, after, or neither."""
        found = blob_id(content)
        return State.CLEAN if found == self.before else State.APPLIED if found == self.after else State.OTHER

    def apply(self, content: bytes) -> bytes:
        """The content with our lines. Raises PatchError when the result is not what the set promises."""
        lines = content.splitlines(keepends=True)
        for place, added in reversed(self.hunks):
            lines[place:place] = [line + b"\n" for line in added]
        return self._checked(b"".join(lines), self.after)

    def revert(self, content: bytes) -> bytes:
        """The content without our lines. Raises PatchError likewise."""
        lines = content.splitlines(keepends=True)
        for place, added in self.hunks:  # taken out from the top, so upstream's numbers hold at each
            if lines[place : place + len(added)] != [line + b"\n" for line in added]:
                raise PatchError(f"{self.path}: the added lines are not where the patch set has them")
            del lines[place : place + len(added)]
        return self._checked(b"".join(lines), self.before)

    def _checked(self, content: bytes, want: str) -> bytes:
        if blob_id(content) != want:
            raise PatchError(f"{self.path}: the patch set is damaged (the result is not the file it names)")
        return content


@dataclass(frozen=True, slots=True)
class PatchSet:
    """All files of one upstream version."""

    name: str
    files: tuple[FilePatch, ...]

    def states(self, tree: Path) -> dict[str, State | None]:
        """By path, the state of each file; None where the tree has no such file."""
        out: dict[str, State | None] = {}
        for file in self.files:
            try:
                out[file.path] = file.state((tree / file.path).read_bytes())
            except (FileNotFoundError, NotADirectoryError):
                out[file.path] = None
        return out


_INDEX = re.compile(rb"index ([0-9a-f]{40})\.\.([0-9a-f]{40}) [0-7]+")
_HUNK = re.compile(rb"@@ -(\d+),0 \+\d+(?:,(\d+))? @@")


def parse(name: str, text: bytes) -> PatchSet:
    """A patch set from its file. Raises PatchError for anything but added lines."""
    files: list[FilePatch] = []
    path, ids, hunks = b"", (b"", b""), list[tuple[int, tuple[bytes, ...]]]()
    lines = iter(text.splitlines())

    def finish() -> None:
        if path:
            files.append(FilePatch(path.decode(), ids[0].decode(), ids[1].decode(), tuple(hunks)))

    for line in lines:
        if line.startswith(b"diff --git a/"):
            finish()
            path, hunks = line.split(b" b/", 1)[1], []
        elif found := _INDEX.fullmatch(line):
            ids = (found[1], found[2])
        elif found := _HUNK.fullmatch(line):
            added = [next(lines, b"") for _ in range(int(found[2] or 1))]
            if any(not a.startswith(b"+") for a in added):
                raise PatchError(f"{name}: a hunk of {path.decode()} is not made of added lines alone")
            hunks.append((int(found[1]), tuple(a[1:] for a in added)))
        elif path and line and not line.startswith((b"--- a/", b"+++ b/")):
            raise PatchError(f"{name}: unexpected line {line.decode(errors='replace')!r}")
    finish()
    if not files:
        raise PatchError(f"{name}: no patch set")
    return PatchSet(name, tuple(files))


def load_sets() -> list[PatchSet]:
    """All patch sets there are, by name (the package's ``patches`` is the project's own directory)."""
    patches = Path(__file__).parents[1] / "patches"
    return [parse(path.stem, path.read_bytes()) for path in sorted(patches.glob("*.patch"))]


def find(tree: Path, sets: Sequence[PatchSet]) -> tuple[PatchSet, dict[str, State]]:
    """The set that belongs to a tree, and by path whether it is applied.

    Raises:
        PatchError: no Megatron-LM checkout, no set for it, or one of its files has been changed: which one.
    """
    if not (tree / "megatron" / "core" / "package_info.py").is_file():
        raise PatchError(f"{tree}: no Megatron-LM checkout (megatron/core/package_info.py is not there)")
    good = (State.CLEAN, State.APPLIED)
    states = {s.name: s.states(tree) for s in sets}
    for patch_set in sets:
        mine = {path: state for path, state in states[patch_set.name].items() if state in good}
        if len(mine) == len(patch_set.files):
            return patch_set, mine
    nearest = max(sets, key=lambda s: sum(state in good for state in states[s.name].values()))
    wrong = [path for path, state in states[nearest.name].items() if state not in good]
    if len(wrong) == len(nearest.files):
        known = ", ".join(s.name for s in sets)
        raise PatchError(f"{tree}: {' and '.join(wrong)}: of none of the versions there are patches for ({known})")
    what = "is not there" if states[nearest.name][wrong[0]] is None else "has been changed, or is of another version"
    raise PatchError(f"{tree}: {' and '.join(wrong)} {what} (nearest: {nearest.name}); nothing was touched")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.deadpool")
    temporary.write_bytes(content)
    os.chmod(temporary, path.stat().st_mode)
    os.replace(temporary, path)


def change(tree: Path, sets: Sequence[PatchSet], wanted: State) -> tuple[PatchSet, bool]:
    """Make the tree's files clean or applied; returns the set and whether anything had to be done.

    All results are computed and checked before the first file is written. Raises PatchError, OSError.
    """
    patch_set, states = find(tree, sets)
    results: dict[Path, bytes] = {}
    for file in patch_set.files:
        if states[file.path] is wanted:
            continue
        content = (tree / file.path).read_bytes()
        results[tree / file.path] = file.apply(content) if wanted is State.APPLIED else file.revert(content)
    for path, content in results.items():
        _write(path, content)
    return patch_set, bool(results)


# What goes into upstream's files, and where: at the end of the pattern's match. Where the package is not installed the
# script is what it was.
ATTACH = (
    b"# DeadPool: with --deadpool among the flags this process becomes a worker of its node's agent.",
    b"if __name__ == '__main__':",
    b"    import importlib.util",
    b"    import sys",
    b"",
    b"    if importlib.util.find_spec('deadpool_megatron'):",
    b"        from deadpool_megatron.intree import attach",
    b"",
    b"        attach()",
    b"    elif any(word.startswith('--deadpool') for word in sys.argv):",
    b"        sys.exit('deadpool: --deadpool: the package deadpool-megatron is not installed for this Python')",
    b"",
)
ARGUMENTS = (
    b"    # DeadPool: the group 'deadpool', see its --help.",
    b"    import importlib.util",
    b"",
    b"    if importlib.util.find_spec('deadpool_megatron'):",
    b"        from deadpool_megatron.config import add_arguments as add_deadpool_arguments",
    b"",
    b"        parser = add_deadpool_arguments(parser)",
    b"",
)
PLACES = (
    ("pretrain_gpt.py", rb"^(?=import json$)", ATTACH),
    ("megatron/training/arguments.py", rb"^def add_megatron_arguments\((?:.*\n)+?(?=    return parser$)", ARGUMENTS),
)


def make(tree: Path) -> bytes:
    """The patch set for an unchanged checkout. Raises PatchError where upstream has moved too far for it."""
    out = [b"DeadPool for Megatron-LM: lines added to upstream's files, placed by number, guarded by blob id."]
    for path, pattern, added in PLACES:
        content = (tree / path).read_bytes()
        found = re.search(pattern, content, re.MULTILINE)
        if found is None or b"deadpool" in content:
            raise PatchError(f"{tree / path}: no place for our lines: change PLACES in {Path(__file__).name}")
        place = content[: found.end()].count(b"\n")
        lines = content.splitlines(keepends=True)
        after = b"".join([*lines[:place], *(a + b"\n" for a in added), *lines[place:]])
        name = path.encode()
        out += [
            b"diff --git a/%s b/%s" % (name, name),
            b"index %s..%s 100644" % (blob_id(content).encode(), blob_id(after).encode()),
            b"--- a/" + name,
            b"+++ b/" + name,
            b"@@ -%d,0 +%d,%d @@" % (place, place + 1, len(added)),
            *(b"+" + a for a in added),
        ]
    return b"\n".join(out) + b"\n"


def add_patch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("check", "apply", "revert", "make"),
        help="check: does a set match, is it applied; apply, revert: put its lines in, take them out; make: print "
        "a set for a version that has none",
    )
    parser.add_argument("--megatron", required=True, metavar="DIR", help="the Megatron-LM checkout")


def run(options: argparse.Namespace) -> int:
    tree = Path(options.megatron)
    try:
        if options.action == "make":
            sys.stdout.write(make(tree).decode())
            return 0
        sets = load_sets()
        if options.action == "check":
            patch_set, states = find(tree, sets)
            lacking = [path for path, state in states.items() if state is State.CLEAN]
            does = "can be applied" if len(lacking) == len(states) else "is applied"
            half = f" but to {' and '.join(lacking)}: apply or revert it" if lacking and does == "is applied" else ""
            print(f"deadpool: {tree}: {patch_set.name} {does}{half}")
            return 0
        patch_set, changed = change(tree, sets, State.APPLIED if options.action == "apply" else State.CLEAN)
        done = {"apply": "applied", "revert": "reverted"}[options.action]
        print(f"deadpool: {tree}: {patch_set.name} {done if changed else 'was ' + done + ' already'}")
        return 0
    except PatchError as err:
        print(f"deadpool: {err}", file=sys.stderr)
    except OSError as err:
        print(f"deadpool: {err.filename}: {err.strerror}", file=sys.stderr)
    return Exit.USAGE
