"""The recovery protocol as a worker lives it: abort, agree, re-form, restore, resume."""

from deadpool_megatron.recovery.protocol import Patience, UnexplainedError, rejoin
from deadpool_megatron.recovery.redo import Redo
from deadpool_megatron.recovery.session import EpochClosed, Refused, Session, Superseded

__all__ = ["EpochClosed", "Patience", "Redo", "Refused", "Session", "Superseded", "UnexplainedError", "rejoin"]
