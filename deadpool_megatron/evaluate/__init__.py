"""Measurements of what DeadPool costs and gains, against baselines in the same harness."""

from deadpool_megatron.evaluate.jobs import CLI, Job, JobError
from deadpool_megatron.evaluate.overhead import add_overhead_arguments, run_overhead
from deadpool_megatron.evaluate.recovery import add_recovery_arguments, run_recovery

__all__ = ["CLI", "Job", "JobError", "add_overhead_arguments", "add_recovery_arguments", "run_overhead", "run_recovery"]
