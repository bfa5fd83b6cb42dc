"""What a run needs and survives, computed before it is started (`deadpool plan`)."""

from deadpool_megatron.planning.budget import budget
from deadpool_megatron.planning.files import PlanError, RunFile, load, run_file
from deadpool_megatron.planning.machines import USUAL, machine
from deadpool_megatron.planning.model import Counted, Layout, Shard, divided
from deadpool_megatron.planning.report import numbers, text
from deadpool_megatron.planning.workload import MAIN, Workload, microbatches, moments, under_way

__all__ = ["MAIN", "USUAL", "Counted", "Layout", "PlanError", "RunFile", "Shard", "Workload", "budget", "divided"]
__all__ += ["load", "machine", "microbatches", "moments", "numbers", "run_file", "text", "under_way"]
