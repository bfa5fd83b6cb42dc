"""The promise: bytes and the words that announce them are seen in order, on processors that keep no order."""

from __future__ import annotations

import ast
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import deadpool_megatron
from deadpool_megatron.vault import Arena, SlotWriter, Vault, words
from deadpool_megatron.vault.words import Words

PAGE = 4096
CHUNKS = 3
UNIQUE = CHUNKS * PAGE - 8
# words of an arena's first page by who stores them (see `arena`)
WORKERS = [24, *range(32, 37), *range(48, 53)]
AGENTS = [16, 17, 18, *range(40, 44), *range(56, 60)]
SEEDS = 10
FENCES = ("before a load", "after a load", "before a store", "after a store")


class WeakMachine:
    """Two processors over one memory, each free to store and to load in any order, but at a fence.

    Each has a copy of the memory. What its process stores gets into memory word by word, some time; what it loads is
    what memory had some time. At a fence all its stores are in memory, and all its loads are of now. One seed is one
    run: processes change places only at fences.

    Args:
        copies: of the memory as bytes, by the name of the process (and of its thread).
        own: the words that each one stores.
    """

    def __init__(self, seed: int, copies: dict[str, Any], own: dict[str, list[int]]) -> None:
        self.random, self.choice = random.Random(seed), np.random.default_rng(seed)
        self.copies = {name: np.frombuffer(view, dtype=np.uint64) for name, view in copies.items()}
        self.own = {name: np.array(places, dtype=np.int64) for name, places in own.items()}
        first, second = copies
        self.other = {first: second, second: first}
        self.memory = self.copies[first].copy()
        self.turns = {name: threading.Semaphore(0) for name in copies}
        self.running = first
        self.over = False

    def fence(self, there: bool = True) -> None:
        """Of the process that runs, unless it is not ``there``. Anything may happen just before and just after it."""
        if threading.current_thread().name not in self.copies:
            return  # the test itself looks
        self._anything()
        if there:
            me = self.running
            self._move(self.copies[me], self.memory, self.own[me], 1.0)
            self._move(self.memory, self.copies[me], self.own[self.other[me]], 1.0)
        self._anything()

    def _anything(self) -> None:
        """Some of what is under way arrives, or the other process runs."""
        what = self.random.randrange(8)
        if what < 4:
            name = list(self.copies)[what % 2]
            share = self.random.choice((0.1, 0.5, 0.9))
            if what < 2:
                self._move(self.copies[name], self.memory, self.own[name], share)
            else:
                self._move(self.memory, self.copies[name], self.own[self.other[name]], share)
        elif what == 4 and not self.over:
            me = self.running
            self.running = self.other[me]
            self.turns[self.running].release()
            self.turns[me].acquire()

    def _move(self, source: Any, target: Any, which: Any, share: float) -> None:
        """A ``share`` of the words ``which`` that differ."""
        places = which[source[which] != target[which]]
        if share < 1.0:
            places = places[self.choice.random(len(places)) < share]
        target[places] = source[places]

    def run(self, processes: dict[str, Callable[[], None]]) -> None:
        """Until one of them returns; the other one is called again and again. Raises what one of them raises."""
        (first, once), (second, again) = processes.items()
        failures: list[BaseException] = []

        def thread(name: str, body: Callable[[], None], repeat: bool) -> threading.Thread:
            def run() -> None:
                self.turns[name].acquire()
                try:
                    while not self.over:
                        body()
                        if not repeat:
                            break
                except BaseException as err:  # noqa: BLE001 (`run` raises it)
                    failures.append(err)
                self.over, self.running = True, self.other[name]
                self.turns[self.running].release()

            return threading.Thread(target=run, name=name)

        threads = [thread(first, once, False), thread(second, again, True)]
        for each in threads:
            each.start()
        self.turns[first].release()
        for each in threads:
            each.join()
        if failures:
            raise failures[0]


class Wrong(AssertionError):
    """A reader has taken bytes that the words did not announce."""


@contextmanager
def weak(machine: WeakMachine, *missing: str) -> Iterator[None]:
    """`Words` on that machine, some of its fences ``missing``."""

    def load(self: Words, index: int) -> int:
        machine.fence("before a load" not in missing)
        value: int = self._view[index]
        machine.fence("after a load" not in missing)
        return value

    def store(self: Words, index: int, value: int) -> None:
        machine.fence("before a store" not in missing)
        self._view[index] = value
        machine.fence("after a store" not in missing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "fence", machine.fence)
        if missing:
            patch.setattr(Words, "__getitem__", load)
            patch.setattr(Words, "__setitem__", store)
        yield


def announced(seed: int, *missing: str, counted: bool = False) -> int:
    """One run of who takes bytes back, writes them and announces them. How often a reader saw something new."""
    copies = {name: memoryview(bytearray(128)) for name in ("writer", "reader")}
    machine = WeakMachine(seed, copies, {"writer": list(range(16)), "reader": []})
    taken, shown = Words(copies["writer"]), Words(copies["reader"])
    seen: set[int] = set()

    def write() -> None:
        for version in range(1, 100):
            taken.add(1, 1) if counted else taken.__setitem__(1, version)
            copies["writer"].cast("Q")[8:] = memoryview(bytearray(np.full(8, version, dtype=np.uint64))).cast("Q")
            taken.add(0, 1) if counted else taken.__setitem__(0, version)

    def read() -> None:
        version = shown[0]
        data = copies["reader"].cast("Q")[8:].tolist()
        turn = shown[1]
        if not version <= min(data) <= max(data) <= turn:
            raise Wrong(f"{data} while {version} was announced and {turn} begun")
        seen.add(version)

    with weak(machine, *missing):
        machine.run({"writer": write, "reader": read})
    return len(seen)


@pytest.mark.parametrize("counted", [False, True])
def test_no_byte_is_seen_before_its_word_nor_after_it_was_taken_back(counted: bool) -> None:
    assert sum(announced(seed, counted=counted) for seed in range(SEEDS)) > 10 * SEEDS, "something new was seen at all"


def test_a_lock_of_this_python_is_one_that_makes_a_fence() -> None:
    assert sys.thread_info.lock in ("semaphore", "pymutex"), "see `words`: others have to be thought about first"


@pytest.mark.parametrize("missing", FENCES)
def test_each_fence_of_an_access_is_needed(missing: str) -> None:
    with pytest.raises(Wrong):
        for seed in range(50 * SEEDS):
            announced(seed, missing)


def train(writer: SlotWriter, chance: random.Random) -> None:
    """What a worker does; one shard in four is given up on the way."""
    for generation in range(250):
        slot = writer.open(0, generation, b"%08d" % generation)
        if slot is None:
            continue
        for chunk in range(CHUNKS if chance.random() < 0.75 else chance.randrange(CHUNKS)):
            writer.buffer[chunk * PAGE : (chunk + 1) * PAGE] = 1 + generation
            writer.publish(min((chunk + 1) * PAGE, UNIQUE))
        if slot.published == UNIQUE:
            writer.complete()


def keep(vault: Vault, arena: Arena, held: set[int]) -> None:
    """What an agent does: take checksums, send what is summed, give back what is complete."""
    vault.checksum(0, limit=1)
    for slot in arena.slots:
        turn = slot.turn
        if slot.checked_turn == turn:
            for entry in range(slot.checked):
                data = bytes(slot.chunk(entry - 1) if entry else slot.small[:8])
                if xxhash.xxh3_64_intdigest(data) != slot.sums[entry] and slot.turn == turn:
                    raise Wrong(f"entry {entry} is not what was summed in turn {turn}")
        version = slot.version
        if version is not None and slot.complete:
            small, unique = bytes(slot.small[: slot.small_bytes]), set(slot.unique)
            if slot.complete and slot.turn == turn:
                if int(small) != version.generation or unique != {1 + version.generation}:
                    raise Wrong(f"{version} is called complete, and has {small!r} and {sorted(unique)}")
                held.add(version.generation)
                vault.set_committed(*version)


def vaulted(seed: int, directory: Path, *missing: str) -> int:
    """One run of a worker and its agent over an arena. How many generations were given back."""
    vault = Vault(f"weak{seed}", 0, str(directory), chunk_bytes=PAGE)
    mine, theirs = Path(vault.allocate_own(0, UNIQUE, 64).path), directory / f"worker{seed}"
    theirs.write_bytes(mine.read_bytes())
    writer, arena = SlotWriter(str(theirs)), vault.arena(0, "own")
    assert arena is not None
    held: set[int] = set()
    page = PAGE // 8  # the checksums are on the two pages after the first one
    sums = [*range(page, page + 1 + CHUNKS), *range(2 * page, 2 * page + 1 + CHUNKS)]
    own = {"worker": [*WORKERS, *range(3 * page, len(arena.view) // 8)], "agent": [*AGENTS, *sums]}
    machine = WeakMachine(seed, {"worker": writer.arena.view, "agent": arena.view}, own)
    with weak(machine, *missing):
        machine.run({"worker": lambda: train(writer, random.Random(seed)), "agent": lambda: keep(vault, arena, held)})
    vault.close()
    return len(held)


def test_a_vault_gives_back_only_what_was_written(tmp_path: Path) -> None:
    assert sum(vaulted(seed, tmp_path) for seed in range(SEEDS)) > 10 * SEEDS, "something was given back at all"


def test_a_vault_without_fences_would_not(tmp_path: Path) -> None:
    with pytest.raises(Wrong):
        for seed in range(6 * SEEDS):  # about one in four goes wrong
            vaulted(seed, tmp_path, *FENCES)


def test_nothing_else_maps_shared_memory_or_reads_it_in_words() -> None:
    """Mappings and casts to words, by file: a new one has to be thought about here."""
    found: dict[str, set[str]] = {}
    root = Path(deadpool_megatron.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("mmap", "cast")
            ):
                found.setdefault(str(path.relative_to(root)), set()).add(ast.unparse(node))
    assert found == {
        "vault/words.py": {"view.cast('Q')"},
        "vault/arena.py": {
            "memoryview(bytearray(PAGE)).cast('Q')",  # of a file that nobody has mapped yet
            "self.view[PAGE + index * table:][:8 * sums_words].cast('Q')",  # checksums: announced by words
            "view.cast('Q')",  # of memory that no other process sees
        },
        "vault/leftovers.py": {"head.cast('Q')"},  # a copy
        "vault/memory.py": {
            "mmap.mmap(fd, size, flags=mmap.MAP_SHARED)",
            "mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)",
        },
        "emulation/transformer_engine/quantization.py": {"DType.cast(quantizer.dtype)"},  # no memory
        "megatron/muster.py": {"mmap.mmap(fd, 0)"},  # `Words`
        "cluster/agent/pulse.py": {"mmap.mmap(fd, _BYTES)"},
        # What is copied for a check, announced by messages over a socket.
        "vault/scratch.py": {"mmap.mmap(self._fd, PAGE + 2 * NBYTES)"},
        "megatron/self_check.py": {"mmap.mmap(file.fileno(), 0)"},
        "durable/staging.py": {  # one process's own
            "mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
        },
    }
