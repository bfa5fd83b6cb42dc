"""What a person or a program sees of a job: events, status, metrics, logs and pictures. Knows exit codes only."""

from deadpool_megatron.observe.rundir import (
    ERROR,
    EVENTS,
    JOB,
    LOGS,
    STATUS,
    EventTail,
    NodeLog,
    NotWhole,
    RunDirectory,
    follow_events,
    read_events,
    read_whole,
)
from deadpool_megatron.observe.strict_json import strict_json

__all__ = ["ERROR", "EVENTS", "JOB", "LOGS", "STATUS", "EventTail", "NodeLog", "NotWhole", "RunDirectory"]
__all__ += ["follow_events", "read_events", "read_whole", "strict_json"]
