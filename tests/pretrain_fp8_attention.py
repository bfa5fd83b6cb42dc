"""examples/pretrain_gpt.py with attention in FP8, which no flag of Megatron-LM's switches on: here one does."""

from __future__ import annotations

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

sys.argv.remove("--fp8-dot-product-attention")
_native: Any = TransformerConfig.__post_init__


@functools.wraps(_native)
def _with_it(self: Any) -> None:
    self.fp8_dot_product_attention = True
    _native(self)


TransformerConfig.__post_init__ = _with_it
runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"), run_name="__main__")
