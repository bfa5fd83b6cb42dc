"""What the optimizers of a run keep: every tensor by name, made before the first step, and who else has the same.

Megatron's optimizers (megatron/core/optimizer): a `DistributedOptimizer` holds this rank's shard of the main parameters
and of the inner optimizer's state; `Float16OptimizerWithFloat16Params` and `FP32Optimizer` hold everything, the same on
every data-parallel rank; a `LayerWiseDistributedOptimizer` (Muon) gives whole parameters to ranks; a
`ChainedOptimizer` is several of them. Inside each is a torch optimizer, or a fused one of Transformer Engine or apex.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from megatron.core import parallel_state

from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.low_precision import plain_tensors

# Inner optimizers whose state is updated in place, by the name of their class. SOAP replaces its tensors.
_IN_PLACE: Final = frozenset(("Adam", "AdamW", "SGD", "FusedAdam", "Lion", "TensorParallelMuon"))


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One live tensor of an optimizer's state.

    ``replicas`` is the process group over which all hold the same bits, None for a tensor that is this rank's alone.
    ``main`` says that it is a main parameter; else it is the inner optimizer's state of one. ``parameter`` is the one
    in the inner optimizer.
    """

    name: str
    tensor: torch.Tensor
    main: bool
    replicas: torch.distributed.ProcessGroup | None
    parameter: torch.Tensor


@dataclass(frozen=True, slots=True)
class Member:
    """One Megatron optimizer with parameters, and the layer-wise optimizer it is part of, if any."""

    optimizer: Any
    layer_wise: Any = None

    @property
    def inner(self) -> Any:
        """The torch (or fused) optimizer inside."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


def members(optimizer: Any, layer_wise: Any = None) -> list[Member]:
    """The optimizers a (Chained)Optimizer consists of, at any depth; those without parameters are left out."""
    if type(optimizer).__name__ == "LayerWiseDistributedOptimizer":
        layer_wise = optimizer
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is not None:
        return [member for one in chained for member in members(one, layer_wise)]
    return [] if getattr(optimizer, "is_stub_optimizer", False) else [Member(optimizer, layer_wise)]


def prepare(optimizer: Any) -> list[tuple[str, torch.Tensor]]:
    """Make every tensor that the first step would make, so that all exist before training; returns step counters.

    torch and the fused optimizers make their state lazily, with zeros; zeros made earlier are the same bits. Counters
    of steps that are tensors (torch's Adam has one a parameter) become views of one tensor a device and dtype, which is
    what is returned: one copy instead of thousands, and no look at a device's value from the host.

    Raises UserError, by name, for an optimizer whose state is not known.
    """
    counters: list[tuple[str, torch.Tensor]] = []
    for m, member in enumerate(members(optimizer)):
        inner, name = member.inner, type(member.inner).__name__
        if name == "FusedSGD":
            raise UserError(
                "--optimizer sgd of Transformer Engine or apex is not supported with --deadpool yet; torch's own "
                "is, which Megatron takes where neither is installed"
            )
        if name not in _IN_PLACE:
            raise UserError(f"optimizer {name} is not supported with --deadpool yet; use adam, sgd, lion or muon")
        if isinstance(inner, torch.optim.Adam):  # AdamW too
            _prepare_adam(inner)
        elif isinstance(inner, torch.optim.SGD):
            _prepare_sgd(inner)
        elif name == "FusedAdam" and hasattr(inner, "initialize_state"):
            _prepare_fused_adam(inner)
        else:
            member.optimizer.init_state_fn(inner, getattr(member.optimizer, "config", None))
        counters += [(f"optimizer{m}.{key}", flat) for key, flat in _one_tensor_of_steps(inner)]
    return counters


def _parameters(inner: Any) -> Iterator[tuple[str, dict[str, Any], torch.Tensor]]:
    for g, group in enumerate(inner.param_groups):
        for i, parameter in enumerate(group["params"]):
            yield f"group{g}.{i}", group, parameter


def _prepare_adam(inner: Any) -> None:
    """As torch.optim.Adam._init_group does."""
    for _, group, parameter in _parameters(inner):
        state = inner.state[parameter]
        if state:
            continue
        on_device = group.get("capturable") or group.get("fused")
        state["step"] = torch.zeros((), device=parameter.device if on_device else torch.device("cpu"))
        for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])):
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _prepare_sgd(inner: Any) -> None:
    """torch's first step copies the gradient where later ones multiply and add. -0.0 is the one start that is the same.

    -0.0 * momentum + g is g for every g, the two zeros included; +0.0 would turn a gradient of -0.0 into +0.0.
    """
    for _, group, parameter in _parameters(inner):
        state = inner.state[parameter]
        if group["momentum"] and state.get("momentum_buffer") is None:
            if group["dampening"]:
                raise UserError("--optimizer sgd with dampening is not supported with --deadpool yet")
            state["momentum_buffer"] = torch.full_like(parameter, -0.0, memory_format=torch.preserve_format)


def _prepare_fused_adam(inner: Any) -> None:
    """Transformer Engine's; its second argument is there since 2.1."""
    more = (getattr(inner, "store_param_remainders", False),)
    wanted = len(inspect.signature(inner.initialize_state).parameters) - 1
    for _, _, parameter in _parameters(inner):
        if not inner.state[parameter]:
            inner.initialize_state(parameter, *more[:wanted])


def _one_tensor_of_steps(inner: Any) -> list[tuple[str, torch.Tensor]]:
    out = []
    for name, parameters in counted_parameters(inner).items():
        states = [inner.state[parameter] for parameter in parameters]
        flat = torch.stack([state["step"].reshape(()) for state in states]).clone()
        for i, state in enumerate(states):
            state["step"] = flat[i].view(state["step"].shape)
        out.append((name, flat))
    return out


def counted_parameters(inner: Any) -> dict[str, list[torch.Tensor]]:
    """Parameters whose steps are counted in tensors, by the name of the tensor that has their counters in this order:
    one a device and dtype."""
    found: dict[str, list[torch.Tensor]] = {}
    for _, _, parameter in _parameters(inner):
        step = inner.state.get(parameter, {}).get("step")
        if torch.is_tensor(step):
            name = f"steps.{step.device.type}.{str(step.dtype).removeprefix('torch.')}"
            found.setdefault(name, []).append(parameter)
    return found


def step_counters(optimizer: Any) -> list[float]:
    """Steps that are counted in tensors, parameter by parameter. Waits for a device that holds them."""
    return [
        float(state["step"])
        for member in members(optimizer)
        for state in (member.inner.state.get(parameter, {}) for _, _, parameter in _parameters(member.inner))
        if torch.is_tensor(state.get("step"))
    ]


def _replicas(member: Member, group: dict[str, Any]) -> torch.distributed.ProcessGroup | None:
    """The process group over which the state of a parameter group is the same on every rank; None for none."""
    one = member.optimizer
    if type(one).__name__ == "DistributedOptimizer":
        instances = one.ddp_config.num_distributed_optimizer_instances
        over = parallel_state.get_inter_distributed_optimizer_instance_group() if instances > 1 else None
    elif member.layer_wise is not None and member.layer_wise.pg_collection.dp_cp.size() > 1:
        return None  # every parameter has one owner
    elif group.get("is_expert_parallel"):
        over = parallel_state.get_expert_data_parallel_group()
    else:
        over = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return over if over is not None and over.size() > 1 else None


def state_tensors(optimizer: Any) -> list[StateTensor]:
    """Every tensor of the optimizers' state but step counters: main parameters, then the rest, member by member.

    The order and the names are the same wherever this coordinate's state is restored. Raises UserError for state that
    is neither a tensor nor a number.
    """
    out: list[StateTensor] = []
    for m, member in enumerate(members(optimizer)):
        inner = member.inner
        rest: list[StateTensor] = []
        for name, group, parameter in _parameters(inner):
            over = _replicas(member, group)
            state = inner.state.get(parameter, {})
            name = f"optimizer{m}.{name}"
            if _main_copy(state) is None:
                out.append(StateTensor(f"{name}.main", parameter.data, True, over, parameter))
            for key, value in sorted(state.items()):
                if torch.is_tensor(value):
                    if key != "step":
                        for part, plain in plain_tensors(value):
                            main = value is _main_copy(state)
                            rest.append(StateTensor(f"{name}.{key}{part}", plain, main, over, parameter))
                elif value is not None and not isinstance(value, (int, float)):
                    raise UserError(
                        f"optimizer {type(inner).__name__}: its state {key!r} is a {type(value).__name__}, which is "
                        "not supported with --deadpool yet"
                    )
            # Transformer Engine's FusedAdam: the scales of 8- and 16-bit states
            for key, scale in sorted(getattr(inner, "_scales", {}).get(parameter, {}).items()):
                rest.append(StateTensor(f"{name}.{key}.scale", scale, False, over, parameter))
        out += rest
    return out


def _main_copy(state: dict[str, Any]) -> torch.Tensor | None:
    """The fp32 main parameter where the inner optimizer keeps it (precision-aware): the 16-bit one follows from it.

    In another dtype it does not: fp16 has a scale, int16 is only the remainder (`store_param_remainders`).
    """
    main = state.get("master_param")
    return main if isinstance(main, torch.Tensor) and main.dtype == torch.float32 else None


def derive_parameters(optimizer: Any) -> None:
    """Bring back the 16-bit parameters that only follow from main parameters inside the inner optimizer."""
    for member in members(optimizer):
        for _, _, parameter in _parameters(member.inner):
            main = _main_copy(member.inner.state.get(parameter, {}))
            if main is not None:
                parameter.data.copy_(main.view(parameter.shape))


def bytes_a_parameter(optimizer: Any, parameter: torch.Tensor) -> float:
    """What the arithmetic says of one parameter, in bytes: 12 for Adam in mixed precision, 8 for Muon and so on.

    By dtypes of the inner optimizers' states, not by their sizes.
    """
    kinds = {type(member.inner).__name__: member for member in members(optimizer)}
    if len(kinds) > 1:  # upstream's default: matrices to the one that was asked for, all else to its scalar optimizer
        matrix = parameter.dim() == 2 and not getattr(parameter, "is_embedding_or_output_parameter", False)
        asked = min(kinds, key=lambda name: ("Muon" not in name, name != "Lion", name))
        kinds = {name: member for name, member in kinds.items() if (name == asked) == matrix}
    for member in kinds.values():
        inner = member.inner
        for _, _, one in _parameters(inner):
            state = inner.state.get(one, {})
            tensors = [
                plain for k, v in state.items() if k != "step" and torch.is_tensor(v) for _, plain in plain_tensors(v)
            ]
            main = 0 if _main_copy(state) is not None else one.element_size()
            return float(main + sum(v.element_size() for v in tensors if v.numel() == one.numel()))
    return 0.0


class Numbers:
    """What the optimizers keep in numbers: everything in their parameter groups but the parameters, and numbers of
    single parameters.

    Groups hold hyperparameters (some out of a checkpoint, some set by the scheduler at each step) and the steps that
    fused optimizers count. Made once, after `prepare`; reading then looks at nothing but them.
    """

    def __init__(self, optimizer: Any) -> None:
        self._groups = [list(member.inner.param_groups) for member in members(optimizer)]
        self._own: list[list[tuple[dict[str, Any], str]]] = []
        for member in members(optimizer):
            states = [member.inner.state.get(parameter, {}) for _, _, parameter in _parameters(member.inner)]
            self._own.append([(s, key) for s in states for key in sorted(s) if isinstance(s[key], (int, float))])

    def read(self) -> list[dict[str, Any]]:
        """All of them, by member. Waits for a device that holds one."""
        return [
            {"groups": [plain_fields(group) for group in groups], "own": [state[key] for state, key in own]}
            for groups, own in zip(self._groups, self._own, strict=True)
        ]

    def write(self, values: list[dict[str, Any]]) -> None:
        """Make them those of `read`; what a group has and had not then goes."""
        for groups, own, saved in zip(self._groups, self._own, values, strict=True):
            for group, fields in zip(groups, saved["groups"], strict=True):
                put_fields(group, fields)
            for (state, key), number in zip(own, saved["own"], strict=True):
                state[key] = number


_PLAIN: Final = frozenset((type(None), bool, int, float, str))


def is_plain(value: Any) -> bool:
    """A number, a string, None, a tensor of one element, or a list of such."""
    if type(value) in (tuple, list):
        return all(type(each) in _PLAIN for each in value)
    if isinstance(value, torch.Tensor):
        return bool(value.numel() == 1)
    return type(value) in _PLAIN or bool(isinstance(value, np.generic))


def plain_fields(holder: Mapping[str, Any]) -> dict[str, Any]:
    """What of a parameter group (or an object's ``vars``) is numbers, strings, short tensors, or lists of such."""
    return {key: value for key, value in holder.items() if key != "params" and is_plain(value)}


def put_fields(holder: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Make the plain fields of ``holder`` those of ``fields``; tensors that are there stay and get the value."""
    for key in plain_fields(holder).keys() - fields.keys():
        del holder[key]
    for key, value in fields.items():
        old = holder.get(key)
        if isinstance(old, torch.Tensor):
            with torch.no_grad():
                old.copy_(torch.as_tensor(value))
        elif isinstance(value, torch.Tensor):  # a fused optimizer's counter, made on its device at the first step
            holder[key] = value.to(_device(holder))
        else:
            holder[key] = value


def _device(group: Mapping[str, Any]) -> torch.device:
    parameters = group.get("params")
    return parameters[0].device if parameters else torch.device("cuda", torch.cuda.current_device())
