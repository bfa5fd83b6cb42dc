"""As a script, ``held.py GO ITERATION SCRIPT [ARGS]``: SCRIPT, whose ranks wait before ITERATION for the file GO.

On a device iterations of a toy model are over before a spare is warm. Once the file is there nothing is done any more.
"""

from __future__ import annotations

import functools
import inspect
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LOOK_S = 0.01


def _held(train_step: Callable[..., Any], go: Path, iteration: int) -> Callable[..., Any]:
    signature = inspect.signature(train_step)

    @functools.wraps(train_step)
    def held(*args: Any, **kwargs: Any) -> Any:
        while signature.bind(*args, **kwargs).arguments["iteration"] >= iteration and not go.exists():
            time.sleep(_LOOK_S)
        return train_step(*args, **kwargs)

    return held


def main() -> None:
    """Run the script that the command line names."""
    from megatron.training import training

    go, iteration, script = sys.argv[1:4]
    sys.argv = sys.argv[3:]
    sys.path[0] = str(Path(script).resolve().parent)
    training.train_step = _held(training.train_step, Path(go), int(iteration))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
