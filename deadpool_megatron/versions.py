"""Which lines of megatron-core and torch are supported; imports neither torch nor Megatron."""

from __future__ import annotations

from typing import Final

__all__ = ["SUPPORTED", "UserError", "check_strategy", "check_version"]

SUPPORTED: Final = ("0.18", "0.19", "0.20")
RECONFIGURE_SINCE: Final = (2, 14)  # torch


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one line: what, where, what to do."""


def check_version(version: str) -> None:
    """Raises UserError for a megatron-core outside of the supported lines."""
    if not any(version == line or version.startswith(line + ".") for line in SUPPORTED):
        raise UserError(
            f"megatron-core {version} is not supported: DeadPool runs with "
            + ", ".join(f"{line}.x" for line in SUPPORTED)
            + "; install one of those"
        )


def check_strategy(comm: str, torch_version: str) -> None:
    """Raises UserError for a way of re-forming groups (`--deadpool-comm`) that this torch does not have."""
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in torch_version.split(".")[:2])
    if comm == "reconfigure" and (major, minor) < RECONFIGURE_SINCE:
        raise UserError(
            f"--deadpool-comm reconfigure needs torch {'.'.join(map(str, RECONFIGURE_SINCE))} or newer, this is torch "
            f"{torch_version}: use --deadpool-comm auto or swap, or install a newer torch"
        )
