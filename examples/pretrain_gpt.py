"""GPT pre-training on the public megatron-core wheel (0.18 or later): dense or MoE, any schedule, mock or real data.

Plain Megatron: nothing here knows DeadPool. Run it under torchrun, or under `deadpool launch` with --deadpool to
survive lost nodes. The wheel carries `megatron.training`, but not upstream's top-level pretrain_gpt.py; this script is
a small one of our own in its place, and upstream's works just as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import argument_utils, get_args, get_timers, pretrain
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

stragglers = StragglerDetector()  # the one of the process, for --log-straggler
FIELDS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
# "No packed sequences", as 0.18 and as later versions want to be told.
_packing = {"is_sft", "has_cu_seqlens"} & set(inspect.signature(get_batch_on_this_tp_rank).parameters)
NO_PACKING = dict.fromkeys(_packing, False)


def load_microbatch(data_iterator: Iterator[dict[str, Any]], vp_stage: int | None) -> dict[str, torch.Tensor | None]:
    """One microbatch on every rank that needs it: int64 [micro_batch, sequence] tokens, labels and positions."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(FIELDS)
    args = get_args()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        drawn = next(data_iterator)
        batch = {name: None if drawn.get(name) is None else drawn[name].cuda(non_blocking=True) for name in FIELDS}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
        is_hybrid_cp=False,
        mtp_on_this_rank=False,
        **NO_PACKING,
    )
    on_this_rank: dict[str, torch.Tensor | None] = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )
    return on_this_rank


def language_model_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum of the token losses, number of tokens, and what Megatron's log averages."""
    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    if get_args().check_for_nan_in_loss_and_grad:
        for wrong, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=total, rejection_func=wrong, message=f"found {name} in the local loss", tolerance=0.0, fatal=True
            )
    tokens = mask.sum().detach().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.to(total.dtype)])}


def forward_step(
    data_iterator: Iterator[dict[str, Any]], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """One forward pass, as Megatron's schedules call it; its plan alone for ``--overlap-moe-expert-parallel-comm``."""
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    with stragglers(bdata=True):
        batch = load_microbatch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timer.stop()
    forward = model.build_schedule_plan if return_schedule_plan else model
    with stragglers:
        output = forward(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    return output, partial(language_model_loss, batch["loss_mask"])


def build_datasets(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets, built on the ranks that read data."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )

    def reads_data() -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    train, valid, test = BlendedMegatronDatasetBuilder(kind, samples, reads_data, config).build()
    return train, valid, test


def use_compiled_helpers() -> None:
    """The wheel has the dataset helpers compiled, but upstream runs `make` for them, whose Makefile it lacks."""
    if not (Path(dataset_utils.__file__).parent / "Makefile").exists():
        dataset_utils.compile_helpers = lambda: None


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """The model chunk of one pipeline stage, for 0.18, which does not build it from a configuration yet."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    te = args.transformer_impl == "transformer_engine"
    if args.num_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=te, vp_stage=vp_stage)
    elif te:
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization=args.normalization)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def main() -> None:
    """Parse Megatron's flags and train."""
    use_compiled_helpers()
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    build_datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank builds its own
    if hasattr(argument_utils, "gpt_config_from_args"):
        config = argument_utils.pretrain_cfg_container_from_args(args, argument_utils.gpt_config_from_args(args))
        pretrain(config, build_datasets, ModelType.encoder_or_decoder, forward_step)
    else:
        config = argument_utils.pretrain_cfg_container_from_args(args)
        pretrain(config, build_datasets, build_model, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
