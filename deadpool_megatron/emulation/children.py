"""Processes that multiprocessing starts are emulated too."""

from __future__ import annotations

import functools
import multiprocessing.forkserver
import multiprocessing.spawn
from typing import Any

_CHILD = "deadpool_megatron.emulation.child"


def install() -> None:
    """Forked processes are emulated by themselves; spawned ones, and fork servers, import `child`.

    Megatron's persistent checkpoint worker comes out of a fork server.
    """
    multiprocessing.forkserver.set_forkserver_preload([_CHILD, "__main__"])
    native = multiprocessing.spawn.get_command_line

    @functools.wraps(native)
    def get_command_line(**kwargs: Any) -> list[str]:
        line = list(native(**kwargs))
        if "-c" in line:  # else a frozen program, which has no such line
            code = line.index("-c") + 1
            line[code] = f"import {_CHILD}; {line[code]}"
        return line

    multiprocessing.spawn.get_command_line = get_command_line
