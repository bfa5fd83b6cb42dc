"""Who outside of the job says that a node is to be taken away: Slurm, Kubernetes, a file, an HTTP hook.

Each source is asked again and again on a thread of its own, with a deadline, and names machines. What cannot be asked
is said once and names nobody: it never ends training.
"""

from __future__ import annotations

import json
import math
import os
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.job import Phase

_DEADLINE_S: Final = 10.0
_LOOK_S: Final = 1.0
_AGAIN_S: Final = 30.0  # from one try to drain a node to the next
_MOST_BYTES: Final = 4 << 20
_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# Of scontrol's "State=ALLOCATED+DRAIN": what means that the node is not to be used. (A mark may follow, as in DOWN*.)
_OUT: Final = ("DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING")
_NODE = re.compile(r"^NodeName=(\S+)", re.MULTILINE)


class SourceError(Exception):
    """A source cannot be asked now; the message is one line."""


class Source(ABC):
    """Somebody who can be asked."""

    name: str

    @abstractmethod
    def ask(self) -> dict[str, str]:
        """Machines (or numbers of nodes) that are to be taken away, and why. Blocks at most `_DEADLINE_S` or so.

        Raises SourceError, OSError, ValueError.
        """


class Slurm(Source):
    """Nodes that Slurm has in a state of DRAIN, DOWN or FAIL, of the allocation this process is in."""

    name = "slurm"

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._nodes = environ.get("SLURM_JOB_NODELIST", "")

    def ask(self) -> dict[str, str]:
        command = ["scontrol", "-o", "show", "node", *([self._nodes] if self._nodes else [])]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise SourceError(f"scontrol has not answered within {_DEADLINE_S:g} s") from None
        if done.returncode:
            raise SourceError(f"scontrol: {(done.stderr or done.stdout).strip().splitlines()[-1:] or 'failed'}")
        return slurm_states(done.stdout)


def slurm_states(text: str) -> dict[str, str]:
    """Out of ``scontrol -o show node``: the nodes not to be used, with state and reason."""
    out = {}
    for line in text.splitlines():
        node, state = _NODE.search(line), re.search(r"\bState=(\S+)", line)
        if node is None or state is None:
            continue
        if any(part.rstrip("*~#!%$@^-") in _OUT for part in state[1].split("+")):
            reason = re.search(r"\bReason=(.*?)(?: \[\S+@\S+\]|$)", line)
            out[node[1]] = f"Slurm has it as {state[1]}" + (f" ({reason[1]})" if reason else "")
    return out


class Kubernetes(Source):
    """Nodes that are cordoned, by the API with the pod's service account; it takes the right to list nodes."""

    name = "kubernetes"

    def __init__(
        self, environ: Mapping[str, str] = os.environ, account: Path = _SERVICE_ACCOUNT, scheme: str = "https"
    ) -> None:
        host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
        address = f"[{host}]" if ":" in host else host
        self._url = f"{scheme}://{address}:{port}/api/v1/nodes?fieldSelector=spec.unschedulable%3Dtrue" if host else ""
        self._account = account

    def ask(self) -> dict[str, str]:
        if not self._url:
            raise SourceError("this is no pod: KUBERNETES_SERVICE_HOST is not set")
        token = (self._account / "token").read_text().strip()  # it is renewed from time to time
        authority = self._account / "ca.crt"
        context = ssl.create_default_context(cafile=str(authority)) if self._url.startswith("https") else None
        answer = json.loads(_get(self._url, {"Authorization": f"Bearer {token}"}, context))
        if not isinstance(answer, dict) or not isinstance(answer.get("items"), list):
            raise SourceError("the API's answer is no list of nodes")
        return {str(item["metadata"]["name"]): "it is cordoned" for item in answer["items"]}


class File(Source):
    """A file with a name or number of a node in each line; one that is not there names nobody."""

    def __init__(self, path: str) -> None:
        self.name = f"file:{path}"
        self._path = Path(path)

    def ask(self) -> dict[str, str]:
        try:
            with self._path.open(encoding="utf-8") as file:
                text = file.read(_MOST_BYTES)
        except FileNotFoundError:
            return {}
        return _names(text, f"{self._path.name} names it")


class Hook(Source):
    """An address that answers GET with names or numbers of nodes, one a line or as a JSON list."""

    def __init__(self, url: str) -> None:
        self.name = url
        self._url = url

    def ask(self) -> dict[str, str]:
        text, why = _get(self._url), "the HTTP hook names it"
        if not text.lstrip().startswith("["):
            return _names(text, why)
        return {str(name): why for name in json.loads(text)}


def _names(text: str, why: str) -> dict[str, str]:
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return {line[0]: " ".join(line[1:]) or why for line in lines if line}


def _get(url: str, headers: Mapping[str, str] | None = None, context: ssl.SSLContext | None = None) -> str:
    end = time.monotonic() + _DEADLINE_S
    request = urllib.request.Request(url, headers=dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=_DEADLINE_S, context=context) as answer:
            data = b""
            while chunk := answer.read1(1 << 16):
                data += chunk
                if len(data) > _MOST_BYTES or time.monotonic() > end:
                    raise SourceError(f"more than {_MOST_BYTES >> 20} MiB, or slower than {_DEADLINE_S:g} s")
    except urllib.error.HTTPError as err:
        raise SourceError(f"HTTP {err.code} {err.reason}") from None
    except urllib.error.URLError as err:
        raise SourceError(str(err.reason)) from None
    return data.decode()


def source(text: str) -> Source:
    """One entry of ``--deadpool-drain-from``, which `config` has checked."""
    if text.startswith("file:"):
        return File(text.removeprefix("file:"))
    return {"slurm": Slurm, "kubernetes": Kubernetes}[text]() if "://" not in text else Hook(text)


class DrainSources:
    """Asks all of them every ``interval_s`` seconds.

    Args:
        say: gets a line for a person, on one of the threads.
    """

    def __init__(self, sources: Sequence[Source], interval_s: float, say: Callable[[str], None]) -> None:
        self._interval_s = interval_s
        self._say = say
        self._told: set[str] = set()
        self._answers: dict[str, dict[str, str]] = {}
        for each in sources:
            threading.Thread(target=self._follow, args=(each,), name=f"drain-{each.name[:8]}", daemon=True).start()

    def _follow(self, each: Source) -> None:
        while True:
            self.look(each)
            time.sleep(self._interval_s)

    def look(self, each: Source) -> None:
        """Ask one of them, once."""
        try:
            self._answers[each.name] = each.ask()
        except Exception as err:  # noqa: BLE001 - whatever an answer from outside leads to, training goes on
            self._answers[each.name] = {}
            if each.name not in self._told:
                self._told.add(each.name)
                line = " ".join(str(err).split()) or type(err).__name__
                self._say(f"--deadpool-drain-from {each.name}: {line}; it is asked again every {self._interval_s:g} s")

    def wanted(self) -> dict[str, str]:
        """Machines or numbers of nodes that are to be taken away, and why, by what is known now."""
        return {name: why for answer in list(self._answers.values()) for name, why in answer.items()}


class Drains:
    """Has the nodes drained that some source names, one after the other, as soon as the job can.

    Args:
        sources: entries of ``--deadpool-drain-from``.
        interval_s: from one look at each of them to the next, and at what can be drained now.
    """

    def __init__(self, sources: Sequence[str], interval_s: float) -> None:
        self._interval_s = interval_s
        self._sources = DrainSources([source(entry) for entry in sources], interval_s, _say)
        self._look_at = 0.0
        self._begun: dict[int, float] = {}  # by node, when its drain was begun last
        self.refused: dict[int, str] = {}
        """Why a node is not drained yet that is to be."""

    def due(self, core: Core, now: float) -> Iterator[tuple[int, str]]:
        """A node that is to be drained now, and why. ``now``: seconds, in the clock of ``core``."""
        if now < self._look_at:
            return
        self._look_at = now + min(self._interval_s, _LOOK_S)
        wanted = self._sources.wanted() if core.phase is Phase.RUNNING else {}
        # Spares first: one that is to be taken away is not to take over from another node before.
        nodes = sorted(core.nodes.items(), key=lambda item: (item[1].role != "spare", item[0])) if wanted else []
        if core.phase is Phase.RUNNING:
            named = {node for node, state in nodes if not state.gone and (state.name in wanted or str(node) in wanted)}
            self.refused = {node: why for node, why in self.refused.items() if node in named}
        for node, state in nodes:
            why = wanted.get(state.name) or wanted.get(str(node))
            if why is None or state.gone or state.role == "leaving":
                continue
            if now < self._begun.get(node, -math.inf) + _AGAIN_S:
                continue  # it was called off a moment ago, or is under way
            refusal, soon = core.cannot_drain(node)
            if refusal:
                if not soon and self.refused.get(node) != refusal:
                    self.refused[node] = refusal
                    _say(f"node {node} is to be drained ({why}), but {refusal}; it is tried again")
                continue
            self._begun[node] = now
            self.refused.pop(node, None)
            _say(f"node {node} is drained: {why}")
            yield node, why
            return


def _say(line: str) -> None:
    print(f"deadpool: {line}", file=sys.stderr, flush=True)
