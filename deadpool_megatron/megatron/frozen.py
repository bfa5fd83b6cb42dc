"""Parameters that no optimizer holds: frozen layers, towers, the base of low-rank adapters.

They never change, so no generation has them. They are the constants of their coordinate in the vaults (and in the
durable directory), written there once. Their digest is in the small state, so that nobody trains on with others: a
spare's are those it was initialised with where these are the same, else they come from its vault, else from a replica.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
import xxhash
from megatron.core import parallel_state

from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.comparison import Unequal
from deadpool_megatron.megatron.low_precision import is_quantized
from deadpool_megatron.snapshot import ShardPlan, host_bytes, slot_views
from deadpool_megatron.vault import CONSTANT, ConstantsWriter, VaultError

_log = logging.getLogger(__name__)
_BUCKET_BYTES: Final = 64 << 20
_LACKS, _HAS, _NEXT = range(3)
_TRIES: Final = 3


class NotInVault(RuntimeError):
    """The own vault does not have them as they were: in the next epoch its agent asks all others. As a peer's error."""


def frozen_parameters(model: list[Any]) -> list[tuple[str, torch.nn.Parameter]]:
    """By name, those that are in none of the buffers of `DistributedDataParallel`, which has all that are trained."""
    buffers = [buffer for chunk in model for held in (chunk.buffers, chunk.expert_parallel_buffers) for buffer in held]
    trained = {id(parameter) for buffer in buffers for parameter in buffer.params}
    named = [(f"{c}.{name}", p) for c, chunk in enumerate(model) for name, p in chunk.named_parameters()]
    return [(name, p) for name, p in named if id(p) not in trained]


class Frozen:
    """Those of one coordinate.

    Args:
        model: the list of model chunks, each in Megatron's `DistributedDataParallel`.
        slice_bytes: that of `ShardPlan`.

    Attributes:
        plan: how they lie in the vault.
    """

    def __init__(self, model: list[Any], slice_bytes: int) -> None:
        frozen = frozen_parameters(model)
        quantized = [name for name, p in frozen if is_quantized(p)]
        if quantized:
            raise UserError(
                f"{quantized[0]} is frozen and FP8 (--fp8-param-gather), which is not supported with --deadpool yet; "
                "leave --fp8-param-gather out"
            )
        self.plan = ShardPlan(frozen, slice_bytes)
        self._writer: ConstantsWriter | None = None
        self._trailer = b""
        self._tries = 0
        sets = (
            (group, [(name, p) for name, p in frozen if getattr(p, "allreduce", True) is dense])
            for dense, group in (
                (True, parallel_state.get_data_parallel_group(with_context_parallel=True)),
                (False, parallel_state.get_expert_data_parallel_group()),
            )
        )
        self._sets = [(group, parameters) for group, parameters in sets if parameters]
        self.digests: list[int] = []
        self.look()
        self.expected = self.digests

    def __bool__(self) -> bool:
        return bool(self._sets)

    def look(self) -> None:
        """Make `digests` anew: of the dense ones and of those of experts, where there are any. Waits for the device."""
        out = []
        for _, parameters in self._sets:
            state = xxhash.xxh3_64()
            for name, parameter in parameters:
                state.update(name.encode())
                state.update(host_bytes(parameter))
            out.append(state.intdigest())
        self.digests = out

    def use(self, writer: ConstantsWriter, trailer: bytes) -> None:
        """The memory that they have in the own vault; ``trailer`` tells what they consist of (`durable.trailer_of`)."""
        self._writer, self._trailer = writer, trailer

    def keep(self) -> None:
        """Write them to the own vault, which sends them on, unless they are there. Blocks for the copying."""
        slot = self._writer.begin(self._trailer) if self._writer is not None else None
        if self._writer is None or slot is None:
            return
        with torch.no_grad():
            for segment, place in zip(self.plan.segments, slot_views(self.plan, slot), strict=True):
                place.copy_(segment.tensor)
                self._writer.publish(segment.end)
        self._writer.complete()

    def take(self) -> None:
        """Make them what the own vault has. Raises VaultError where it has none, or what has changed in memory."""
        if self._writer is None:
            return
        self._writer.read(CONSTANT)
        with torch.no_grad():
            places = slot_views(self.plan, self._writer.arena.slots[0])
            for segment, place in zip(self.plan.segments, places, strict=True):
                segment.tensor.copy_(place)
        self.look()

    def synchronize(self) -> None:
        """Make them `expected` on every rank. Collective over the replicas of each.

        Raises NotInVault where neither the own vault nor a replica has those that training began with; Unequal where
        this has been so in several epochs.
        """
        again = False
        if self.digests != self.expected:
            try:
                self.take()
            except VaultError as err:
                again = self._tries < _TRIES
                _log.info("frozen parameters come from a replica: %s", err)
        received = False
        for i, (group, parameters) in enumerate(self._sets):
            here = _HAS if self.digests[i] == self.expected[i] else _NEXT if again else _LACKS
            flag = torch.tensor([here], dtype=torch.int32, device=parameters[0][1].device)
            flags = [torch.empty_like(flag) for _ in range(group.size())]
            torch.distributed.all_gather(flags, flag, group=group)
            have = [int(each.item()) for each in flags]
            if all(each == _HAS for each in have):
                continue
            received = True
            if _HAS not in have and _NEXT in have:
                self._tries += 1
                raise NotInVault(
                    f"parameters that no optimizer holds (the first: {parameters[0][0]}) are in no vault near"
                )
            if _HAS not in have:
                raise Unequal(
                    f"{len(parameters)} parameters that no optimizer holds (the first one: {parameters[0][0]}) are not "
                    "those that training began with, and neither a vault nor a replica has these: restart from a "
                    "checkpoint"
                )
            source = torch.distributed.get_process_group_ranks(group)[have.index(_HAS)]
            with torch.no_grad():
                for _, parameter in parameters:
                    whole = parameter.detach().contiguous()
                    flat = whole.view(-1).view(torch.uint8)
                    for first in range(0, flat.numel(), _BUCKET_BYTES):
                        torch.distributed.broadcast(flat[first : first + _BUCKET_BYTES], source, group=group)
                    parameter.copy_(whole)
        if received:
            self.look()
        if self.digests != self.expected:
            raise Unequal("parameters that no optimizer holds arrived changed from their replica")
