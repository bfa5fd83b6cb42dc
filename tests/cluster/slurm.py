"""A real Slurm of several nodes on this machine, everything of it under one directory: munged, slurmctld, slurmd.

Each slurmd is a node of its own name on 127.0.0.1. Debian and Ubuntu: scripts/install_slurm.sh.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from deadpool_bench.harness.ports import free_ports
from waiting import until

__all__ = ["Slurm", "why_not"]

_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def why_not() -> str:
    """Why there can be no Slurm here; empty when there can."""
    missing = [name for name in _NEEDED if shutil.which(name, path=_SBIN) is None]
    if missing:
        return f"no {', '.join(missing)} here (scripts/install_slurm.sh installs Slurm on Debian and Ubuntu)"
    if os.geteuid() != 0:
        return "Slurm's daemons start other users' tasks, so they need root"
    return ""


def _first_job(*taken: int) -> int:
    """A job number such that none of the next ones has a port of the cluster's own (`scripts/slurm/run.sh`)."""
    while True:
        first = random.randrange(1, 1_000_000)
        if not {20_000 + (first + more) % 10_000 for more in range(20)} & set(taken):
            return first


class Slurm:
    """A cluster of nodes n1 to n``nodes``; `end` ends all of it, whatever has happened."""

    def __init__(self, nodes: int, slurmd_timeout_s: int = 10) -> None:
        # Of its own, in /tmp: munge refuses a socket below a directory that others cannot enter, as pytest's is.
        self.directory = directory = Path(tempfile.mkdtemp(prefix="deadpool-slurm-", dir="/tmp"))
        directory.chmod(0o755)
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._seen: dict[int, psutil.Process] = {}
        host = socket.gethostname().split(".")[0]
        ctld, *ports = free_ports(nodes + 1)
        for name in ("state", "log", "spool", "munge"):
            (directory / name).mkdir()
        lines = [
            "ClusterName=deadpool",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ctld}",
            "SlurmUser=root",
            # A job that is put back into the queue waits until its credentials have expired: 120 s by default.
            f"AuthInfo=socket={directory}/munge/socket,cred_expire=5",
            f"StateSaveLocation={directory}/state",
            f"SlurmdSpoolDir={directory}/spool/%n",
            f"SlurmctldPidFile={directory}/slurmctld.pid",
            f"SlurmdPidFile={directory}/slurmd-%n.pid",
            f"SlurmctldLogFile={directory}/log/slurmctld.log",
            f"SlurmdLogFile={directory}/log/slurmd-%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            # The batch scripts take a port from it: another test run on this machine has other jobs.
            f"FirstJobId={_first_job(ctld, *ports)}",
            "SelectType=select/linear",
            "SlurmdParameters=config_overrides",
            "AccountingStorageType=accounting_storage/none",
            "JobAcctGatherType=jobacct_gather/none",
            f"SlurmdTimeout={slurmd_timeout_s}",
            "KillWait=5",
            "MessageTimeout=10",
            "BatchStartTimeout=60",
            *(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"
                for name, port in zip(self.names, ports, strict=True)
            ),
            f"PartitionName=main Nodes={','.join(self.names)} Default=YES MaxTime=30 State=UP",
        ]
        (directory / "slurm.conf").write_text("\n".join(lines) + "\n")
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": _SBIN}
        key = directory / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = directory / "munge"
        self._start(
            "munged",
            *["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}/socket"],
            *[f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"],
        )
        self.until("munge's socket", (munge / "socket").exists)
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for name in self.names:
            (directory / "spool" / name).mkdir()
            self._start(name, "slurmd", "-D", "-N", name)
        self.until("all nodes idle", lambda: set(self.states().values()) == {"idle"})

    def _start(self, name: str, *command: str) -> None:
        with open(self.directory / "log" / f"{name}.out", "wb") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def command(self, *command: str, check: bool = True, directory: Path | None = None, **extra: str) -> str:
        """Run one of Slurm's commands, with more environment; returns its output."""
        env = self.environment | extra
        done = subprocess.run(command, env=env, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """By node, its state in lower case, without Slurm's marks."""
        out = self.command("sinfo", "-h", "-N", "-o", "%N %T", check=False)
        return {name: state.rstrip("*~#!%$@^-") for name, state in (line.split() for line in out.splitlines())}

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        text = self.command("scontrol", "-o", "show", "job", number)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def until(self, what: str, find: Callable[[], Any]) -> Any:
        """Poll until ``find`` gives something."""

        def found() -> Any:
            if not (value := find()):
                self._look()
            return value

        return until(found, lambda: f"{what}\n{self.logs()}", 0.25)

    def kill_node(self, name: str) -> None:
        """The machine is gone: SIGKILL, as one blow, for its slurmd and every process of its tasks."""
        self._look()
        victims = [p for p in self._seen.values() if self._is_of(p, name)]
        for blow in (psutil.Process.suspend, psutil.Process.kill):
            for each in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    blow(each)

    def restart_node(self, name: str) -> None:
        """The machine is back, and given back to Slurm."""
        self._start(name, "slurmd", "-D", "-N", name)
        self.command("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        self.until(f"{name} idle", lambda: self.states()[name] == "idle")

    def _is_of(self, process: psutil.Process, name: str) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.pid == self._daemons[name].pid or self._logs_to(process) == f"slurmd-{name}.log":
                return True
            return process.environ().get("SLURMD_NODENAME") == name
        return False

    def _logs_to(self, process: psutil.Process) -> str:
        """The daemon's log that a slurmstepd has open; it has written its title over its environment."""
        if not process.name().startswith("slurmstepd"):
            return ""
        logs = (Path(file.path) for file in process.open_files())
        return next((log.name for log in logs if log.parent == self.directory / "log"), "")

    def _look(self) -> None:
        """Remember every process of the cluster: what a daemon has started is nobody's child soon."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                ours = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours or self._logs_to(process):
                    self._seen[process.pid] = process

    def processes_of(self, number: str) -> list[psutil.Process]:
        """What lives of a job."""
        self._look()
        out = []
        for process in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.is_running() and process.environ().get("SLURM_JOB_ID") == number:
                    out.append(process)
        return out

    def logs(self) -> str:
        """The ends of all daemons' logs, for a failure's message."""
        parts = []
        for path in sorted((self.directory / "log").iterdir()):
            text = path.read_text(errors="replace")
            lines = [line for line in text.splitlines() if "mpi" not in line and "MPI" not in line]
            parts.append(f"{path.name}:\n" + "\n".join(lines[-8:]))
        return "\n".join(parts)

    def end(self) -> None:
        """End every process of the cluster and of its jobs, each by its id."""
        self._look()
        me = os.getpid()
        for process in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid != me:
                    process.kill()
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait(10)
        shutil.rmtree(self.directory, ignore_errors=True)
