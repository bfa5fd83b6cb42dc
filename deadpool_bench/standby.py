"""``standby.py GO SCRIPT [ARGS]``: a worker that imports all SCRIPT will need, waits for the file GO, and runs it.

For the restart baseline of `deadpool bench recovery` (`bench.restarts`): what DeadPool's spare has warm, this has.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path


def main() -> None:
    """Wait, then run the script as ``python SCRIPT`` would."""
    go, script, *arguments = sys.argv[1:]
    from deadpool_megatron.hosts import host_of
    from deadpool_megatron.megatron import warm_up

    warm_up(script, host_of(script))
    Path(f"{go}.ready-{os.environ['RANK']}").touch()
    while not os.path.exists(go):
        time.sleep(0.005)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
