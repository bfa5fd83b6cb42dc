"""A generation of another number of replicas: what this rank takes of it, which it reads itself.

Its own vault does not hold it, since nobody but the rank knows what its shard will consist of. The optimizer's tensors
come from the shards of all replicas that had them (`durable.recut`); all else is alike on replicas, and comes from the
first one, as Megatron's own checkpoints have it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
import torch
from megatron.core import parallel_state

from deadpool_megatron.compat import UserError
from deadpool_megatron.durable import (
    DirectorySource,
    DurableError,
    Layout,
    Manifest,
    NotFit,
    Source,
    differing,
    fills,
    open_store,
    read_manifest,
    read_recut,
    read_whole,
    settings_note,
)
from deadpool_megatron.megatron.description import describe_job, layout_of
from deadpool_megatron.megatron.host import Host
from deadpool_megatron.megatron.pieces import pieces_of, trained_parameters
from deadpool_megatron.megatron.same_model import WIDTH
from deadpool_megatron.snapshot import ShardPlan, decode, encode
from deadpool_megatron.vault import VaultError, constants_of

_SMALL: Final = "small."  # copies of what a device holds besides the optimizer's state (`small_state`)
# By the name of a setting: a value with which the samples of a batch, or the state of a rank, follow from the width.
_BOUND: Final[tuple[tuple[str, Callable[[Any], bool]], ...]] = (
    ("data_parallel_random_init", bool),
    ("decrease_batch_size_if_needed", bool),
    ("full_validation", bool),  # its number of iterations follows from the width
    ("dataloader_type", lambda value: value != "single"),
)
# Likewise: what `widths_below` does not follow.
_SCHEDULED: Final[tuple[tuple[str, Callable[[Any], bool]], ...]] = (
    ("rampup_batch_size", bool),
    ("step_batch_size_schedule", bool),
)
_PATIENCE_S: Final = 10.0  # with a directory that cannot be read
_AGAIN_S: Final = 0.5


def widths_below(host: Host, layout: Layout, small: bytes, first: bool) -> list[int]:
    """Smaller numbers of replicas that this job can go on with, each from a generation of this one.

    Args:
        layout: of this rank's shard, with its pieces; ``small``: its small state.
        first: the job begins; later its number may be the smallest one.

    Raises UserError where there are none, whatever the number, or none from the first.
    """
    args = host.args
    why = _experts_cut_otherwise(args)
    for setting, bound in (*_BOUND, *_SCHEDULED):
        if not why and bound(value := args.get(setting)):
            why = f"with {setting} {value} a job has to keep its number of replicas"
    if not why and not host.deals(1):
        why = "without --global-batch-size the batch follows from the number of replicas"
    items = [item for item in layout.items if not item.name.startswith(_SMALL)]
    if not why and any(not item.pieces for item in items):
        why = "this optimizer's state is not cut anew"
    if not why and any(numbers["own"] for numbers in decode(small)["numbers"]):
        why = "the optimizer keeps numbers of single parameters, which are not cut anew"
    replicas, contexts = parallel_state.get_data_parallel_world_size(), parallel_state.get_context_parallel_world_size()
    names = ("expert_model_parallel_size", "num_distributed_optimizer_instances")  # each divides replicas (`fills`)
    places, instances = (args.get(name) or 1 for name in names)
    smaller = range(1, replicas)
    widths = [width for width in smaller if fills(width * contexts, places, instances) and host.deals(width)]
    if not why and not widths and replicas > 1 and first:
        why = (
            f"expert_model_parallel_size {places} takes all replicas, so that each expert is in one only"
            if places > 1
            else f"num_distributed_optimizer_instances {instances} divides no smaller number of replicas"
        )
    if why:
        raise UserError(f"--deadpool-when-out-of-spares shrink: {why}; use save, or wait")
    return widths


def _experts_cut_otherwise(args: Mapping[str, Any]) -> str:
    """Why replicas of experts are not found among those of the rest; empty: they are."""
    tensor, experts = (args.get(f"{kind}_parallel_size") or 1 for kind in ("tensor_model", "expert_tensor"))
    if args.get("num_experts") and args.get("expert_tensor_parallel_size") and experts != tensor:
        sizes = f"expert_tensor_parallel_size {experts} and tensor_model_parallel_size {tensor}"
        return f"with {sizes} experts are not cut anew"
    return ""


def _put_valid_samples(saved: dict[str, Any], args: Mapping[str, Any], iteration: int) -> None:
    """Of a batch of evaluation that has become smaller the data end sooner: no more are drawn than such ones had."""
    batch, each, interval = (args.get(n) for n in ("eval_global_batch_size", "eval_iters", "eval_interval"))
    if batch and each and interval:
        drawn = iteration // interval * each * batch
        saved["consumed_valid_samples"] = min(saved["consumed_valid_samples"], drawn)


class CannotRead(UserError):
    """A generation that is there; another one may do."""


def _patient[T](where: str, act: Callable[[], T]) -> T:
    """Again after what may pass, for a while (reading itself may take longer); ``act`` begins from its start.

    Raises CannotRead, NotFit.
    """
    end = math.inf
    while True:
        try:
            return act()
        except NotFit:
            raise
        except (DurableError, VaultError, OSError) as err:
            passes = isinstance(err, OSError) or (isinstance(err, VaultError) and err.broken)
            end = min(end, time.monotonic() + _PATIENCE_S)
            if not passes or time.monotonic() >= end:
                raise CannotRead(f"{where} cannot be read: {err}") from None
        time.sleep(_AGAIN_S)


def in_directory(directory: str, name: str) -> DirectorySource:
    """The generation ``name`` of a durable directory. Blocks for the disk. Raises CannotRead."""
    store = open_store(directory)
    return DirectorySource(store, _patient(f"{store.root}/{name}", lambda: read_manifest(store, name)))


class OtherWidth:
    """One rank's view of such a generation.

    Args:
        source: where it is; closed by `close`.
        args: Megatron's.

    Attributes:
        small: the small state.
        note: one line for the user, or none.
        constants: it has parameters that no optimizer holds.

    Blocks for the disk and the network. Raises UserError, in one line, for what cannot go on at another width,
    CannotRead for what cannot be read.
    """

    def __init__(self, source: Source, args: Mapping[str, Any]) -> None:
        self._source = source
        if why := _experts_cut_otherwise(args):
            raise self._not_fit(why)
        for setting, bound in _BOUND:
            if bound(value := args.get(setting)):
                raise self._not_fit(f"with {setting} {value} it has to have as many replicas as that job")
        self.note = "" if source.manifest is None else self._compare(source.manifest, args)
        mine = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
        cp, ep = parallel_state.get_context_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
        alike = [c for c in source.coordinates if (c.tp, c.pp) == mine]
        alike.sort(key=lambda c: (c.ep != ep, c.cp != cp, c.dp, c.rank))
        if not alike or alike[0].ep != ep:
            raise self._not_fit("no rank in it has the same layers and experts")
        self._ranks = [c.rank for c in alike]
        state = decode(self._read(lambda: source.small(self._ranks[0])))
        self._with_all_steps(state)
        _put_valid_samples(state["args"], args, source.generation)
        self.small = encode(state)
        same = [c.rank for c in alike if c.ep == ep]  # what never changes is alike on all of these
        self._with_constants = self._read(lambda: next(filter(source.has_constants, same), None))

    def _compare(self, manifest: Manifest, args: Mapping[str, Any]) -> str:
        job = msgspec.json.decode(describe_job(args))
        for part in ("model", "batch"):
            for setting, (there, here) in differing(manifest, job, part).items():
                if setting not in WIDTH:
                    raise self._not_fit(f"{setting} is {there} in it and {here} here")
        return settings_note(manifest, job)

    def _not_fit(self, why: str) -> UserError:
        return UserError(self._source.not_fit(why))

    def _read[T](self, act: Callable[[], T]) -> T:
        try:
            return _patient(self._source.where, act)
        except NotFit as err:
            raise self._not_fit(str(err)) from None

    def _with_all_steps(self, state: dict[str, Any]) -> None:
        """A fused optimizer counts no steps in a group of which this rank has nothing, and may have something now."""
        for numbers in state["numbers"]:
            if numbers["own"]:
                raise self._not_fit("the optimizer keeps numbers of single parameters, which are not cut anew")
            groups = numbers["groups"]
            if steps := [group["step"] for group in groups if group.get("step") is not None]:
                for group in groups:
                    group["step"] = max(steps)

    def fill(self, plan: ShardPlan, model: list[Any], optimizer: Any) -> None:
        """Make the tensors of this rank's shard those of the generation. Blocks as above. Raises UserError."""
        pieces = pieces_of(model, optimizer)
        # A replicated optimizer has all state on each rank, which writes a part that may end in a parameter.
        known = trained_parameters(model) | {piece.tensor for each in pieces.values() for piece in each}
        wanted = layout_of(plan, pieces)
        with _into(plan) as put:
            self._read(lambda: read_recut(self._source, self._ranks, wanted, known, put, _is_small))

    def fill_constants(self, plan: ShardPlan) -> None:
        """Likewise of parameters that no optimizer holds."""
        if self._with_constants is None:
            return
        holder = constants_of(self._with_constants)
        layout = self._read(lambda: self._source.layout(holder))
        there, here = ({item.name: (item.dtype, item.shape) for item in of.items} for of in (layout, layout_of(plan)))
        if there != here:
            raise self._not_fit("it has other frozen parameters")
        with _into(plan) as put:
            self._read(lambda: read_whole(self._source, holder, layout, put))

    @property
    def constants(self) -> bool:
        """See above."""
        return self._with_constants is not None

    def close(self) -> None:
        """Everything is read."""
        self._source.close()


def _is_small(name: str) -> bool:
    return name.startswith(_SMALL)


@contextlib.contextmanager
def _into(plan: ShardPlan) -> Iterator[Callable[[str, int, memoryview], None]]:
    """Puts bytes into the tensors of a plan; those that are not contiguous have them at the end."""
    tensors = {name: tensor for name, tensor, _, _ in plan.items()}
    others: dict[str, torch.Tensor] = {}

    def put(name: str, at: int, data: memoryview) -> None:
        tensor = tensors[name]
        if not tensor.is_contiguous():
            if name not in others:
                others[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensor = others[name]
        flat = tensor.view(-1).view(torch.uint8)
        flat[at : at + len(data)].copy_(torch.frombuffer(data, dtype=torch.uint8))

    yield put
    for name, tensor in others.items():
        tensors[name].copy_(tensor)
