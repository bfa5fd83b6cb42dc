"""examples/pretrain_gpt.py at a pace that a file sets: seconds that every forward pass sleeps.

So that processors are idle while a test waits for new spares, and no iterations are spent on it. Sleeping changes no
number.
"""

from __future__ import annotations

import os
import runpy
import time
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel

_forward = GPTModel.forward
_pace = Path(os.environ["PACE_FILE"])


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Upstream's, later."""
    time.sleep(float(_pace.read_text()))
    return _forward(self, *args, **kwargs)


GPTModel.forward = forward
runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"), run_name="__main__")
