"""The store in an etcd cluster (v3): survives the loss of any minority of its members, and of any node of the job."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from deadpool_megatron.cluster.store.base import Deposed, Entry, Guard, Lease, Store, StoreError, Watch
from deadpool_megatron.cluster.store.gateway import Gateway, StoreAddress, b64, unb64

_SILENCE_S: Final = 10.0  # a watch that hears nothing for so long looks again: its member may be cut off
_RETRY_S: Final = 0.2


class _EtcdLease(Lease):
    """Kept alive three times a TTL. By this side's clock it ends a TTL after the last call that succeeded *began*, so
    we know of its end before anybody else can."""

    def __init__(self, gateway: Gateway, ttl_s: float) -> None:
        self.lost = threading.Event()
        self._closed = threading.Event()
        self._gateway = gateway
        begun = time.monotonic()
        answer = gateway.call("/v3/lease/grant", {"TTL": max(1, round(ttl_s)), "ID": 0})
        self.id = int(answer["ID"])
        self.ttl_s = float(answer["TTL"])  # etcd's own least one is about 2 s
        self._until = begun + self.ttl_s
        threading.Thread(target=self._keep, name="etcd-lease", daemon=True).start()

    def _keep(self) -> None:
        wait = self.ttl_s / 3
        while not self._closed.wait(wait):
            begun = time.monotonic()
            left = self._until - begun
            if left <= 0:
                break
            try:
                answer = self._gateway.call("/v3/lease/keepalive", {"ID": self.id}, timeout_s=left)
            except StoreError:
                wait = min(_RETRY_S, left)
                continue
            if int(answer.get("result", {}).get("TTL", 0)) <= 0:
                break
            self._until, wait = begun + self.ttl_s, self.ttl_s / 3
        if not self._closed.is_set():
            self.lost.set()

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            try:
                self._gateway.call("/v3/lease/revoke", {"ID": self.id}, timeout_s=2.0)
            except StoreError:
                return


class EtcdStore(Store):
    """A part of an etcd cluster's keys: those under ``prefix``.

    Args:
        url: see `StoreAddress`. Raises ValueError when it is malformed.
        timeout_s: for one call. An election of etcd's own takes about 2 s with its defaults.
        password: instead of that of the environment.
    """

    def __init__(self, url: str, prefix: str, timeout_s: float = 10.0, password: str | None = None) -> None:
        super().__init__()
        self.gateway = Gateway(StoreAddress.parse(url), timeout_s, password)
        self._prefix = prefix

    # ---- the interface

    def get(self, key: str) -> Entry | None:
        return _found(self.gateway.call("/v3/kv/range", {"key": self._key(key)}))

    def put(self, values: Mapping[str, bytes], lease: Lease | None = None, guard: Guard | None = None) -> int:
        operations = [{"requestPut": self._put(key, value, lease)} for key, value in values.items()]
        return self._guarded(operations, guard)

    def compare_and_set(self, key: str, revision: int, value: bytes, lease: Lease | None = None) -> int:
        answer = self.gateway.call(
            "/v3/kv/txn",
            {
                "compare": [self._is_at(key, revision)],
                "success": [{"requestPut": self._put(key, value, lease)}],
                "failure": [{"requestRange": {"key": self._key(key)}}],
            },
        )
        if answer.get("succeeded"):
            return int(answer["header"]["revision"])
        # Perhaps it is there already: an earlier try whose answer was lost.
        found = _found(answer["responses"][0]["response_range"])
        return found.revision if found is not None and found.value == value and found.revision > revision else 0

    def delete(self, prefix: str, guard: Guard | None = None) -> None:
        begin = (self._prefix + prefix).encode()
        end = begin[:-1] + bytes([begin[-1] + 1])
        self._guarded([{"requestDeleteRange": {"key": b64(begin), "range_end": b64(end)}}], guard)

    # ---- how

    def _grant(self, ttl_s: float) -> Lease:
        return _EtcdLease(self.gateway, ttl_s)

    def _key(self, key: str) -> str:
        return b64((self._prefix + key).encode())

    def _put(self, key: str, value: bytes, lease: Lease | None) -> dict[str, Any]:
        assert lease is None or isinstance(lease, _EtcdLease)
        return {"key": self._key(key), "value": b64(value), "lease": str(lease.id) if lease is not None else "0"}

    def _is_at(self, key: str, revision: int) -> dict[str, Any]:
        return {"key": self._key(key), "target": "MOD", "result": "EQUAL", "modRevision": str(revision)}

    def _guarded(self, operations: list[dict[str, Any]], guard: Guard | None) -> int:
        compare = [self._is_at(*guard)] if guard is not None else []
        answer = self.gateway.call("/v3/kv/txn", {"compare": compare, "success": operations})
        if not answer.get("succeeded"):
            assert guard is not None
            raise Deposed(f"{guard.key} is not ours any more")
        return int(answer["header"]["revision"])

    def _follow(self, key: str, watch: Watch) -> None:
        while not (watch.closed.is_set() or self._closed.is_set()):
            try:
                answer = self.gateway.call("/v3/kv/range", {"key": self._key(key)})
                watch.changed(_found(answer))
                since = int(answer["header"]["revision"]) + 1
                asked = {"create_request": {"key": self._key(key), "start_revision": str(since)}}
                for news in self.gateway.stream("/v3/watch", asked, _SILENCE_S):
                    if watch.closed.is_set() or "error" in news or news.get("result", {}).get("canceled"):
                        break
                    for event in news.get("result", {}).get("events", ()):
                        watch.changed(None if event.get("type") == "DELETE" else _entry(event["kv"]))
            except StoreError:
                pass  # asked again below: a watch outlives the loss of every member
            watch.closed.wait(_RETRY_S)


def _found(answer: dict[str, Any]) -> Entry | None:
    return _entry(answer["kvs"][0]) if answer.get("kvs") else None


def _entry(kv: dict[str, Any]) -> Entry:
    return Entry(unb64(kv.get("value", "")), int(kv["mod_revision"]))
