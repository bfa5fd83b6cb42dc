"""The recovery protocol as a worker lives it: abort, agree, re-form, restore, resume."""

from deadpool_megatron.recovery.protocol import Patience, UnexplainedError, rejoin
from deadpool_megatron.recovery.session import Refused, Session, Superseded

__all__ = ["Patience", "Refused", "Session", "Superseded", "UnexplainedError", "rejoin"]
