"""A pre-training script at a pace that a file sets: seconds that every forward pass sleeps, or ``hold N``.

Sleeping leaves processors to others while a test waits for new spares, and spends no iterations on it. At ``hold N`` a
rank waits before it begins iteration N (from 0), until the file says otherwise: so a test can arm a fault for an
iteration that cannot be over. At ``wait`` it waits before the script begins. Nothing of it changes a number. The
environment has the file, and the script (`SCRIPT`).
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.T5 import T5Model
from megatron.training import get_args

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:  # 0.18
    HybridModel = None
_pace = Path(os.environ["PACE_FILE"])
_script = os.environ.get("SCRIPT") or str(Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py")


def paced(kind: type) -> None:
    """Upstream's forward pass, later."""
    original: Any = kind.forward  # type: ignore[attr-defined]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        while (pace := _pace.read_text()).startswith("hold ") and get_args().curr_iteration >= int(pace.split()[1]):
            time.sleep(0.01)
        if not pace.startswith("hold "):
            time.sleep(float(pace))
        return original(self, *args, **kwargs)

    kind.forward = forward  # type: ignore[attr-defined]


for model in (GPTModel, BertModel, T5Model, *([HybridModel] if HybridModel else [])):
    paced(model)
while _pace.read_text() == "wait":
    time.sleep(0.01)
sys.argv[0] = _script
sys.path.insert(0, str(Path(_script).parent))
runpy.run_path(_script, run_name="__main__")
