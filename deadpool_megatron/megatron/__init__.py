"""Everything that knows Megatron: the hooks, what its state is, how it is captured and put back."""

from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.comparison import Unequal
from deadpool_megatron.megatron.faults import arm
from deadpool_megatron.megatron.hooks import Hooks
from deadpool_megatron.megatron.self_check import SelfChecks
from deadpool_megatron.megatron.standby import (
    RunningJob,
    WarmUp,
    follow_job,
    import_packages,
    import_what_trains,
    numa_node,
    warm_up,
)

__all__ = ["Hooks", "RunningJob", "SelfChecks", "Unequal", "UserError", "WarmUp", "arm", "follow_job", "numa_node"]
__all__ += ["import_packages", "import_what_trains", "warm_up"]
