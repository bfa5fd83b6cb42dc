"""A tiny model in Megatron-Bridge's loop: ``pretrain_bridge.py [recipe=NAME] [section.field=value ...]``.

At ``hold N`` in `PACE_FILE` a rank waits before it begins iteration N, as in `pretrain_paced`. In `LOOK_FILE`.RANK it
writes at each forward pass of training how many operations there were at the last line of the log.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training import config as c
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.state import GlobalState

_SEQUENCE = 64


def tiny() -> c.ConfigContainer:
    """4 layers of 64, 8 samples an iteration."""
    return c.ConfigContainer(
        model=GPTModelProvider(
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            seq_length=_SEQUENCE,
            pipeline_dtype=torch.bfloat16,
        ),
        train=c.TrainingConfig(train_iters=8, global_batch_size=8, micro_batch_size=1),
        validation=c.ValidationConfig(eval_interval=4, eval_iters=1),
        optimizer=c.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-4, weight_decay=0.1, bf16=True, use_distributed_optimizer=True
        ),
        scheduler=c.SchedulerConfig(
            start_weight_decay=0.033,
            end_weight_decay=0.033,
            weight_decay_incr_style="constant",
            lr_decay_style="cosine",
            lr_warmup_iters=2,
            lr_decay_iters=40,
        ),
        ddp=c.DistributedDataParallelConfig(
            check_for_nan_in_grad=True, grad_reduce_in_fp32=True, use_distributed_optimizer=True
        ),
        dataset=c.MockGPTDatasetConfig(
            random_seed=1234,
            seq_length=_SEQUENCE,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            dataloader_type="single",
            num_workers=0,
            persistent_workers=False,
            pin_memory=False,
        ),
        logger=c.LoggerConfig(log_interval=1),
        tokenizer=c.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
        checkpoint=c.CheckpointConfig(ckpt_format="torch_dist", async_strategy="mcore"),
        rng=c.RNGConfig(seed=1234),
        dist=c.DistributedInitConfig(distributed_backend="gloo"),
        mixed_precision="bf16_mixed",
        inprocess_restart=c.InProcessRestartConfig(),
    )


def chosen(words: list[str]) -> tuple[c.ConfigContainer, list[str]]:
    """The configuration and what is left of the words: a GPT, or a published recipe."""
    if not words or not words[0].startswith("recipe="):
        return tiny(), words
    import bridge_recipes

    return bridge_recipes.tiny(words[0].partition("=")[2]), words[1:]


def overridden(cfg: c.ConfigContainer, words: list[str]) -> c.ConfigContainer:
    """With fields set as on the command line of Bridge's own scripts."""
    for word in words:
        name, _, text = word.partition("=")
        *path, field = name.split(".")
        holder: Any = cfg
        for part in path:
            holder = getattr(holder, part)
        getattr(holder, field)  # there is one
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        setattr(holder, field, value)
    return cfg


def _look(state: GlobalState) -> None:
    look = {"step": state.train_state.step, "operations": vars(state)["_flops_at_last_log"]}
    with Path(f"{os.environ['LOOK_FILE']}.{os.environ['RANK']}").open("a") as file:
        file.write(json.dumps(look) + "\n")


def paced(state: GlobalState, data_iterator: Any, model: Any) -> Any:
    """Bridge's forward step, later."""
    if "LOOK_FILE" in os.environ and torch.is_grad_enabled():
        _look(state)
    pace = Path(os.environ["PACE_FILE"])
    while (word := pace.read_text()).startswith("hold ") and state.train_state.step >= int(word.split()[1]):
        time.sleep(0.01)
    return forward_step(state, data_iterator, model)


if __name__ == "__main__":
    pretrain(overridden(*chosen(sys.argv[1:])), paced if "PACE_FILE" in os.environ else forward_step)
