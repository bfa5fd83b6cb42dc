"""examples/pretrain_gpt.py with ``--yaml-cfg``; after ``--write-yaml FILE``, the file that says the same as the flags.

Upstream's YAML reader (megatron-core 0.18 to 0.20) cannot train alone: it wants one field in two places of the file and
refuses it for being there twice, and a file cannot say dtypes. What it lacks is given here where a user's script would.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer import TransformerConfig
from megatron.training import arguments, yaml_arguments

# What upstream's reader refuses to find in the file: derived by it, or to be told in another way.
DERIVED = ("encoder_num_layers", "encoder_seq_length", "start_weight_decay", "end_weight_decay")
TWICE = "transformer_pipeline_model_parallel_size"


class Namespace(SimpleNamespace):
    """Class attributes are found, but are not there twice when namespaces are put together."""

    account_for_embedding_in_pipeline_split = False
    main_grads_dtype = main_params_dtype = exp_avg_dtype = exp_avg_sq_dtype = torch.float32
    megatron_fsdp_main_params_dtype = torch.float32
    mamba_inference_conv_states_dtype = mamba_inference_ssm_states_dtype = torch.bfloat16


def write(file: Path) -> None:
    """The command line's arguments as a file of upstream's form."""
    args = arguments.parse_args()
    arguments.validate_args(args, {})
    flat = vars(args)

    def default(field: dataclasses.Field[Any]) -> Any:
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        return None if field.default is dataclasses.MISSING else field.default

    parallel = {f.name for f in dataclasses.fields(ModelParallelConfig)}
    fields = {f.name: flat.get(f.name, default(f)) for f in dataclasses.fields(TransformerConfig)}
    content = {
        **{k: v for k, v in flat.items() if k not in fields and k != TWICE and _plain(v)},
        **dict.fromkeys(DERIVED),
        "model_parallel": {k: v if _plain(v) else None for k, v in fields.items() if k in parallel},
        "language_model": {k: v if _plain(v) else None for k, v in fields.items() if k not in parallel}
        | {"activation_func": "gelu"},
    }
    file.write_text(yaml.safe_dump(json.loads(json.dumps(content))))


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def train() -> None:
    """With the settings of the file."""
    yaml_arguments.SimpleNamespace = Namespace
    path = Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"
    spec = importlib.util.spec_from_file_location("pretrain_gpt_example", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()


if __name__ == "__main__":
    if sys.argv[1] == "--write-yaml":
        destination = Path(sys.argv.pop(2))
        del sys.argv[1]
        write(destination)
    else:
        train()
