"""Published recipes of Megatron-Bridge at toy size: less width, depth, length and batch, and fewer processes.

Recipes take a model's architecture from Hugging Face's hub; here it is a config of the same class with small numbers.
"""

from __future__ import annotations

from typing import Any

import transformers as hf
from megatron.bridge import AutoBridge, recipes
from megatron.bridge.training.config import ConfigContainer

_SEQUENCE = 64
_DENSE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 256,
}
_LATENT = {
    **{name: value for name, value in _DENSE.items() if name != "head_dim"},
    **{"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
}
_EXPERTS = {"num_experts_per_tok": 2}


def _architecture(path: str) -> hf.PretrainedConfig:
    match path:
        case "meta-llama/Meta-Llama-3-8B":
            return hf.LlamaConfig(**_DENSE, rope_theta=500000.0, architectures=["LlamaForCausalLM"])
        case "Qwen/Qwen3-30B-A3B":
            return hf.Qwen3MoeConfig(
                **_DENSE,
                **_EXPERTS,
                num_experts=4,
                moe_intermediate_size=64,
                norm_topk_prob=True,
                architectures=["Qwen3MoeForCausalLM"],
            )
        case "openai/gpt-oss-20b":
            return hf.GptOssConfig(
                **_DENSE, **_EXPERTS, num_local_experts=4, sliding_window=32, architectures=["GptOssForCausalLM"]
            )
        case "deepseek-ai/DeepSeek-V3":
            return hf.DeepseekV3Config(
                **_LATENT,
                **_EXPERTS,
                n_routed_experts=4,
                moe_intermediate_size=64,
                n_shared_experts=1,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                architectures=["DeepseekV3ForCausalLM"],
            )
    raise KeyError(path)


def tiny(name: str) -> ConfigContainer:
    """The recipe of that name, small."""
    hub: Any = AutoBridge
    hub.from_hf_pretrained = lambda path, **_: AutoBridge.from_hf_config(_architecture(str(path)))
    cfg: ConfigContainer = getattr(recipes, name)()
    if cfg.model.num_layers > 4:  # an architecture of the recipe's own
        small = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
        small |= {"num_query_groups": 2, "kv_channels": 16, "hybrid_layer_pattern": "M-M*"}
        small |= {"mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_num_groups": 2}
        for field, value in small.items():
            setattr(cfg.model, field, value)
    cfg.model.pipeline_model_parallel_layout = None  # of all the layers that there are not
    tokenizer = cfg.tokenizer  # those of words are on the hub, too
    tokenizer.tokenizer_type, tokenizer.tokenizer_model, tokenizer.vocab_size = "NullTokenizer", None, 255
    cfg.model.seq_length = cfg.dataset.seq_length = _SEQUENCE
    cfg.dataset.num_workers, cfg.dataset.persistent_workers, cfg.dataset.pin_memory = 0, False, False
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size = 8, 8, 1
    cfg.validation.eval_interval, cfg.validation.eval_iters = 4, 1
    cfg.scheduler.lr_warmup_iters = 2
    cfg.logger.log_interval, cfg.logger.tensorboard_dir = 1, None
    cfg.checkpoint.save = cfg.checkpoint.load = None
    cfg.dist.distributed_backend = "gloo"
    return cfg


def __getattr__(name: str) -> Any:
    """That of a name, as a function without arguments: ``bridge_recipes:NAME``."""
    if not hasattr(recipes, name):
        raise AttributeError(name)
    return lambda: tiny(name)
