"""A job started by hand, one process a rank, with the environment that torchrun, srun and their like set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from machines import Machines

__all__ = ["IN_TREE", "Ranks", "attached"]

# What the patch sets put at the top of upstream's pretrain_gpt.py.
IN_TREE = """\
if __name__ == '__main__':
    from deadpool_megatron.intree import attach

    attach()

import runpy

runpy.run_path({script!r}, run_name='__main__')
"""


def attached(directory: Path, script: Path) -> Path:
    """A script that attaches as a patched one does, then runs ``script``."""
    path = directory / "attached.py"
    path.write_text(IN_TREE.format(script=str(script)))
    return path


class Ranks(Machines):
    """Rank processes of one job, on nodes of one process each; `deadpool agent` is not among their children."""

    def start_rank(
        self, rank: int, world: int, script: Sequence[str], env: dict[str, str] | None = None, slots: int = 1
    ) -> None:
        """Start a rank as its launcher would."""
        told = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank % slots),
            "LOCAL_WORLD_SIZE": str(slots),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "DEADPOOL_EMULATE_CPU": "1",
        }
        self.start_command([sys.executable, *script], told | (env or {}))

    def deadpool(self, spares: int = 0) -> list[str]:
        """Our flags for this job."""
        return [
            *["--deadpool", "--deadpool-spare-nodes", str(spares), "--deadpool-run-dir", str(self.run_dir)],
            *["--deadpool-state-hash", f"{self.run_dir}.hash.json"],
        ]
