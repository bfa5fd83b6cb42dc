"""The typed records that agents, coordinator and workers exchange.

Every record is a frozen msgspec struct with a tag. `codec.VERSION` leads every packet, so that two releases never
misread each other. What the modules here define, this package has: it is imported as ``records as r``.
"""

from deadpool_megatron.cluster.records.agents import *  # noqa: F403
from deadpool_megatron.cluster.records.codec import *  # noqa: F403
from deadpool_megatron.cluster.records.coordinators import *  # noqa: F403
from deadpool_megatron.cluster.records.durability import *  # noqa: F403
from deadpool_megatron.cluster.records.values import *  # noqa: F403
from deadpool_megatron.cluster.records.workers import *  # noqa: F403
