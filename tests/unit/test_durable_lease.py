"""The promise: two jobs never write to one durable directory, and the directory of a dead one is free within a watch.

Real directories; the time of each job is its own, and never compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from deadpool_megatron.durable import DurableError, Lease, begin, go_on, open_store, start, this_process
from deadpool_megatron.durable.lease import BEAT_S, WATCH_S, Owner, Taken, check_owner, take
from deadpool_megatron.durable.store import Store
from waiting import until


@pytest.fixture(params=["local", "object"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield open_store(str(tmp_path))
        return
    store = open_store(f"memory://{tmp_path.name}")
    yield store
    for name in store.files():
        store.remove_file(name)


def owner(job: str, **fields: object) -> Owner:
    """Of a job on another machine."""
    return msgspec.structs.replace(this_process(job), host=f"{job}s-host", **fields)  # type: ignore[arg-type]


@dataclass
class Time:
    """A taker's clock; `events` happen in the middle of its sleep, by seconds slept."""

    now: float = 0.0
    events: list[tuple[float, Callable[[], object]]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for event in [each for each in self.events if each[0] <= self.now]:
            self.events.remove(event)
            event[1]()


def taken(store: Store, job: str, time: Time | None = None, said: list[str] | None = None) -> Lease:
    time = time or Time()
    return take(store, owner(job), (said if said is not None else []).append, time.clock, time.sleep)


def files(store: Store) -> dict[str, bytes]:
    return {name: store.open(name).read() for name in store.files()}


def test_a_living_owner_keeps_its_directory_and_the_other_job_writes_nothing(store: Store) -> None:
    first = taken(store, "first")
    time, said = Time(), list[str]()
    time.events.append((BEAT_S, first.renew))
    before: dict[str, bytes] = {}
    time.events.append((BEAT_S, lambda: before.update(files(store))))
    with pytest.raises(Taken) as refused:
        taken(store, "second", time, said)
    assert files(store) == before, "nothing but the owner's beat has changed"
    message = str(refused.value)
    assert message.startswith(f"--deadpool-durable-dir {store.root} belongs to job first (host firsts-host, since 2")
    assert message.endswith("; end that job, or give this one another directory") and "\n" not in message
    assert time.now < 2 * BEAT_S, "the first beat tells"
    assert len(said) == 1 and "does it live?" in said[0]
    assert first.renew() and first.lost is None
    check_owner(store, "first")


def test_a_dead_owners_directory_is_free_after_a_watch_and_not_before(store: Store) -> None:
    taken(store, "dead")
    time = Time()
    lease = taken(store, "next", time)
    assert WATCH_S <= time.now <= WATCH_S + 2
    check_owner(store, "next")
    with pytest.raises(Taken):
        check_owner(store, "dead")
    assert lease.renew()


def test_one_that_ended_in_order_is_followed_at_once(store: Store) -> None:
    first = taken(store, "first")
    first.keep()
    first.end()
    time = Time()
    taken(store, "second", time)
    assert time.now == 0.0


def test_the_same_jobs_coordinator_goes_on_at_once_and_the_one_before_falls_silent(store: Store) -> None:
    first = taken(store, "job")
    second = Lease(store, 0, owner("job"))
    assert second.renew() and second.renew()
    assert not first.renew() and first.lost is None
    time = Time()
    taken(store, "job", time)
    assert time.now == 0.0 and not second.renew() and second.lost is None


def test_an_owner_that_was_frozen_finds_that_it_is_not_the_owner_any_more(store: Store) -> None:
    first = taken(store, "frozen")
    second = taken(store, "second")
    assert not first.renew()
    assert first.lost is not None and "belongs to job second" in str(first.lost)
    assert second.renew(), "and it has not taken the directory back"
    first.end()
    again = Lease(store, 0, owner("frozen"))  # its coordinator is started again
    assert not again.renew() and again.lost is not None
    assert second.renew() and second.lost is None


def test_of_several_that_wait_for_a_dead_owner_one_gets_the_directory(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    taken(store, "dead")
    together = threading.Barrier(8)
    ends: list[object] = []

    def compete(number: int) -> None:
        time = Time()

        def sleep(seconds: float) -> None:
            if time.now < WATCH_S + 1:
                together.wait()  # all see the same up to the end of the watch
            time.sleep(seconds)
            for each in [lease for lease in ends if isinstance(lease, Lease)]:
                each.renew()  # the one that has it lives

        try:
            ends.append(take(store, owner(f"job{number}"), lambda line: None, time.clock, sleep))
        except Taken as err:
            ends.append(err)
        finally:
            together.abort()

    def run(number: int) -> None:
        try:
            compete(number)
        except threading.BrokenBarrierError:
            ends.append(None)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(end, Lease) for end in ends) == 1, ends


def test_a_taker_that_stood_still_itself_does_not_count_that_time(store: Store) -> None:
    first = taken(store, "first")
    time = Time()

    def stand_still() -> None:  # the whole machine: the owner on it had no chance to renew either
        time.now += 10 * WATCH_S

    time.events += [(2.0, stand_still), (10 * WATCH_S + 4.0, first.renew)]
    with pytest.raises(Taken):
        taken(store, "second", time)


def test_an_owner_whose_processes_are_dead_on_this_machine_is_followed_at_once(store: Store) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert launcher.stdin is not None
    mine = this_process("mine", launcher.pid)
    assert [pid for pid, _ in mine.processes] == [os.getpid(), launcher.pid]
    gone = msgspec.structs.replace(mine, job="gone", processes=mine.processes[1:])
    elsewhere = msgspec.structs.replace(gone, job="elsewhere", machine="another boot")
    takes: list[float] = []
    try:
        for each in (gone, elsewhere):
            assert not each.dead
    finally:
        launcher.communicate()
    for each in (gone, elsewhere, this_process("agents")):
        time = Time()
        take(store, each, lambda line: None, time.clock, time.sleep)
        takes.append(time.now)
    assert gone.dead and not elsewhere.dead, "a process id of another machine says nothing"
    assert takes[0] == 0.0 and takes[1] == 0.0 and takes[2] >= WATCH_S


def test_half_a_file_is_no_owner_and_no_reason_to_give_up(store: Store) -> None:
    first = taken(store, "first")
    store.claim("owner-000002.json", b'{"job": "torn')
    assert first.renew() and first.lost is None
    check_owner(store, "first")
    time = Time()
    taken(store, "next", time)
    assert time.now >= WATCH_S
    assert not first.renew() and first.lost is not None


def test_files_of_earlier_owners_do_not_pile_up(store: Store) -> None:
    for number in range(5):
        taken(store, f"job{number}").end()
    assert store.files() == ["owner-000004.json", "owner-000005.json"]
    assert json.loads(store.open("owner-000005.json").read())["ended"] is True


def test_an_emptied_directory_is_the_owners_again(store: Store) -> None:
    lease = taken(store, "first")
    for name in store.files():
        store.remove_file(name)
    assert lease.renew()
    check_owner(store, "first")
    with pytest.raises(Taken):
        check_owner(store, "second")


def test_a_job_that_is_refused_for_what_lies_there_leaves_the_directory_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(DurableError, match="has no durable generation 7"):
        begin(str(tmp_path), owner("first"), "7", 2, -1, lambda line: None)
    time = Time()
    taken(open_store(str(tmp_path)), "second", time)
    assert time.now == 0.0


def test_a_coordinator_that_is_started_again_goes_on_without_its_directory_and_has_it_again_later(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    there = tmp_path / "there"
    found, lease = go_on(str(there), owner("job"), "auto", 2, -1, said.append)
    assert found.usable == () and lease is not None and not there.exists()
    assert said == [
        f"--deadpool-durable-dir {there} is not there (any more); the job goes on, and cannot go back to what is "
        "durable there"
    ]
    there.mkdir()
    assert lease.renew()
    check_owner(open_store(str(there)), "job")
    with pytest.raises(Taken):
        check_owner(open_store(str(there)), "second")
    lease.end()


def test_of_a_coordinator_that_goes_on_and_another_job_that_takes_over_one_has_the_directory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both make the next number at the same moment; who was slower must not write into the other one's file."""
    taken(store, "first")
    claim, rivals = store.claim, []

    def late(name: str, data: bytes) -> bool:
        if not rivals:
            rivals.append(Lease(store, 2, owner("second")))
            assert claim(name, msgspec.json.encode(owner("second")).ljust(1023) + b"\n")
        return claim(name, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "claim", late)
        again = Lease(store, 0, owner("first"))
        again.renew()
    assert not again.renew() and again.lost is not None and "job second" in str(again.lost)
    assert rivals[0].renew()
    check_owner(store, "second")


def test_a_coordinator_that_is_started_again_in_a_directory_that_was_taken_does_not_use_it(tmp_path: Path) -> None:
    lease = taken(open_store(str(tmp_path)), "second")
    found, mine = go_on(str(tmp_path), owner("first"), "auto", 2, -1, pytest.fail)
    assert found.usable == () and mine is not None and mine.lost is not None
    assert lease.renew()


def _hanging(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The manifest of a durable directory that is soon taken to hang: whoever opens it waits for a writer."""
    monkeypatch.setattr(start, "_HANGS_S", 0.05)
    manifest = directory / "generation-000000000007-job-1" / "manifest.json"
    manifest.parent.mkdir()
    os.mkfifo(manifest)
    return manifest


def test_a_new_job_that_waits_for_a_directory_that_hangs_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, said = _hanging(tmp_path, monkeypatch), list[str]()

    def told(line: str) -> None:
        said.append(line)
        if len(said) == 1:
            manifest.open("wb").close()  # then it answers

    with contextlib.suppress(DurableError):  # what hung was no generation in the end
        begin(str(tmp_path), None, "auto", 2, -1, told)
    assert f"--deadpool-durable-dir {tmp_path} has not answered for 0.05 s; the job begins when it has" in said


def test_a_coordinator_that_is_started_again_does_not_wait_for_a_directory_that_hangs_and_owns_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, said = _hanging(tmp_path, monkeypatch), list[str]()
    found, lease = go_on(str(tmp_path), owner("job"), "auto", 2, -1, said.append)
    assert found.usable == () and lease is not None
    assert said == [f"{tmp_path} has not answered for 0.05 s; the job goes on with what it knows to be durable there"]
    manifest.open("wb").close()
    until(lambda: lease._thread is not None, "the thread that renews the lease")
    check_owner(open_store(str(tmp_path)), "job")
    with pytest.raises(Taken):
        check_owner(open_store(str(tmp_path)), "second")
    lease.end()
