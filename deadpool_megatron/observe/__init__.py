"""What a person or a program sees of a job: events, status and logs in the run directory. Calls nobody."""

from deadpool_megatron.observe.rundir import EVENTS, JOB, LOGS, STATUS, RunDirectory, follow_events, read_events

__all__ = ["EVENTS", "JOB", "LOGS", "STATUS", "RunDirectory", "follow_events", "read_events"]
