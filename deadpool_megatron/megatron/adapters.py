"""What differs between the supported lines of megatron-core: the one place that knows versions.

`current` chooses by the version that is running. Whatever is not here is the same in all lines: the signatures of the
hooked functions differ, but hooks pass on what they get and look arguments up by name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from deadpool_megatron.compat import UserError, check_version

# Module -> what the hooks replace or call there.
_SEAMS: Final = {
    "megatron.core.pipeline_parallel.schedules": ("backward_step",),
    "megatron.core.transformer.moe.fused_a2a": ("FusedDispatch", "HybridEPDispatch"),
    "megatron.core.rerun_state_machine": ("RerunDataIterator", "RerunState", "get_rerun_state_machine"),
}

# A bucket group (core/distributed/param_and_grad_buffer.py) as it is before its first iteration.
_FRESH_BUCKET_GROUP: Final[Mapping[str, Any]] = {
    "is_last_microbatch": True,
    "is_first_batch": True,
    "grad_reduce_handle": None,
    "param_gather_handle": None,
    "param_gather_dispatched": False,
    "grad_reduce_finished": False,
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """One line of megatron-core.

    Args:
        line: major and minor version.
        upstream: what upstream calls it.
        learned: attributes of optimizers that survivors have learned lazily and a fresh spare has not; they make the
            sequence of collectives differ, so they are forgotten (None) at every recovery.
    """

    line: str
    upstream: str
    learned: tuple[str, ...]

    def check_seams(self, version: str) -> None:
        """Raises UserError when this build of Megatron lacks something the hooks hold on to."""
        for module_name, names in _SEAMS.items():
            module = importlib.import_module(module_name)
            for name in names:
                if not hasattr(module, name):
                    raise UserError(
                        f"megatron-core {version} has no {module_name}.{name}, which DeadPool hooks into: use "
                        f"{self.upstream} unchanged"
                    )

    def forget_learned(self, optimizer: Any) -> None:
        """Let an optimizer learn again what it has learned in earlier iterations."""
        for name in self.learned:
            if hasattr(optimizer, name):
                setattr(optimizer, name, None)

    def refresh_bucket_group(self, group: Any) -> None:
        """Give a bucket group of DDP the bookkeeping of one that has not trained yet. Buffers stay."""
        for name, value in _FRESH_BUCKET_GROUP.items():
            setattr(group, name, value)
        group.per_param_grad_ready_counts = {}
        group.golden_per_param_grad_ready_counts = {}
        for bucket in group.buckets:
            if hasattr(bucket, "layerwise_gather_list"):
                bucket.layerwise_gather_list = None


ADAPTERS: Final = (
    Adapter("0.18", "core_v0.18.x", learned=()),
    # ChainedOptimizer asks once, by a collective, which groups have gradient norms of their own.
    Adapter("0.19", "core_v0.19.x", learned=("_has_grad_norm_group_cache",)),
    Adapter("0.20", "main (0.20)", learned=("_has_grad_norm_group_cache",)),
)


@functools.cache
def current() -> Adapter:
    """The adapter of the Megatron that is running. Raises UserError for a line that is not supported."""
    import megatron.core

    version = str(megatron.core.__version__)
    check_version(version)
    return next(a for a in ADAPTERS if version.startswith(a.line + "."))
