"""`deadpool plan`: what a run needs and survives, computed before it is started."""

from deadpool_megatron.planning.report import add_plan_arguments, run_plan

__all__ = ["add_plan_arguments", "run_plan"]
