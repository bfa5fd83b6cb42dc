"""Whether coordinates hold alike what they must hold alike: before a recovered job trains on, and now and then.

Every rank makes a digest of each part of its state; one all-gather brings all of them to every rank, which so comes to
the same verdict. A part is compared over those who must agree: the replicas of a parameter, or the whole job.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import torch
import xxhash
from megatron.core import parallel_state

from deadpool_megatron.megatron.host import Host
from deadpool_megatron.megatron.low_precision import plain_tensors
from deadpool_megatron.megatron.optimizer_state import members, plain_fields, state_tensors
from deadpool_megatron.snapshot import encode, host_bytes

PARTS: Final = (
    "versions and arguments",
    "progress and schedule",
    "model structure",
    "parameters",
    "expert parameters",
    "replicated optimizer state",
    "hyperparameters",
    "small state",
)
_PROGRESS: Final = ("iteration", "consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")
# Of ranks, of the machine (made of how many processors it has), or not settings.
_OWN: Final = frozenset(
    ("eval_iters", "do_train", "do_valid", "do_test", "num_workers", "num_dataset_builder_threads", *_PROGRESS)
)
_LOGGERS: Final = ("wandb_", "mlflow_", "comet_", "one_logger_", "app_tag_")
_PACKAGES: Final = ("torch", "megatron-core", "transformer-engine", "apex", "deadpool-megatron")


class Unequal(Exception):
    """State differs where it must not, and could not be made equal: the job ends rather than train another model."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A part that is not the same everywhere: ``ranks`` have another one than most (all, where none has most)."""

    part: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.part} of rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}"


def differences(table: Sequence[Sequence[tuple[int, int]]]) -> list[Difference]:
    """By rank and part: (who is compared with each other, digest). What differs, part by part. Pure."""
    found = []
    for p, part in enumerate(PARTS):
        sets: dict[int, list[int]] = {}
        for rank, row in enumerate(table):
            sets.setdefault(row[p][0], []).append(rank)
        for ranks in sets.values():
            counts = Counter(table[rank][p][1] for rank in ranks).most_common(2)
            if len(counts) > 1:
                most = counts[0][0] if counts[0][1] > counts[1][1] else None
                found.append(Difference(part, tuple(rank for rank in ranks if table[rank][p][1] != most)))
    return found


class Comparison:
    """Of one coordinate with the others. Made when model and optimizer are there."""

    def __init__(self, host: Host, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        self._host = host
        self._scheduler = scheduler
        # A rank without parameters of a group has not counted its steps, and layer-wise optimizers leave groups out.
        alike = not any(member.layer_wise for member in members(optimizer))
        self._groups = [group for member in members(optimizer) for group in member.inner.param_groups] if alike else []
        named = [(f"{c}.{name}", p) for c, chunk in enumerate(model) for name, p in chunk.named_parameters()]
        self._parameters = [p for _, p in named if getattr(p, "allreduce", True)]
        self._experts = [p for _, p in named if not getattr(p, "allreduce", True)]
        dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
        experts = parallel_state.get_expert_data_parallel_group()
        self._dense = min(torch.distributed.get_process_group_ranks(dense))
        self._expert = min(torch.distributed.get_process_group_ranks(experts)) if self._experts else -1
        self._replicated = [each.tensor for each in state_tensors(optimizer) if each.replicas is dense]
        self._constant = _constant(host.fields.settings)
        self._structure = _hash(repr([(name, p.dtype, tuple(p.shape), p.requires_grad) for name, p in named]).encode())

    def run(self, small_is_right: bool) -> list[Difference]:
        """What differs. Collective over all ranks, with the same verdict on each; waits for the device."""
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        args = self._host.args
        progress = {name: args.get(name) for name in _PROGRESS}
        groups = [{k: v for k, v in plain_fields(group).items() if k != "step"} for group in self._groups]
        row = [
            (0, self._constant),
            (0, _hash(encode({"progress": progress, "schedule": plain_fields(vars(self._scheduler))}))),
            (self._dense, self._structure),
            (self._dense, _digest(self._parameters)),
            (self._expert, _digest(self._experts)),
            (self._dense, _digest(self._replicated)),
            (self._dense, _hash(encode({"groups": groups}))),
            (rank, int(not small_is_right)),  # of the rank itself: nobody else's is compared with it
        ]
        device = torch.device("cuda", torch.cuda.current_device())
        mine = torch.tensor([value for pair in row for value in pair], dtype=torch.int64, device=device)
        rows = [torch.empty_like(mine) for _ in range(size)]
        torch.distributed.all_gather(rows, mine)
        table = [list(zip(each[::2], each[1::2], strict=True)) for each in (one.tolist() for one in rows)]
        wrong = tuple(r for r, each in enumerate(table) if each[-1][1])
        found = differences(table)
        return [*found, Difference(PARTS[-1], wrong)] if wrong else found


def _constant(settings: Mapping[str, Any]) -> int:
    """What is the same for the whole job. Not paths, of which nodes may have their own, and not what names the run in a
    logger: a script may make that of the time, and a spare runs it later."""
    same = {k: v for k, v in settings.items() if not (k in _OWN or k.startswith(_LOGGERS) or _is_path(k, v))}
    versions = {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    return _hash(repr((sorted(same.items()), versions)).encode())


def _is_path(name: str, value: Any) -> bool:
    texts = [each for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, str)]
    return any("/" in text for text in texts) or (bool(texts) and name.endswith(("_dir", "_path")))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _hash(data: bytes) -> int:
    return _signed(xxhash.xxh3_64_intdigest(data))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _digest(tensors: Iterable[torch.Tensor]) -> int:
    state = xxhash.xxh3_64()
    for tensor in tensors:
        for _, plain in plain_tensors(tensor):
            state.update(host_bytes(plain))
    return _signed(state.intdigest())
