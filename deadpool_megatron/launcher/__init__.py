"""Jobs over several machines: `deadpool agent` in the place of `torchrun`, and `deadpool coordinator`."""

from deadpool_megatron.launcher.agent import run_agent, run_coordinator
from deadpool_megatron.launcher.agent_options import add_agent_arguments

__all__ = ["add_agent_arguments", "run_agent", "run_coordinator"]
