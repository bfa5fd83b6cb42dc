"""examples/pretrain_gpt.py with a rank that takes two seconds from one iteration to the next (LATE: "rank iteration").

So another rank of its node begins the next iteration, and it does not, if the epoch ends meanwhile.
"""

from __future__ import annotations

import functools
import os
import runpy
import time
from pathlib import Path
from typing import Any

from megatron.training import get_args, training

_rank, _iteration = map(int, os.environ["LATE"].split())
_native: Any = training.training_log


@functools.wraps(_native)
def _log(*args: Any, **kwargs: Any) -> Any:
    result = _native(*args, **kwargs)
    if int(os.environ["RANK"]) == _rank and get_args().curr_iteration == _iteration:
        time.sleep(2)
    return result


training.training_log = _log
runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"), run_name="__main__")
