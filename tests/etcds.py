"""Real etcd servers for tests; a test skips, saying why, where there can be none."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["need_etcd"]

INSTALL = Path(__file__).resolve().parents[1] / "scripts" / "install_etcd.sh"


@functools.cache
def _why_none() -> str:
    if shutil.which("etcd"):
        return ""
    try:
        done = subprocess.run([str(INSTALL)], capture_output=True, text=True, check=False, timeout=150)
    except subprocess.TimeoutExpired:
        return "scripts/install_etcd.sh did not end within 150 s"
    if done.returncode:
        return f"etcd cannot be installed here: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return ""


def need_etcd() -> None:
    """Install etcd if it is missing; skip the test if that does not work."""
    if why := _why_none():
        pytest.skip(why)
