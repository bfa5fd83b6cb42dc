"""The census: all that lives in Megatron's process, changes while it trains, and may decide what an iteration does.

Paths are as `pretrain_census` makes them. ``how`` says what a recovery does about each (modules in brackets are those
of `deadpool_megatron.megatron`):

* ``shard``: a tensor that a generation copies, or that follows from those (`unique_state`, `optimizer_state`)
* ``small``: carried in the small state (`small_state`, `lm.run_args`, `replay`)
* ``made``: made again: ``train`` does at its begin, or it follows from what is carried
* ``reset``: of no effect between iterations; what a broken step leaves there is cleared (`reset`) or written over
* ``free``: decides no number: scratch memory, times, counts for reports, caches that are asked before they are trusted

After a recovery, what is ``made``, ``reset`` or ``free`` may be otherwise than in a run in which nothing happened; what
a ``shard`` or the ``small`` state has may not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Entry:
    """``pattern``: a regular expression of whole paths. ``where``: in our code, or why it is of no effect.

    ``since``: the version of megatron-core (major, minor) in which there is such a value first.
    """

    pattern: str
    how: Literal["shard", "small", "made", "reset", "free"]
    where: str
    since: tuple[int, int] = (0, 18)

    def names(self, path: str) -> bool:
        """Whether this entry is about the value at ``path``."""
        return re.fullmatch(self.pattern, path) is not None


_MODEL: Final = r"model\[\d+\]\.(.*\.)?"
_FROM_MAIN: Final = "follows from main parameters (now or when it is gathered); frozen ones from the vault or a replica"
_OPTIMIZER: Final = r"optimizer(\.chained_optimizers\[\d+\])*"
_RERUN: Final = r"megatron\.core\.rerun_state_machine:_GLOBAL_RERUN_STATE_MACHINE"

_MTP: Final = r"megatron\.core\.transformer\.multi_token_prediction:MTPLossLoggingHelper\.tracker"

CENSUS: Final[tuple[Entry, ...]] = (
    # the model, and what DistributedDataParallel keeps
    Entry(_MODEL + r"(_parameters\[\w+\]|param_data|params_list\[\d+\]|params\[\d+\])", "made", _FROM_MAIN),
    Entry(r"model\[\d+\]\.(params_with_grad\[\d+\])", "made", _FROM_MAIN),
    Entry(_MODEL + r"cached_param_buffer_shard_list.*", "made", _FROM_MAIN),
    Entry(r"model\[\d+\]\..*\.main_param", "shard", "main parameters"),
    Entry(_MODEL + r"_buffers\[\w+\]", "small", "small_state stages every buffer"),
    Entry(r".*\.(grad|main_grad)", "reset", "gradients: zeroed at the begin of a step"),
    Entry(_MODEL + r"(grad_data|cached_grad_buffer_shard_list.*)", "reset", "gradients, in buffers"),
    Entry(
        _MODEL + r"((golden_)?per_param_grad_ready_counts.*|grad_reduce_finished|is_first_batch|is_last_microbatch|"
        r"param_gather_dispatched)",
        "reset",
        "Adapter.refresh_bucket_group",
    ),
    Entry(_MODEL + r"_forward_pre_hooks#", "made", "train() takes them away for its first iteration"),
    Entry(r"model\[\d+\]\.remove_forward_pre_hook_handles#", "made", "the same"),
    Entry(_MODEL + r"current_microbatch", "reset", "set at every forward pass"),
    Entry(_MODEL + r"input_tensor", "reset", "of the last forward pass of a pipeline stage"),
    Entry(_MODEL + r"token_dispatcher\.\w+", "reset", "of the last forward pass of experts"),
    Entry(
        _MODEL + r"(attn_norm_manager|_input_layernorm_checkpoint_active)",
        "reset",
        "set at every forward pass",
        (0, 20),
    ),
    Entry(
        _MODEL + r"_extra_tensor_channels_locked",
        "made",
        "operations of Transformer Engine: they get no other inputs once they have run",
        (0, 20),
    ),
    Entry(
        r"megatron\.core\.models\.bert\..*:HAVE_\w+",
        "free",
        "imported by the script that paces tests, and not by an undisturbed run's",
        (0, 20),
    ),
    # the optimizer
    Entry(
        _OPTIMIZER + r"\.optimizer\.param_groups\[\d+\]#",
        "small",
        "Numbers: the fused step counts in a field of its own",
        (0, 20),
    ),
    Entry(_OPTIMIZER + r"\.(optimizer\.state|shard_\w+|fp32_\w+)\b.*", "shard", "unique state"),
    Entry(_OPTIMIZER + r"\.opt_group_ranges.*(main_param|orig_group\]\[params\]\[\d+\])", "shard", "unique state"),
    Entry(_OPTIMIZER + r"\.\w*float16_groups.*\.main_param", "shard", "unique state"),
    Entry(_OPTIMIZER + r"\.optimizer\.param_groups\[\d+\]\[params\].*", "shard", "unique state"),
    Entry(_OPTIMIZER + r"\.(\w*float16_groups(\[\d+\])+|opt_group_ranges\[\d+\]\[params\]\[\d+\])", "made", _FROM_MAIN),
    Entry(_OPTIMIZER + r"\.optimizer\.param_groups\[\d+\]\[\w+\]", "small", "Numbers: every field of every group"),
    Entry(_OPTIMIZER + r"\._has_grad_norm_group_cache.*", "reset", "Adapter.learned: spares do not know it"),
    Entry(_OPTIMIZER + r"\.grad_norms_by_group.*", "reset", "of the last step, for its report"),
    Entry(_OPTIMIZER + r"\.grad_scaler\.\w+", "small", "loss scale and its counters"),
    Entry(_OPTIMIZER + r"\.found_inf", "reset", "of a step"),
    Entry(r"scheduler\.\w+", "small", "every field"),
    # random numbers
    Entry(r"rng\.\w+", "small", "python, numpy, torch, device"),
    Entry(r"megatron\.core\.tensor_parallel\.random:_CUDA_RNG_STATE_TRACKER\.states_\[[\w-]+\]", "small", "tracker"),
    # args
    Entry(r"args\.(iteration|num_floating_point_operations_so_far)", "made", "train() counts in variables of its own"),
    Entry(r"args\.(save|deadpool_state_hash)", "free", "where this run writes"),
    Entry(r"args\.(?!iteration|num_floating|save|deadpool_)\w+#?(\[\d+\])?", "small", "RunArgs: all that change"),
    # data
    Entry(r"data\.saved_microbatches.*", "reset", "of the iteration that is over; ReplayIterator has the next ones"),
    # the rerun state machine
    Entry(_RERUN + r"\.(current_iteration|large_value_counts.*|max_values.*)", "small", "what it counts on from"),
    Entry(_RERUN + r"\.first_iteration_complete", "small", "from then on it looks at results"),
    Entry(_RERUN + r"\.saved_state.*", "reset", "taken at the begin of each iteration"),
    Entry(_RERUN + r"\.(validation_counts.*|injected_result)", "reset", "of a step"),
    Entry(_RERUN + r"\.logged_sdc_enabled", "free", "a line of the log"),
    # sums for the log
    Entry(r"megatron\.core\.transformer\.moe\.moe_logging:_MOE_METRICS_TRACKER.*", "reset", "sums.clear_sums"),
    Entry(_MTP + r"\[cumulative_\w+\]", "small", "sums.cumulative"),
    Entry(_MTP + r"(#|\[(?!cumulative_)\w+\])", "reset", "sums.clear_sums"),
    Entry(
        r"megatron\.core\.transformer\.(multi_token_prediction|moe\.moe_utils):\w+AutoScaler\.main_loss_backward_scale",
        "reset",
        "set at every forward pass",
    ),
    # the rest
    Entry(r"megatron\.core\.parallel_state:_GLOBAL_MEMORY_BUFFER\.buffer.*", "free", "scratch memory, by shape"),
    Entry(
        r"megatron\.core\.dist_checkpointing\..*(_metadata_cache|_results_queue|_logged_\w+).*",
        "reset",
        "reset.forget_write_results; the others are caches of saves, which are free",
    ),
    Entry(r"megatron\.training\.ft_integration:_seen_checkpoints_cnt", "free", "counts for another tool"),
    Entry(r"megatron\.training\.training:(num_checkpoints_memory_reported|_STARTUP_TIMESTAMPS.*)", "free", "reports"),
    Entry(
        r"megatron\.training\.training:_otel_trace_interval_step", "free", "when to begin a span of a trace", (0, 20)
    ),
)
