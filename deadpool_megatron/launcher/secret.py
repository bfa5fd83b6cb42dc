"""How the job's secret reaches every node: never by command line, never through a log.

Either the user gives one (``DEADPOOL_SECRET``, or the file named by ``DEADPOOL_SECRET_FILE`` or ``--secret-file``), or
the coordinator makes a new one for each start, and ``job.json`` in the shared run directory, readable by its owner
alone, tells the others.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from deadpool_megatron.launcher.plan import LaunchError
from deadpool_megatron.launcher.processes import SECRET_VARIABLES
from deadpool_megatron.observe import JOB

SECRET, SECRET_FILE = SECRET_VARIABLES[:2]
_MAKE_ONE = "make one with: (umask 077; openssl rand -hex 32 > FILE)"


class SecretSource:
    """Where this node's secret comes from.

    Args:
        file: ``--secret-file``, or None.
        environ: looked up for the two variables; the file counts before the variables.
        job_name: ``--rdzv-id``; jobs of different names never share a key, even with one secret.

    Raises:
        LaunchError: the secret that was given cannot be used.
    """

    def __init__(self, file: str | None, environ: Mapping[str, str], run_dir: str, job_name: str) -> None:
        self._job = Path(run_dir) / JOB
        path = file or environ.get(SECRET_FILE)
        if path:
            given: str | None = _read_private(Path(path), 0o007)
            where = f"secret file {path}"
        else:
            given = environ.get(SECRET)
            where = SECRET
        self.given = None if given is None else _derive(_parse(given, where), job_name)

    def make(self) -> bytes:
        """The secret the coordinator is started with."""
        return self.given or secrets.token_bytes(32)

    def find(self) -> bytes | None:
        """The secret to try now: the one that was given, else what the coordinator has written; None: nothing yet.

        Raises LaunchError when the run directory's is not for us alone.
        """
        if self.given is not None:
            return self.given
        try:
            text = _read_private(self._job, 0o077)
            return bytes.fromhex(json.loads(text)["secret"])
        except (FileNotFoundError, ValueError, KeyError):
            return None  # not there yet, or an older one that is being replaced

    def why_none(self) -> str:
        """What to tell the user whose agent found no secret."""
        return (
            f"no {self._job} has appeared: either the command has not begun yet on the machine of the coordinator (of "
            "node 0, or of --rdzv-endpoint), or --run-dir is on no file system that all nodes share; then give every "
            f"node the same {SECRET_FILE}"
        )


def _parse(text: str, where: str) -> bytes:
    try:
        out = bytes.fromhex(text.strip())
        if len(out) != 32:
            raise ValueError
    except ValueError:
        raise LaunchError(f"{where}: expected 64 hexadecimal digits; {_MAKE_ONE}") from None
    return out


def _derive(secret: bytes, job_name: str) -> bytes:
    return hmac.new(secret, b"deadpool-job-" + job_name.encode(), hashlib.sha256).digest()


def _read_private(path: Path, forbidden: int) -> str:
    """The text of a file that is ours. Raises FileNotFoundError for the run directory's, else LaunchError."""
    try:
        with path.open() as f:
            status = os.fstat(f.fileno())
            if status.st_mode & forbidden:
                raise LaunchError(f"{path} can be read by others: chmod 600 {path}")
            if status.st_uid not in (os.geteuid(), 0):
                raise LaunchError(f"{path} belongs to user {status.st_uid}, not to you")
            return f.read()
    except FileNotFoundError:
        if path.name == JOB:
            raise
        raise LaunchError(f"secret file {path} does not exist; {_MAKE_ONE}") from None
    except OSError as err:
        raise LaunchError(f"{path}: {err.strerror}") from None
    except UnicodeDecodeError:
        raise LaunchError(f"{path}: not a text file; {_MAKE_ONE}") from None
