"""Which lines of megatron-core and torch are supported; imports neither torch nor Megatron."""

from __future__ import annotations

from typing import Final

SUPPORTED: Final = ("0.18", "0.19", "0.20")
BRIDGES: Final = ("0.6.", "0.7.")  # of megatron-bridge


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
