"""Everything that knows Megatron: the hooks, what its state is, how it is captured and put back."""

from deadpool_megatron.compat import SUPPORTED, UserError, check_version
from deadpool_megatron.megatron.comparison import Unequal
from deadpool_megatron.megatron.faults import arm
from deadpool_megatron.megatron.hooks import Hooks
from deadpool_megatron.megatron.near import numa_node
from deadpool_megatron.megatron.standby import follow_job, warm_up

__all__ = [
    "SUPPORTED",
    "Hooks",
    "Unequal",
    "UserError",
    "arm",
    "check_version",
    "follow_job",
    "numa_node",
    "warm_up",
]
