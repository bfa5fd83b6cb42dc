"""What the model of a recipe holds on each pipeline stage, counted in the model that Bridge builds of it.

It is built on torch's meta device, so its size costs no memory, and over process groups of torch's ``fake`` backend, so
one process is every rank in turn. To be used under the emulation of CUDA.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch.overrides import TorchFunctionMode

from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.bridge import hub
from deadpool_megatron.megatron.bridge.recipes import Recipe, fewest, told

# Parts of a layer that `recompute_modules` names, by a word in the names of the weights whose activations then go.
_RECOMPUTED: Final = {
    "mla_up_proj": ("_up_proj.",),
    "mlp": (".mlp.linear_fc",),
    "moe": (".mlp.",),
    "moe_act": (".experts.linear_fc2.",),
    "shared_experts": (".shared_experts.",),
}
_HALF: Final = 2  # bytes of an activation
# What layers cannot be made without here, and changes nothing of their parameters.
_UNFUSED: Final = {
    "perform_initialization": False,
    "tp_comm_overlap": False,
    "cuda_graph_impl": "none",
    "use_transformer_engine_op_fuser": False,
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One rank of a pipeline stage.

    Attributes:
        dense: parameters that are trained and have a replica on every data-parallel rank.
        expert: those of experts, which have replicas of their own.
        frozen: those that are not trained.
        kept: bytes of activations of one microbatch until its backward pass.
        once: bytes of activations that only one microbatch has at a time: of a layer that is recomputed, of the logits.
    """

    dense: int
    expert: int
    frozen: int
    kept: float
    once: float


@dataclass(frozen=True, slots=True)
class RecipeSizes:
    """A recipe's model.

    Attributes:
        parameters: all of them, each once.
        active: those that a token meets: of the routed experts only the chosen ones.
        operations: floating-point operations of an iteration, by Bridge's own formula.
        stages: by pipeline stage.
    """

    parameters: int
    active: int
    operations: float
    stages: tuple[Stage, ...]


def count(recipe: Recipe) -> RecipeSizes:
    """Build the model of a recipe, every stage of it and once whole. Raises UserError where that cannot be done."""
    from megatron.bridge.training.utils.flop_utils import num_floating_point_operations

    unknown = [name for name, sized in recipe.assumed.items() if not sized]
    if unknown:
        raise UserError(
            f"recipe {recipe.name}: the size of {', '.join(unknown)} is not known here: run this once where Hugging "
            "Face's hub answers"
        )
    cfg = recipe.cfg
    model = cfg.model
    if not (hasattr(model, "provide_distributed_model") or hasattr(model, "get_builder_cls")):
        raise UserError(f"recipe {recipe.name}: nobody knows how the model of a {type(model).__name__} is built")
    try:
        if model.output_layer_init_method is None:  # Bridge's checks of the data, which come first, found something
            model.finalize()
        _set_vocabulary(recipe)
        stages = []
        for index in range(model.pipeline_model_parallel_size):
            with _groups(model, fewest(model), index) as groups:
                stages.append(_stage(cfg, _built(model, groups)))
        whole = _undivided(model)
        ways = whole.expert_model_parallel_size
        with _groups(whole, ways, 0) as groups:
            chunks = _built(whole, groups)
            one = sum(p.numel() for layer in _expert_layers(chunks) for p in layer.experts.parameters())
            parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters()) + (ways - 1) * one
        routed = ways * one
        idle = 1 - model.moe_router_topk / model.num_moe_experts if routed else 0.0
        operations = num_floating_point_operations(cfg, recipe.values["global_batch_size"])
    except UserError as err:
        raise UserError(f"recipe {recipe.name}: {err}") from None
    except Exception as err:  # noqa: BLE001 - whatever Bridge or Megatron cannot build here
        raise UserError(f"recipe {recipe.name}: its model cannot be built here: {told(err)}") from None
    return RecipeSizes(parameters, parameters - round(routed * idle), float(operations), tuple(stages))


def _set_vocabulary(recipe: Recipe) -> None:
    """As Bridge's set-up does, which has the tokenizer."""
    cfg = recipe.cfg
    model, tokenizer = cfg.model, cfg.tokenizer
    model.should_pad_vocab = model.vocab_size is None or getattr(tokenizer, "use_tokenizer_vocab_size", False)
    if not model.should_pad_vocab:
        return
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    try:
        model.vocab_size = build_tokenizer(tokenizer).vocab_size
    except Exception as err:  # noqa: BLE001 - whatever the libraries of tokenizers raise
        model.vocab_size = hub.vocabulary(tokenizer.tokenizer_model)
        if model.vocab_size is None:
            raise UserError(
                f"the size of its vocabulary is that of its tokenizer, which cannot be had here ({told(err)}): give "
                "model.vocab_size=N tokenizer.use_tokenizer_vocab_size=false"
            ) from None
        recipe.assumed[tokenizer.tokenizer_model] = True


@contextlib.contextmanager
def _groups(model: Any, world: int, stage: int) -> Iterator[Any]:
    """Megatron's process groups as the first rank of a pipeline stage has them; nothing else is behind them."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    stages = model.pipeline_model_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=stage * (world // stages), world_size=world)
    try:
        parallel_state.initialize_model_parallel(
            model.tensor_model_parallel_size,
            stages,
            model.virtual_pipeline_model_parallel_size,
            context_parallel_size=model.context_parallel_size,
            expert_model_parallel_size=model.expert_model_parallel_size or 1,
            expert_tensor_parallel_size=model.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _built(model: Any, groups: Any) -> list[Any]:
    """The chunks of one rank. Hooks that Bridge would run on them (they read weights) are not."""
    model = _copied(model)
    for name, value in _UNFUSED.items():
        setattr(model, name, value)
    how = {"wrap_with_ddp": False, "mixed_precision_wrapper": None, "pg_collection": groups}
    with _NoMemory():
        if not hasattr(model, "get_builder_cls"):
            return list(model.provide_distributed_model(init_model_with_meta_device=True, pre_wrap_hook=[], **how))
        model.init_model_with_meta_device, model.pre_wrap_hooks = True, []
        return list(model.get_builder_cls()(model).build_distributed_models(**how))


def _copied(model: Any) -> Any:
    """(A config with its layers' apart hands on to those what it has not, ``__deepcopy__`` too.)"""
    if "transformer" not in vars(model):
        return copy.deepcopy(model)
    out = copy.copy(model)
    out.transformer = copy.deepcopy(model.transformer)
    return out


class _NoMemory(TorchFunctionMode):  # type: ignore[misc]  # torch has no types for it
    """Weights whose device is given are made on the meta device too: some layers name the current one and fill them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        made = getattr(func, "__name__", "") in ("empty", "empty_like")  # (by name: the emulation wraps them)
        return func(*args, **(given | {"device": "meta"} if made else given))


def _undivided(model: Any) -> Any:
    """The same model on one rank but for its experts, of which that has one; its vocabulary padded as if divided."""
    whole = _copied(model)
    whole.make_vocab_size_divisible_by *= model.tensor_model_parallel_size
    for kind in ("tensor_model", "pipeline_model", "context"):
        setattr(whole, f"{kind}_parallel_size", 1)
    whole.expert_model_parallel_size = model.num_moe_experts or 1
    whole.expert_tensor_parallel_size = 1
    whole.sequence_parallel = whole.tp_comm_overlap = False
    whole.virtual_pipeline_model_parallel_size = whole.pipeline_model_parallel_layout = None
    whole.num_layers_in_first_pipeline_stage = whole.num_layers_in_last_pipeline_stage = None
    return whole


def _expert_layers(chunks: list[Any]) -> Iterator[Any]:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer))


def _stage(cfg: Any, chunks: list[Any]) -> Stage:
    model = cfg.model
    dense = expert = frozen = 0
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        if not parameter.requires_grad:
            frozen += parameter.numel()
        elif getattr(parameter, "allreduce", True):
            dense += parameter.numel()
        else:
            expert += parameter.numel()
    tokens = model.seq_length * cfg.train.micro_batch_size / model.context_parallel_size
    around = model.hidden_size / (model.tensor_model_parallel_size if model.sequence_parallel else 1)
    full = model.recompute_granularity == "full"
    gone = () if full else _recomputed(model)
    kept, widest, logits = 0.0, 0.0, 0.0
    for chunk in chunks:
        for index, layer in enumerate(_layers(chunk)):
            size = _HALF * _width(model, layer, gone) + 5 * around * _blocks(layer)
            if full and (model.recompute_method == "uniform" or index < (model.recompute_num_layers or 0)):
                kept, widest = kept + _HALF * around, max(widest, size)
            else:
                kept += size
        for name, weight in chunk.named_parameters():
            if name.endswith("output_layer.weight"):
                logits = 6.0 * weight.shape[0]  # bf16, and fp32 in the loss
    return Stage(dense, expert, frozen, tokens * kept, tokens * (widest + logits))


def _recomputed(model: Any) -> tuple[str, ...]:
    asked = (model.recompute_modules or ()) if model.recompute_granularity == "selective" else ()
    return tuple(word for module in asked for word in _RECOMPUTED.get(module, ()))


def _layers(chunk: Any) -> list[Any]:
    """Layers of the language model, those that predict further tokens too."""
    from megatron.core.ssm.mamba_layer import MambaLayer
    from megatron.core.transformer.transformer_layer import BaseTransformerLayer

    kinds = (BaseTransformerLayer, MambaLayer)
    return [module for name, module in chunk.named_modules() if isinstance(module, kinds) and "vision" not in name]


def _blocks(layer: Any) -> int:
    """Blocks with a norm in front and a sum behind."""
    parts = (getattr(layer, name, None) for name in ("self_attention", "mixer", "mlp"))
    return sum(part is not None and any(True for _ in part.parameters()) for part in parts)


def _width(model: Any, layer: Any, gone: tuple[str, ...]) -> float:
    """Values a token that a layer keeps on one rank: what a column-parallel weight gives and a row-parallel one takes,
    of routed experts as many times as a token has of them."""
    width = 0.0
    tensors = model.tensor_model_parallel_size
    routed = model.moe_router_topk * (model.expert_tensor_parallel_size or tensors) / tensors
    for name, module in layer.named_modules():
        weights = [w for key, w in module.named_parameters(recurse=False) if key.startswith("weight") and w.dim() == 2]
        one = ".local_experts." not in name or ".local_experts.0." in name
        if not weights or not one or any(word in f".{name}." for word in gone):
            continue
        into = 1 if any(each.__name__.endswith("RowParallelLinear") for each in type(module).__mro__) else 0
        width += weights[0].shape[into] * (routed if ".experts." in f".{name}." else 1)
    return width
