"""Measurements of what DeadPool costs and gains, against baselines in the same harness; checks; simulation."""

from deadpool_megatron.harness.jobs import CLI, Job, JobError

__all__ = ["CLI", "Job", "JobError"]
