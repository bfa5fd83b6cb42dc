"""One contract for both stores, on real files and a real etcd; and what only etcd has: members, TLS, passwords."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from deadpool_bench.control_plane.etcd import EtcdMembers
from deadpool_megatron.cluster.coordinator.saved_state import Memory
from deadpool_megatron.cluster.store import (
    Deposed,
    EmbeddedStore,
    EtcdStore,
    Guard,
    Lease,
    Store,
    StoreDamaged,
    StoreError,
)
from deadpool_megatron.cluster.store.base import Entry
from etcds import need_etcd
from waiting import until

ROOT = Path(__file__).resolve().parents[2]
Opener = Callable[[], Store]
PATIENT_S = 60.0
TTL_S = 6.0  # of leases that are waited out


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdMembers]:
    need_etcd()
    members = EtcdMembers(tmp_path_factory.mktemp("etcd"))
    try:
        members.until_up()
        yield members
    finally:
        members.end()


@pytest.fixture(params=["embedded", "etcd"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens the same store again and again, as different processes would."""
    opened: list[Store] = []
    url = ""
    if request.param == "etcd":
        url = request.getfixturevalue("etcd").url

    def open_one() -> Store:
        store: Store = EtcdStore(url, f"/test{tmp_path}/", PATIENT_S) if url else EmbeddedStore(tmp_path / "store")
        opened.append(store)
        return store

    open_one.source = (  # type: ignore[attr-defined]
        f"EtcdStore({url!r}, '/test{tmp_path}/')" if url else f"EmbeddedStore({str(tmp_path / 'store')!r})"
    )
    yield open_one
    for store in opened:
        store.close()


def _child(opener: Opener, program: str) -> subprocess.Popen[bytes]:
    """Another process with ``store`` open; says something on stdout when it has done its part."""
    text = "from deadpool_megatron.cluster.store import EmbeddedStore, EtcdStore, Guard\nimport sys, time\n"
    text += f"store = {opener.source}\n" + textwrap.dedent(program)  # type: ignore[attr-defined]
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


# ---- the contract


def test_what_was_put_is_there_for_everybody_with_a_growing_revision(opener: Opener) -> None:
    one, other = opener(), opener()
    assert one.get("a") is None
    first = one.put({"a": b"1", "b": bytes(range(256))})
    second = other.put({"a": b"2"})
    assert second > first > 0
    got = one.get("a")
    assert got is not None and got == (b"2", second)
    assert other.get("b") == (bytes(range(256)), first), "one put, one revision"


def test_values_of_a_megabyte_come_back_whole(opener: Opener) -> None:
    value = os.urandom(1 << 20)
    opener().put({"large": value})
    got = opener().get("large")
    assert got is not None and got.value == value


def test_of_many_that_compare_and_set_at_once_one_wins(opener: Opener) -> None:
    stores = [opener() for _ in range(8)]
    won: list[int] = []

    def run(i: int) -> None:
        if stores[i].compare_and_set("election", 0, b"%d" % i):
            won.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = opener().get("election")
    assert len(won) == 1 and got is not None and got.value == b"%d" % won[0]
    assert not stores[0].compare_and_set("election", 0, b"late")
    assert stores[0].compare_and_set("election", got.revision, b"next")


def test_a_guarded_write_is_refused_whole_once_the_leadership_has_changed(opener: Opener) -> None:
    store = opener()
    guard = Guard("leader", store.compare_and_set("leader", 0, b"one"))
    store.put({"state": b"1", "more": b"1"}, guard=guard)
    opener().put({"leader": b"two"})
    with pytest.raises(Deposed):
        store.put({"state": b"2", "more": b"2"}, guard=guard)
    with pytest.raises(Deposed):
        store.delete("st", guard=guard)
    assert [e.value for e in map(store.get, ("state", "more")) if e] == [b"1", b"1"]


def test_a_guard_of_a_key_that_is_gone_is_refused(opener: Opener) -> None:
    store = opener()
    guard = Guard("leader", store.compare_and_set("leader", 0, b"one"))
    store.delete("leader")
    with pytest.raises(Deposed):
        store.put({"state": b"2"}, guard=guard)


def test_delete_takes_all_keys_that_begin_so_and_no_other(opener: Opener) -> None:
    store = opener()
    store.put({"core/a": b"1", "core/b": b"1", "corf": b"1"})
    store.delete("core/")
    assert [store.get(k) is None for k in ("core/a", "core/b", "corf")] == [True, True, False]


def test_a_lease_given_back_takes_its_keys_along_and_a_watch_tells(opener: Opener) -> None:
    holder, other = opener(), opener()
    watch = other.watch("leader")
    assert watch.next(PATIENT_S) is None
    lease = holder.lease(PATIENT_S)
    revision = holder.compare_and_set("leader", 0, b"me", lease)
    assert watch.next(PATIENT_S) == (b"me", revision)
    lease.close()
    assert watch.next(PATIENT_S) is None and other.get("leader") is None
    watch.close()


def test_a_lease_that_is_kept_alive_stays(opener: Opener) -> None:
    lease = opener().lease(TTL_S)
    store = opener()
    store.put({"leader": b"me"}, lease)
    if (ends := getattr(lease, "_until", None)) is not None:  # (the embedded one knows no time)
        until(lambda: lease.lost.is_set() or lease._until > ends + 1.0, "a lease that lasts longer")
        until(lambda: time.monotonic() > ends + 1.0, "what would have been its end")
    assert store.get("leader") is not None and not lease.lost.is_set()


def test_a_killed_holders_lease_ends_and_a_guarded_write_of_it_comes_too_late(opener: Opener) -> None:
    child = _child(
        opener,
        """
        revision = store.compare_and_set("leader", 0, b"child", store.lease(6.0))
        print(revision, flush=True)
        time.sleep(600)
        """,
    )
    try:
        assert child.stdout is not None
        guard = Guard("leader", int(child.stdout.readline()))
        store = opener()
        watch = store.watch("leader")
        assert watch.next(PATIENT_S) == (b"child", guard.revision)
        store.put({"state": b"1"}, guard=guard)
        child.kill()
        assert watch.next(PATIENT_S) is None
        with pytest.raises(Deposed):
            store.put({"state": b"2"}, guard=guard)
        watch.close()
    finally:
        child.kill()
        child.wait()


def test_a_watch_tells_changes_in_order_and_never_misses_the_last(opener: Opener) -> None:
    watch = opener().watch("k")
    assert watch.next(PATIENT_S) is None
    store = opener()
    for i in range(20):
        store.put({"k": b"%d" % i})
    seen: list[bytes] = []
    while not seen or seen[-1] != b"19":
        entry = watch.next(PATIENT_S)
        assert entry is not None
        seen.append(entry.value)
    assert seen == sorted(seen, key=int)
    watch.close()


def test_a_watch_tells_a_state_once_however_often_it_looks(opener: Opener) -> None:
    watch = opener().watch("k")
    assert watch.next(PATIENT_S) is None
    with pytest.raises(TimeoutError):
        watch.next(0.5)
    revision = opener().put({"k": b"1"})
    assert watch.next(PATIENT_S) == (b"1", revision)
    with pytest.raises(TimeoutError):
        watch.next(0.5)
    watch.close()


def test_a_writer_that_is_killed_in_the_middle_loses_nothing_it_was_told_of(opener: Opener) -> None:
    child = _child(
        opener,
        """
        i = 0
        while True:
            i += 1
            store.put({"a": b"%d" % i + b"x" * 100000, "b": b"%d" % i})
            print(i, flush=True)
        """,
    )
    assert child.stdout is not None
    for _ in range(10):
        last = int(child.stdout.readline())
    child.kill()
    last = max([last, *map(int, child.stdout.read().split())])
    child.wait()
    store = opener()

    def both() -> tuple[Entry | None, Entry | None] | None:
        """Of one moment: what was on its way when the writer died may still arrive."""
        a, b = map(store.get, "ab")
        return (a, b) if a == store.get("a") else None

    a, b = until(both)
    assert a is not None and b is not None
    assert int(a.value.rstrip(b"x")) == int(b.value) >= last, "both keys of one put, and nothing acknowledged is lost"


# ---- embedded: the two copies


def _after(directory: Path, first: bytes, second: bytes) -> tuple[Path, bytes, bytes]:
    """A store after three puts: the copy that the last one went over, as it was before and after."""
    store = EmbeddedStore(directory)
    store.put({"a": b"0"})
    store.put({"a": first})
    copy = directory / "copy.1"
    before = copy.read_bytes()
    store.put({"a": second})
    return copy, before, copy.read_bytes()


def test_a_copy_torn_at_any_byte_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    copy, before, after = _after(tmp_path, b"1", b"second")
    older = (tmp_path / "copy.0").read_bytes()
    for cut in range(len(after) + 1):
        torn = after[:cut] + before[cut:]
        copy.write_bytes(torn)
        (tmp_path / "copy.0").write_bytes(older)
        (tmp_path / "lock").write_bytes((2).to_bytes(8, "big"))  # nobody was told of the third
        got = EmbeddedStore(tmp_path).get("a")
        assert got == ((b"second", 3) if torn == after else (b"1", 2))
        assert EmbeddedStore(tmp_path).put({"b": b"b"}) == got.revision + 1
        assert EmbeddedStore(tmp_path).get("a") == got


def test_a_copy_that_was_acknowledged_and_is_damaged_is_not_passed_over(tmp_path: Path) -> None:
    copy, before, after = _after(tmp_path, b"1", b"2")
    for damaged in [before, b"", *(after[:i] + bytes([after[i] ^ 1]) + after[i + 1 :] for i in range(len(after)))]:
        copy.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"copy\.1 is damaged.*remove this directory") as caught:
            EmbeddedStore(tmp_path).get("a")
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    copy.write_bytes(after)
    (tmp_path / "copy.0").write_bytes(b"the older copy is of no use any more")
    assert EmbeddedStore(tmp_path).get("a") == (b"2", 3)


def test_what_a_killed_writer_may_not_have_synced_is_on_disk_before_the_other_copy_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, _, after = _after(tmp_path, b"1", b"2")
    (tmp_path / "lock").write_bytes((2).to_bytes(8, "big"))  # killed before it could say that it had synced
    synced: list[tuple[str, bool]] = []
    fdatasync = os.fdatasync

    def look(fd: int) -> None:
        fdatasync(fd)
        synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, copy.read_bytes() == after))

    monkeypatch.setattr(os, "fdatasync", look)
    older = (tmp_path / "copy.0").read_bytes()
    EmbeddedStore(tmp_path).get("a")
    assert synced == [("copy.1", True)] and (tmp_path / "copy.0").read_bytes() == older
    EmbeddedStore(tmp_path).put({"a": b"3"})
    assert synced[1:] == [("copy.0", True)]


def test_a_full_disk_refuses_a_write_in_one_line_and_keeps_what_is_there(tmp_path: Path) -> None:
    program = f"""
        import resource, signal
        from deadpool_megatron.cluster.store import EmbeddedStore, StoreError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = EmbeddedStore({str(tmp_path)!r})
        store.put({{"a": b"1"}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # the kernel writes so much of it
        for i in range(3):
            try:
                store.put({{"a": b"x" * 10000}})
            except StoreError as err:
                print(err)
            assert store.get("a") == (b"1", 1)
        assert store.put({{"a": b"2"}}) == 2
        """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == [f"store in {tmp_path}: File too large"] * 3
    assert EmbeddedStore(tmp_path).get("a") == (b"2", 2)


def test_the_store_of_a_long_run_takes_no_more_room_than_two_copies(tmp_path: Path) -> None:
    one, other = EmbeddedStore(tmp_path), EmbeddedStore(tmp_path)
    kept = other.put({"kept": b"k"})
    for i in range(12):
        last = one.put({"a": os.urandom(1 << 20 >> i) + b"%d" % i})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3 << 20
    got = other.get("a")
    assert got is not None and got.value.endswith(b"11") and got.revision == last
    assert other.get("kept") == (b"k", kept) and other.put({"b": b""}) == last + 1


def test_a_store_of_an_older_version_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"")
    with pytest.raises(StoreError, match=r"an older version of DeadPool has written it.*remove this directory"):
        EmbeddedStore(tmp_path)


# ---- etcd: members, TLS, users


def test_one_member_of_three_may_be_killed_or_stopped_and_all_may_be_restarted(tmp_path: Path) -> None:
    need_etcd()
    members = EtcdMembers(tmp_path, 3)
    try:
        members.until_up()
        store = EtcdStore(members.url, "/x/", 30.0)  # a member that hangs may cost a third of it, once
        lease = store.lease(PATIENT_S)
        guard = Guard("leader", store.compare_and_set("leader", 0, b"me", lease))
        watch = EtcdStore(members.url, "/x/").watch("leader")
        assert watch.next(PATIENT_S) is not None
        for member in range(3):
            signum = signal.SIGSTOP if member == 1 else signal.SIGKILL  # a member that hangs is as bad as one that died
            members.kill(member, signum)
            for i in range(3):
                store.put({"state": b"%d%d" % (member, i)}, guard=guard)
            if signum == signal.SIGSTOP:
                members.kill(member, signal.SIGCONT)
            else:
                members.start(member)
            members.until_up(f"etcd://{members.endpoints[member]}")
        for member in range(3):
            members.kill(member)
        with pytest.raises(StoreError, match="does not answer"):
            EtcdStore(members.url, "/x/", 1.0).get("state")
        for member in range(3):
            members.start(member)
        store.put({"state": b"end"}, guard=guard)
        got = store.get("state")
        assert got is not None and got.value == b"end" and not lease.lost.is_set()
        lease.close()
        while watch.next(PATIENT_S) is not None:
            pass
        watch.close()
    finally:
        members.end()


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def test_tls_and_a_password_are_asked_for_and_wrong_ones_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_etcd()
    ca, key, cert, other = (tmp_path / name for name in ("ca.pem", "key.pem", "cert.pem", "other.pem"))
    for out, out_key in ((ca, tmp_path / "ca.key"), (other, tmp_path / "other.key")):
        _openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", out_key, "-out", out, "-days", 2,
                 "-subj", "/CN=test")  # fmt: skip
    _openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", tmp_path / "csr", "-subj", "/CN=etcd")
    (tmp_path / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    _openssl("x509", "-req", "-in", tmp_path / "csr", "-CA", ca, "-CAkey", tmp_path / "ca.key", "-CAcreateserial",
             "-out", cert, "-days", 2, "-extfile", tmp_path / "san")  # fmt: skip
    members = EtcdMembers(tmp_path, client_tls=(cert, key))
    try:
        url = f"etcd://{members.endpoints[0]}?ca={ca}"
        members.until_up(url)
        admin = EtcdStore(url, "", PATIENT_S).gateway
        admin.call("/v3/auth/user/add", {"name": "root", "password": "right"})
        admin.call("/v3/auth/role/add", {"name": "root"})
        admin.call("/v3/auth/user/grant", {"user": "root", "role": "root"})
        admin.call("/v3/auth/enable", {})
        known = url.replace("etcd://", "etcd://root@")
        monkeypatch.setenv("DEADPOOL_STORE_PASSWORD", "right")
        store = EtcdStore(known, "/x/", PATIENT_S)
        assert store.put({"a": b"1"}) > 0
        store.gateway._token = "1.2"  # one that has run out
        got = store.get("a")
        assert got is not None and got.value == b"1"
        for password, with_url, why in (
            ("wrong", known, "authentication failed"),
            ("right", url, "user name is empty"),
            ("right", known.replace(str(ca), str(other)), "certificate verify failed"),
        ):
            monkeypatch.setenv("DEADPOOL_STORE_PASSWORD", password)
            with pytest.raises(StoreError, match=why) as caught:
                EtcdStore(with_url, "/x/", 5.0).put({"a": b"2"})
            assert "\n" not in str(caught.value) and "right" not in str(caught.value)
    finally:
        members.end()


class _Full(EmbeddedStore):
    """As on a disk that is full, or read-only, for so many operations."""

    left = 3

    def get(self, key: str) -> Entry | None:
        self._refuse()
        return super().get(key)

    def put(self, values: Mapping[str, bytes], lease: Lease | None = None, guard: Guard | None = None) -> int:
        self._refuse()
        return super().put(values, lease, guard)

    def _refuse(self) -> None:
        self.left -= 1
        if self.left >= 0:
            raise StoreError("no space left on device")


def test_a_coordinator_that_starts_again_waits_for_a_store_that_has_no_room(tmp_path: Path) -> None:
    term = Guard("leader", EmbeddedStore(tmp_path).compare_and_set("leader", 0, b"1"))
    Memory(EmbeddedStore(tmp_path), term).write({"now": {"epoch": 3}})
    full = _Full(tmp_path)
    with pytest.raises(StoreError):
        Memory(full, term).publish_place("host", 1, 2, "job", again=False)
    memory = Memory(full, term)
    assert (memory.read() or {})["now"] == {"epoch": 3} and full.left < 0
    full.left = 2
    memory.publish_place("host", 1, 2, "job", again=True)
    assert full.left < 0 and EmbeddedStore(tmp_path).get("coordinator") is not None


def test_a_coordinator_does_not_wait_for_a_store_that_is_damaged(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    term = Guard("leader", store.compare_and_set("leader", 0, b"1"))
    Memory(store, term).write({"now": {"epoch": 3}})
    for copy in tmp_path.glob("copy.*"):
        copy.write_bytes(b"\x00" * 64)
    with pytest.raises(StoreDamaged, match="remove this directory"):
        Memory(EmbeddedStore(tmp_path), term).read()
