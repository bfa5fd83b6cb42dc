"""Of which bytes of which tensor the items of a shard consist, whatever the data-parallel width.

An item is named by its place in the optimizer, which depends on what this rank holds. Its pieces are named by the
model's parameter, its whole shape and the kind of state: so a shard can be cut anew for another number of replicas
(`durable.recut`), and not for a parameter of another shape. Experts have the same names on each of their ranks, so the
rank's place among those is part of the name: replicas of the rest hold experts of several places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from megatron.core import parallel_state

from deadpool_megatron.durable import Piece
from deadpool_megatron.megatron.optimizer_state import Member, counted_parameters, members, state_tensors

_PART: Final = re.compile(r"(.+)\[(\d+):(\d+)\]")  # of what replicas share: `unique_state._Shared`


def pieces_of(model: list[Any], optimizer: Any) -> dict[str, tuple[Piece, ...]]:
    """By the name of a whole item of the optimizer. What is not here cannot be cut: scales of a part, for instance.

    The optimizer's state must have been made (`UniqueState`).
    """
    names = _names(model)
    parameters = [p for chunk in model for p in chunk.parameters()]
    origins: dict[int, tuple[str, int]] = {}
    out: dict[str, tuple[Piece, ...]] = {}
    for m, member in enumerate(members(optimizer)):
        origins |= _origins(member, names, parameters)
        for counter, counted in counted_parameters(member.inner).items():
            if all(id(each) in origins for each in counted):
                steps = [(origins[id(each)][0], member.inner.state[each]["step"]) for each in counted]
                out[f"optimizer{m}.{counter}"] = tuple(
                    Piece(f"{name}/step:{step.dtype}", 0, step.element_size()) for name, step in steps
                )
    for each in state_tensors(optimizer):
        whole = each.tensor.numel() == each.parameter.numel() and not each.name.endswith(".scale")
        if whole and id(each.parameter) in origins:
            name, first = origins[id(each.parameter)]
            kind, size = each.name.split(".", 3)[3], each.tensor.element_size()
            tensor = f"{name}/{kind}:{each.tensor.dtype}"
            out[each.name] = (Piece(tensor, first * size, each.tensor.numel() * size),)
    return out


def _names(model: list[Any], place: int | None = None) -> dict[int, str]:
    """Of experts those of another place, if one is given: the same models have the same ones there."""
    names = {
        id(p): (f"{c}.{name}[{'x'.join(map(str, p.shape))}]", getattr(p, "allreduce", True))
        for c, chunk in enumerate(model)
        for name, p in chunk.named_parameters()
    }
    if place is None and not all(dense for _, dense in names.values()):
        place = parallel_state.get_expert_model_parallel_rank()
    return {which: name if dense else f"{name}@{place}" for which, (name, dense) in names.items()}


def trained_parameters(model: list[Any]) -> frozenset[str]:
    """What comes before the slash in the pieces' tensors, of the whole model: also what other replicas hold."""
    trained = [id(p) for chunk in model for p in chunk.parameters() if p.requires_grad]
    places = max(1, parallel_state.get_expert_model_parallel_world_size())  # 0 without groups
    return frozenset(names[which] for place in range(places) for names in [_names(model, place)] for which in trained)


def _origins(member: Member, names: Mapping[int, str], parameters: list[Any]) -> dict[int, tuple[str, int]]:
    """By the id of the inner optimizer's parameter: the model's parameter, and which of its elements is the first."""
    out: dict[int, tuple[str, int]] = {}
    optimizer = member.optimizer
    if member.layer_wise is not None:
        return out  # whole parameters are dealt to ranks
    if not hasattr(optimizer, "model_param_group_index_map"):
        return {id(getattr(p, "main_param", p)): (names[id(p)], 0) for p in parameters}
    dtypes: dict[int, set[torch.dtype]] = {}
    for parameter, (group, _) in optimizer.model_param_group_index_map.items():
        dtypes.setdefault(group, set()).add(parameter.dtype)
    for parameter, (group, order) in optimizer.model_param_group_index_map.items():
        if len(dtypes[group]) > 1:
            continue  # the inner optimizer has them in another order, by dtype
        held = member.inner.param_groups[group]["params"][order]
        span = optimizer._get_model_param_range_map(parameter)["param"]
        if span.end - span.start == held.numel():
            out[id(held)] = (names[id(parameter)], span.start)
    return out


def pieces_in(item: str, nbytes: int, known: Mapping[str, tuple[Piece, ...]]) -> tuple[Piece, ...]:
    """Those of an item of a shard, which may be a part of one in ``known``."""
    part = _PART.fullmatch(item)
    if part is None:
        return known.get(item, ())
    whole = known.get(part[1], ())
    return (Piece(whole[0].tensor, whole[0].at + int(part[2]), nbytes),) if len(whole) == 1 else ()
