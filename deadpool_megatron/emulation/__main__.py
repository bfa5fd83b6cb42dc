"""``python -m deadpool_megatron.emulation SCRIPT [ARGS]``: run a script under the emulation, without DeadPool."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from deadpool_megatron.emulation import EmulationError, install


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m deadpool_megatron.emulation SCRIPT [ARGS]")
    script = sys.argv[1]
    if not Path(script).is_file():
        sys.exit(f"deadpool: {script}: no such script")
    try:
        install()
    except EmulationError as err:
        sys.exit(f"deadpool: {err}")
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
