"""etcd's v3 API as JSON over HTTP (its gRPC gateway), over several members.

Any member answers any call: one that does not is left for the next, until the time-out. What etcd is asked for here can
be asked for twice.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from deadpool_megatron.cluster.store.base import StoreError

PASSWORD: Final = "DEADPOOL_STORE_PASSWORD"
# gRPC codes after which another member, or the same one a moment later, may answer.
_AGAIN: Final = frozenset({1, 4, 8, 14})
_UNAUTHENTICATED: Final = 16
_PORT: Final = 2379


def b64(data: bytes) -> str:
    """As the gateway wants bytes."""
    return base64.b64encode(data).decode()


def unb64(data: str) -> bytes:
    """As the gateway gives bytes."""
    return base64.b64decode(data)


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """``etcd://[USER@]HOST:PORT,HOST:PORT...[?ca=FILE&cert=FILE&key=FILE]``.

    With any of the files, or as ``etcds://`` (the system's CAs), it is spoken to over TLS.
    """

    endpoints: tuple[str, ...]
    user: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""

    @classmethod
    def parse(cls, url: str) -> StoreAddress:
        """Raises ValueError with one line that says what is wrong."""
        parts, shown = urlsplit(url), url.split("?", 1)[0]  # (files may be private)
        if parts.scheme not in ("etcd", "etcds"):
            raise ValueError(f"{url}: expected embedded, or etcd://HOST:PORT,HOST:PORT...")
        if parts.path not in ("", "/") or parts.fragment:
            raise ValueError(f"{shown}: nothing comes after the last port but ?ca=FILE&cert=FILE&key=FILE")
        user, _, hosts = parts.netloc.rpartition("@")
        if ":" in user:
            raise ValueError(f"the password does not belong into the address: give it in {PASSWORD}")
        try:
            query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
        except ValueError:
            raise ValueError(f"{url}: expected ?ca=FILE&cert=FILE&key=FILE") from None
        if unknown := sorted(set(query) - {"ca", "cert", "key"}):
            raise ValueError(f"{url}: unknown option {unknown[0]}; there are ca, cert and key")
        files = {name: values[-1] for name, values in query.items()}
        if ("cert" in files) != ("key" in files):
            raise ValueError(f"{url}: cert and key go together")
        for name, path in files.items():
            if not Path(path).is_file():
                raise ValueError(f"{url}: {name}: there is no file {path}")
        scheme = "https" if parts.scheme == "etcds" or files else "http"
        endpoints: list[str] = []
        for each in hosts.split(","):
            host, colon, port = each.rpartition(":") if not each.endswith("]") else (each, "", "")
            if not colon:
                host, port = each, str(_PORT)
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"{shown}: {each!r} is not HOST:PORT")
            endpoints.append(f"{scheme}://{host}:{port}")
        return cls(tuple(endpoints), user, **files)


class Gateway:
    """Calls to one etcd cluster. Any thread may call. Raises StoreError when urllib3 is not installed.

    Args:
        timeout_s: for one call, over as many members as that takes.
    """

    def __init__(self, address: StoreAddress, timeout_s: float, password: str | None = None) -> None:
        try:
            import urllib3
        except ImportError:
            raise StoreError("an etcd store needs urllib3: pip install 'urllib3>=2'") from None
        self.address = address
        self.timeout_s = timeout_s
        self._broken = (urllib3.exceptions.HTTPError, OSError, json.JSONDecodeError)
        self._timeout = urllib3.Timeout
        options: dict[str, Any] = {"retries": False, "maxsize": 8, "num_pools": len(address.endpoints)}
        if address.endpoints[0].startswith("https"):
            options |= {"cert_reqs": "CERT_REQUIRED"}
            options |= {"ca_certs": address.ca} if address.ca else {}
            options |= {"cert_file": address.cert, "key_file": address.key} if address.cert else {}
        self._http = urllib3.PoolManager(**options)
        self._password = os.environ.get(PASSWORD, "") if password is None else password
        self._token = ""
        self._token_lock = threading.Lock()
        self._first = 0  # the member that answered last
        if address.user and not self._password:
            raise StoreError(f"etcd user {address.user} needs a password: give it in {PASSWORD}")

    def call(self, path: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """One request. Raises StoreError when no member answers in time, or etcd refuses it."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        end = time.monotonic() + limit
        why = ""
        while True:
            for turn in range(len(self.address.endpoints)):
                left = end - time.monotonic()
                if left <= 0:
                    raise StoreError(f"etcd at {self._where()} does not answer: {why or f'nothing within {limit:g} s'}")
                which = (self._first + turn) % len(self.address.endpoints)
                endpoint = self.address.endpoints[which]
                # One of several may hang: leave time for the others.
                share = left if len(self.address.endpoints) == 1 else max(0.3, left / 3)
                try:
                    answer = self._once(endpoint, path, body, share)
                except _Elsewhere as err:
                    if not why or "timed out" not in str(err):  # the last try has only what is left of the time
                        why = str(err)
                    continue
                self._first = which
                return answer
            time.sleep(min(0.1, max(0.0, end - time.monotonic())))  # an election of etcd's own takes a second

    def stream(self, path: str, body: Mapping[str, Any], silence_s: float) -> Iterator[dict[str, Any]]:
        """A request that goes on answering, from one member. Ends when it does, or after ``silence_s`` of silence.

        Raises StoreError when etcd refuses it.
        """
        endpoint = self.address.endpoints[self._first % len(self.address.endpoints)]
        try:
            response = self._post(endpoint, path, body, silence_s, stream=True)
            if response.status != 200:
                self._judge(response.status, response.read(4096))
            try:
                rest = b""
                for chunk in response.stream(65536):
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from map(json.loads, filter(bytes.strip, lines))
            finally:
                response.close()
        except StoreError:
            raise
        except (*self._broken, _Elsewhere):
            self._first += 1  # try another one

    def _once(self, endpoint: str, path: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            response = self._post(endpoint, path, body, timeout_s)
            data = response.data
            if response.status != 200:
                self._judge(response.status, data)
            answer: dict[str, Any] = json.loads(data)
        except StoreError:
            raise
        except self._broken as err:
            raise _Elsewhere(f"{endpoint}: {_short(err)}") from None
        return answer

    def _post(self, endpoint: str, path: str, body: Mapping[str, Any], timeout_s: float, stream: bool = False) -> Any:
        headers = {"Content-Type": "application/json", "Grpc-Metadata-hasleader": "true"}
        if self.address.user and path != "/v3/auth/authenticate":
            with self._token_lock:
                if not self._token:
                    asked = {"name": self.address.user, "password": self._password}
                    self._token = self._once(endpoint, "/v3/auth/authenticate", asked, timeout_s)["token"]
                headers["Authorization"] = self._token
        data = json.dumps(body).encode()
        timeout = self._timeout(connect=min(timeout_s, 1.0), read=timeout_s)
        return self._http.request(
            "POST", endpoint + path, body=data, headers=headers, timeout=timeout, preload_content=not stream
        )

    def _judge(self, status: int, data: bytes) -> None:
        """Raise what an answer other than 200 means."""
        try:
            said = json.loads(data)
            said = said.get("error", said) if isinstance(said.get("error"), dict) else said
            code = int(said.get("grpc_code") or said.get("code") or 2)
            message = str(said.get("message") or said.get("error"))
        except (ValueError, AttributeError):
            code, message = 14 if status >= 500 else 2, f"HTTP status {status}"
        if (code == _UNAUTHENTICATED and "authentication failed" not in message) or "invalid auth token" in message:
            self._token = ""  # it has run out
            raise _Elsewhere(message)
        if code in _AGAIN or status in (502, 503, 504) or "leader" in message:
            raise _Elsewhere(message)
        raise StoreError(f"etcd at {self._where()}: {message}")

    def _where(self) -> str:
        return ", ".join(endpoint.split("//", 1)[1] for endpoint in self.address.endpoints)


class _Elsewhere(Exception):
    """This member cannot answer now; another one may."""


def _short(err: BaseException) -> str:
    message = str(err)
    for known in ("Connection refused", "timed out", "Name or service not known", "certificate verify failed"):
        if known in message:
            return known.lower()
    return message.splitlines()[0][:120] if message else type(err).__name__
