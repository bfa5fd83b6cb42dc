"""Models beside GPT on Megatron's own loop, as upstream's other scripts train them: MODEL is hybrid, bert, t5, vlm
or packed (GPT on packed documents).

Built by megatron-core's public classes, data from a loader of our own (``--dataloader-type external``): upstream's for
BERT and T5 want a word-piece vocabulary and a corpus.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset
from megatron.core.enums import ModelType
from megatron.core.models.bert.bert_layer_specs import get_bert_layer_with_transformer_engine_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_transformer_engine_default_spec
from megatron.core.models.T5 import T5Model, t5_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import get_submodules
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

_IMAGE = 28
_spec = importlib.util.spec_from_file_location("pretrain_external", Path(__file__).with_name("pretrain_external.py"))
assert _spec is not None and _spec.loader is not None
external: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(external)


def _batch(data_iterator: Iterator[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in next(data_iterator).items()}


def bert(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, config: Any = None, **_: Any
) -> BertModel:
    """As examples/bert/pretrain_bert.py builds it."""
    args = get_args()
    return BertModel(
        config=config or core_transformer_config_from_args(args),
        num_tokentypes=2,
        transformer_layer_spec=get_bert_layer_with_transformer_engine_spec(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        add_binary_head=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        vp_stage=vp_stage,
    )


def bert_loss(batch: dict[str, torch.Tensor], output: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Of the masked words and of the order of sentences."""
    losses, order = output
    mask = batch["loss_mask"].float()
    words = (losses.float() * mask).sum() / mask.sum()
    order_loss = F.cross_entropy(order.view(-1, 2).float(), batch["tokens"][:, 0] % 2)
    return words + order_loss, {"lm loss": words.detach(), "sop loss": order_loss.detach()}


def bert_step(data_iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Callable[..., Any]]:
    """One forward pass."""
    batch = _batch(data_iterator)
    kinds = (batch["position_ids"] >= batch["position_ids"].shape[1] // 2).long()
    output = model(batch["tokens"], torch.ones_like(kinds), tokentype_ids=kinds, lm_labels=batch["labels"])
    return output, partial(bert_loss, batch)


def t5(pre_process: bool = True, post_process: bool = True, config: Any = None, **_: Any) -> T5Model:
    """As examples/t5/pretrain_t5.py builds it; it has no pipeline."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    encoder = deepcopy(config)
    encoder.num_layers = args.encoder_num_layers
    return T5Model(
        config=config,
        encoder_config=encoder,
        transformer_encoder_layer_spec=t5_spec.get_t5_encoder_with_transformer_engine_block_spec(encoder.num_layers),
        transformer_decoder_layer_spec=t5_spec.get_t5_decoder_with_transformer_engine_block_spec(config.num_layers),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )


def t5_step(data_iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Callable[..., Any]]:
    """One forward pass: the decoder says again what the encoder has read."""
    batch = _batch(data_iterator)
    tokens = batch["tokens"]
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    masks = T5MaskedWordPieceDataset.config_attention_mask(tokens, tokens, nothing, nothing)
    output = model(tokens, tokens, *masks, lm_labels=batch["labels"])
    return output, partial(external.example.language_model_loss, batch["loss_mask"])


def vlm(config: Any = None, **_: Any) -> LLaVAModel:
    """As pretrain_vlm.py builds it, with the vision tower frozen as in a second stage of training; no pipeline."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    layers = decoder_model_with_transformer_engine_default_spec(args.num_experts, args.moe_grouped_gemm)
    tower, projection = deepcopy(config), deepcopy(config)
    tower.vision_model_type = "clip"
    model = LLaVAModel(
        language_transformer_config=config,
        language_transformer_layer_spec=layers,
        language_vocab_size=args.padded_vocab_size,
        language_max_sequence_length=2 * args.max_position_embeddings,
        vision_transformer_config=tower,
        vision_transformer_layer_spec=get_vit_layer_with_transformer_engine_spec(),
        drop_vision_class_token=True,
        vision_projection_config=projection,
        vision_projection_layer_spec=get_submodules(layers.submodules.mlp),
        img_h=_IMAGE,
        img_w=_IMAGE,
        patch_dim=_IMAGE // 2,
    )
    model.freeze(freeze_language_model=False, freeze_vision_model=True, freeze_vision_projection=False)
    return model


def vlm_step(data_iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Callable[..., Any]]:
    """One forward pass: an image, made of the text's numbers, before the text."""
    batch = _batch(data_iterator)
    tokens = batch["tokens"]
    images = torch.sin(tokens[:, :1] + torch.arange(3.0 * _IMAGE**2)).view(-1, 3, _IMAGE, _IMAGE)
    first = torch.full_like(tokens[:, :1], DEFAULT_IMAGE_TOKEN_INDEX)
    output, mask = model(
        images.cuda().bfloat16(),
        torch.cat((first, tokens), 1),
        torch.arange(tokens.shape[1] + 1).expand(len(tokens), -1).cuda(),
        None,
        torch.cat((tokens[:, :1], batch["labels"]), 1),
        torch.cat((torch.zeros_like(batch["loss_mask"][:, :1]), batch["loss_mask"]), 1),
    )
    return output, partial(external.example.language_model_loss, mask)


def packed_step(data_iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Callable[..., Any]]:
    """One forward pass of two documents, each of which sees itself alone; where the second begins, the data say."""
    batch = _batch(data_iterator)
    tokens = batch["tokens"]
    length = tokens.shape[1]
    begin = 8 + int(tokens[0, 0]) % (length - 16)
    ends = torch.tensor([0, begin, length], dtype=torch.int32).cuda()
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=length, max_seqlen_kv=length)
    positions = torch.cat((torch.arange(begin), torch.arange(length - begin)))[None].cuda()
    output = model(tokens, positions, None, labels=batch["labels"], packed_seq_params=packed)
    return output, partial(external.example.language_model_loss, batch["loss_mask"])


def main() -> None:
    """Parse Megatron's flags and train the MODEL."""
    example = external.example
    example.use_compiled_helpers()
    args = parse_and_validate_args()
    external.loaders.is_distributed = True
    kind = ModelType.encoder_or_decoder
    model = os.environ["MODEL"]
    if model == "hybrid":
        config = pretrain_cfg_container_from_args(args, hybrid_config_from_args(args))
        pretrain(config, external.loaders, kind, example.forward_step)
    elif model == "packed":
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        pretrain(config, external.loaders, kind, packed_step)
    else:
        step, build = {"bert": (bert_step, bert), "t5": (t5_step, t5), "vlm": (vlm_step, vlm)}[model]
        pretrain(pretrain_cfg_container_from_args(args), external.loaders, kind, step, build)


if __name__ == "__main__":
    main()
