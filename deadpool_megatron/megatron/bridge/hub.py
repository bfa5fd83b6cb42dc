"""Architectures that recipes take from Hugging Face's hub: one try each, and without it those of published recipes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Final

from deadpool_megatron.compat import UserError

_LATENT: Final = ("DeepseekV3Config", "DeepseekV3ForCausalLM")
_LLAMA: Final = ("LlamaConfig", "LlamaForCausalLM")
_QWEN3: Final = ("Qwen3MoeConfig", "Qwen3MoeForCausalLM")
_QWEN3_VL: Final = ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration")
_QWEN35: Final = ("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration")
_NEMOTRON: Final = ("NemotronHConfig", "NemotronHForCausalLM")
_GLM: Final = ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM")
_V4: Final = ("DeepseekV4Config", "DeepseekV4ForCausalLM")


def _dense(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
    }


def _qwen35(hidden: int, layers: int, experts: int, chosen: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "linear_num_value_heads": 64,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
    }


def _seeing(text: dict[str, Any]) -> dict[str, Any]:
    """A language model with the class's vision encoder, which speaks its width."""
    return {"text_config": text, "vision_config": {"out_hidden_size": text["hidden_size"]}}


_OF_128: Final = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
_QWEN3_30B: Final = {**_dense(2048, 6144, 48, 32, 4, 151936), **_OF_128, "moe_intermediate_size": 768}
_QWEN3_235B: Final = {**_dense(4096, 12288, 94, 64, 4, 151936), **_OF_128, "moe_intermediate_size": 1536}
_YARN: Final = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16, "original_max_position_embeddings": 65536}
# By name on the hub: transformers' class of the config, the architecture, and the numbers in which the model differs
# from that class's defaults.
_KNOWN: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "meta-llama/Meta-Llama-3-8B": (*_LLAMA, _dense(4096, 14336, 32, 32, 8, 128256)),
    "meta-llama/Meta-Llama-3-70B": (*_LLAMA, _dense(8192, 28672, 80, 64, 8, 128256)),
    "meta-llama/Meta-Llama-3.1-405B": (*_LLAMA, _dense(16384, 53248, 126, 128, 8, 128256)),
    "Qwen/Qwen3-30B-A3B": (*_QWEN3, _QWEN3_30B),
    "Qwen/Qwen3-235B-A22B": (*_QWEN3, _QWEN3_235B),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {}),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": (*_QWEN3_VL, _seeing(_QWEN3_30B)),
    "Qwen/Qwen3-VL-235B-A22B-Instruct": (*_QWEN3_VL, _seeing(_QWEN3_235B)),
    "Qwen/Qwen3.5-35B-A3B": (*_QWEN35, _seeing({"hidden_size": 2048})),
    "Qwen/Qwen3.5-122B-A10B": (*_QWEN35, _seeing(_qwen35(3072, 48, 256, 8))),
    "Qwen/Qwen3.5-397B-A17B": (*_QWEN35, _seeing(_qwen35(4096, 60, 512, 10))),
    "deepseek-ai/DeepSeek-V3": (*_LATENT, {"num_nextn_predict_layers": 1}),
    "deepseek-ai/DeepSeek-V4-Flash": (*_V4, {"rope_scaling": _YARN}),
    "deepseek-ai/DeepSeek-V4-Pro": (*_V4, {"rope_scaling": _YARN}),
    "moonshotai/Kimi-K2-Instruct": (
        *_LATENT,
        {
            **{"num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "vocab_size": 163840},
            **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827},
        },
    ),
    "openai/gpt-oss-20b": ("GptOssConfig", "GptOssForCausalLM", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "openai/gpt-oss-120b": ("GptOssConfig", "GptOssForCausalLM", {}),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": (*_NEMOTRON, {}),
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": (*_NEMOTRON, {}),
    "zai-org/GLM-5.1": (*_GLM, {}),
    "zai-org/GLM-5.2": (*_GLM, {}),
}
# Sizes of tokenizers' vocabularies, by name on the hub.
_VOCABULARIES: Final = {"nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 131072}
# Of these the kind of model is known here, and its size is not.
_SIZES_UNKNOWN: Final = ("deepseek-ai/DeepSeek-V4-Pro", "nvidia/NVIDIA-Nemotron-3-", "zai-org/GLM-5.")


def vocabulary(tokenizer: str | None) -> int | None:
    """Of a tokenizer that cannot be had; None where it is not known here either."""
    return _VOCABULARIES.get(tokenizer or "")


@contextlib.contextmanager
def one_try_each() -> Iterator[dict[str, bool]]:
    """Bridge asks the hub once for an architecture, and takes the one known here where it gets none.

    Gives what was taken from here, by name on the hub: whether its size is the model's too.
    """
    from megatron.bridge.models.conversion import auto_bridge

    taken: dict[str, bool] = {}
    asks = auto_bridge.safe_load_config_with_retry

    def config(path: Any, trust_remote_code: bool = False, **more: Any) -> Any:
        name = str(path)
        if name not in taken:
            try:
                return _from_hub(name, trust_remote_code)
            except (OSError, ValueError, ImportError) as err:
                if name not in _KNOWN:
                    raise UserError(
                        f"its architecture, {name}, could not be read from Hugging Face's hub or its cache "
                        f"({str(err).splitlines()[0]}): run this once where the hub answers"
                    ) from None
        taken[name] = not name.startswith(_SIZES_UNKNOWN)
        return _known(name)

    auto_bridge.safe_load_config_with_retry = config
    try:
        yield taken
    finally:
        auto_bridge.safe_load_config_with_retry = asks


@functools.cache
def _from_hub(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


@functools.cache
def _known(name: str) -> Any:
    import transformers

    config, architecture, numbers = _KNOWN[name]
    return getattr(transformers, config)(**numbers, architectures=[architecture])
