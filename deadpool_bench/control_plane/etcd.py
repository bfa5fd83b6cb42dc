"""etcd servers on this machine, for `deadpool bench control` and the tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deadpool_bench.harness.ports import free_ports
from deadpool_megatron.cluster.store import EtcdStore, StoreError

_UP_S = 30.0


class EtcdMembers:
    """Some etcd servers that are one cluster, ended by `end`. Raises StoreError when etcd is not installed.

    Args:
        directory: for their data and logs.
        addresses: of each member; all this machine's.
        options: more flags for each.
        client_tls: file names (certificate, key) that clients are served with.
        prefix: by member, what its command begins with (for instance ``ip netns exec``).
    """

    def __init__(
        self,
        directory: Path,
        members: int = 1,
        addresses: Sequence[str] | None = None,
        options: Sequence[str] = (),
        client_tls: tuple[Path, Path] | None = None,
        prefix: Callable[[int], list[str]] = lambda member: [],
    ) -> None:
        binary = shutil.which("etcd")
        if binary is None:
            raise StoreError("there is no etcd on this machine: scripts/install_etcd.sh installs it")
        self._directory = directory
        hosts = list(addresses or ["127.0.0.1"] * members)
        ports = free_ports(2 * members)
        scheme = "https" if client_tls else "http"
        self.endpoints = [f"{host}:{port}" for host, port in zip(hosts, ports[:members], strict=True)]
        peers = [f"http://{host}:{port}" for host, port in zip(hosts, ports[members:], strict=True)]
        initial = ",".join(f"m{i}={peer}" for i, peer in enumerate(peers))
        token = os.urandom(4).hex()
        self._commands = []
        for i in range(members):
            client = f"{scheme}://{self.endpoints[i]}"
            command = [*prefix(i), binary, "--name", f"m{i}", "--data-dir", str(directory / f"m{i}")]
            command += ["--listen-client-urls", client, "--advertise-client-urls", client]
            command += ["--listen-peer-urls", peers[i], "--initial-advertise-peer-urls", peers[i]]
            command += ["--initial-cluster", initial, "--initial-cluster-token", token]
            command += ["--logger", "zap", "--log-outputs", "stderr", *options]
            if client_tls:
                command += ["--cert-file", str(client_tls[0]), "--key-file", str(client_tls[1])]
            self._commands.append(command)
        self.processes: list[subprocess.Popen[bytes] | None] = [None] * members
        for i in range(members):
            self.start(i)

    @property
    def url(self) -> str:
        """For ``--deadpool-store``."""
        return "etcd://" + ",".join(self.endpoints)

    def start(self, member: int) -> None:
        """Start a member (again); it comes up in the background."""
        with open(self._directory / f"m{member}.log", "ab") as log:
            self.processes[member] = subprocess.Popen(
                self._commands[member], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def until_up(self, url: str = "", **more: Any) -> None:
        """Until the cluster answers. Raises StoreError."""
        end = time.monotonic() + _UP_S
        while True:
            try:
                EtcdStore(url or self.url, "/up/", 2.0, **more).get("x")
                return
            except StoreError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def kill(self, member: int, signum: signal.Signals = signal.SIGKILL) -> None:
        """A signal for one member."""
        process = self.processes[member]
        assert process is not None
        process.send_signal(signum)
        if signum in (signal.SIGKILL, signal.SIGTERM):
            process.wait()

    def cpu_s(self) -> float:
        """Processor seconds that all members have used."""
        return sum(cpu_s(p.pid) for p in self.processes if p is not None and p.poll() is None)

    def end(self) -> None:
        """End all of them."""
        for process in self.processes:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used, in user and in kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
