"""Which of a job's settings must be those of the job whose durable generation it goes on from.

Many of them leave the shape of every tensor as it is and make another model of the same numbers: the activation, the
base of the rotary embedding, how a router chooses. No digest of a layout sees that, so they are compared by name.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Any, Final

import torch

# What the parameters mean, and which rank has which: a job with another value is refused. By the names of Megatron-LM's
# ``args``: the list that its ``load_args_from_checkpoint`` takes over, the fields of ``TransformerConfig`` that change
# what a layer computes, and the layout.
MODEL: Final = (
    *("world_size", "data_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"),
    *("expert_tensor_parallel_size", "use_tp_pp_dp_mapping", "num_distributed_optimizer_instances"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout"),
    # layers
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("max_position_embeddings", "padded_vocab_size", "untie_embeddings_and_output_weights", "add_bias_linear"),
    *("add_qkv_bias", "spec", "transformer_impl", "normalization", "layernorm_epsilon", "norm_epsilon"),
    *("apply_layernorm_1p", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
    *("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm", "heterogeneous_layers_config_path"),
    *("heterogeneous_layers_config_encoded_json", "use_mup", "mup_width_mult", "mup_base_hidden_size"),
    *("mup_embedding_mult", "mup_output_mult", "mup_base_head_dim", "mup_attn_scale_power", "bert_binary_head"),
    # activations
    *("swiglu", "squared_relu", "openai_gelu", "quick_geglu", "gated_linear_unit", "activation_func"),
    *("activation_func_clamp_value", "glu_linear_offset"),
    # positions
    *("position_embedding_type", "add_position_embedding", "use_rotary_position_embeddings", "rotary_base"),
    *("rotary_percent", "rotary_interleaved", "rotary_seq_len_interpolation_factor", "rotary_scaling_factor"),
    *("rope_type", "use_rope_scaling", "rope_scaling", "rope_scaling_factor", "no_rope_freq", "mrope_section"),
    *("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "original_max_position_embeddings"),
    *("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
    # attention
    *("apply_query_key_layer_scaling", "softmax_type", "softmax_scale", "window_size", "window_attn_skip_freq"),
    *("qk_layernorm", "qk_l2_norm", "attention_output_gate", "multi_latent_attention", "q_lora_rank", "kv_lora_rank"),
    *("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "experimental_attention_variant", "dsa_indexer_n_heads"),
    *("dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset"),
    *("dsa_indexer_rope_interleaved", "dsa_indexer_rotate_activation", "dsa_indexer_scoring_relu"),
    *("dsa_indexer_k_norm_epsilon", "linear_attention_freq", "linear_conv_kernel_dim", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
    # experts, state spaces, several tokens
    *("num_experts", "moe_ffn_hidden_size", "moe_layer_freq", "moe_latent_size", "moe_shared_expert_intermediate_size"),
    *("moe_shared_expert_gate", "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_pre_softmax", "moe_router_score_function", "moe_router_topk_scaling_factor"),
    *("moe_router_enable_expert_bias", "moe_apply_probs_on_input", "mamba_state_dim", "mamba_head_dim"),
    *("mamba_num_groups", "mamba_num_heads", "hybrid_layer_pattern", "hybrid_override_pattern", "mtp_num_layers"),
    *("mtp_use_repeated_layer", "mtp_hybrid_override_pattern"),
    # what the optimizer holds
    *("params_dtype", "optimizer", "use_distributed_optimizer"),
)

# Known not to change what an iteration computes from the same microbatch, or said to be free (docs/durable.md):
# counters, learning rate and schedule, batch size and data, paths, reports, checkpoints, evaluation, and how and where
# it is computed.
_FREE: Final = re.compile(
    "|".join(
        (
            r".*rank|step|(curr_)?iteration|.*so_far|(consumed|skipped|train|iterations)_.*|do_(train|valid|test)",
            r"lr(_.*)?|min_lr|warmup|decoupled_(min_)?lr|(override|use_checkpoint)_opt_param_scheduler|exit_.*",
            r"((micro|global|rampup|eval_micro|eval_global)_)?batch_size|step_batch_size_schedule|decrease_batch_size.*",
            r"(data|blend|dataloader|valid|test|fim|mmap|mock|object_storage|per_split|per_dataset)_.*|split|num_workers",
            r"num_dataset_builder_threads|mid_level_dataset_surplus|.*_(dir|path|interval|port)|pretrained_checkpoint",
            r"(log|tensorboard|wandb|mlflow|comet|timing|one_logger|app_tag|profile|pytorch_profiler|nvtx)_.*|profile",
            r"(record|logging|straggler|logits_save|moe_routing_trace|memory|barrier)_.*|enable_one_logger|timers",
            r"(save|load|no_save|no_load|async|non_persistent|dist_ckpt|replication)(_.*)?|.*ckpt.*|finetune",
            r"use_(mp|tokenizer_model)_.*checkpoint_args|use_checkpoint_args|exit_on_missing_checkpoint|verify_integrity",
            r"eval_.*|start_eval_at_iter|skip_train|.*validation.*|(inference|mamba_inference)_.*|deadpool.*",
            r"(inprocess|ft|calc_ft|adlr|fault_injector|error_injection|rerun|check_for|manual_gc|distributed)_.*",
            r"(overlap|tp_comm|flight_recorder|nccl|sharp|cpu|cpu_offloading|fine_grained|cuda_graph|recompute)_.*",
            r"(moe_deepep|moe_hybridep|moe_flex|moe_ncclep|moe_paged|defer|delay|batch_p2p|high_priority|pin_cpu)_.*",
            r".*_fusion(_impl)?|.*offload.*|ddp_(num_buckets|bucket_size|pad_.*)|(check|align|external|enable)_.*",
            r"use_(gloo_process_groups|sharp|cpu_initialization|ring_exchange_p2p)|lazy_mpu_init|wgrad_deferral_limit",
            r"microbatch_group_size_per_vp_stage|distribute_saved_activations|moe_(token_dispatcher_type|enable_deepep)",
            r"moe_shared_expert_overlap|moe_per_layer_logging|perform_initialization|empty_unused_memory_level",
        )
    )
)
# Of which samples a global batch consists.
_BATCH: Final = ("global_batch_size", "rampup_batch_size", "step_batch_size_schedule")
# What follows from the number of replicas.
WIDTH: Final = frozenset(("world_size", "data_parallel_size"))
_NOTHING: Final = object()
_JSON_BITS: Final = 63


def _plain(value: Any) -> Any:
    """As JSON has it, the same in every process; `_NOTHING` for what has no such form."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, int) and value.bit_length() > _JSON_BITS:
        return str(value)
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        parts = [_plain(each) for each in value]
        return _NOTHING if any(each is _NOTHING for each in parts) else parts
    if isinstance(value, torch.dtype):
        return str(value)
    name = getattr(value, "__qualname__", "<")  # a function, a class; nothing local, whose name says nothing
    return _NOTHING if "<" in name else f"{value.__module__}.{name}"


def model_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same."""
    values = {name: _plain(args.get(name)) for name in MODEL}
    return {name: value for name, value in values.items() if value is not _NOTHING}


def batch_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """What a global batch consists of: free where only the job is another one, not where only its width is."""
    scheduled = args.get("step_batch_size_schedule")  # then the size is where the schedule stands
    values = {name: _plain(args.get(name)) for name in _BATCH if not (scheduled and name == "global_batch_size")}
    return {name: value for name, value in values.items() if value is not _NOTHING}


def other_settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """What may be another run's, and is said then."""
    names = [n for n in args if n not in MODEL and not n.startswith("_") and not _FREE.fullmatch(n.lower())]
    values = {name: _plain(args[name]) for name in names}
    return {name: value for name, value in values.items() if value is not _NOTHING}
