"""Jobs over several machines: `deadpool agent` in the place of `torchrun`, and `deadpool coordinator`."""

from deadpool_megatron.multinode.options import add_agent_arguments
from deadpool_megatron.multinode.run import run_agent, run_coordinator

__all__ = ["add_agent_arguments", "run_agent", "run_coordinator"]
