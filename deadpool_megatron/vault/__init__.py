"""The vault: shards in node-owned host memory that outlives the workers, kept on several nodes.

The agent makes a `Vault`, serves it with a `VaultServer` and sends with a `Replicator`; a worker writes and reads its
own arena with a `SlotWriter`; `fetch` brings a lost shard back; `Copies` reads parts of the shards of a job that begins
anew; `CommitLedger` is the coordinator's part.
"""

from .arena import Arena, Kind, Slot
from .discipline import CommitLedger, Told
from .errors import ChecksumMismatch, NotHeld, StaleEpoch, Unreadable, VaultError, VaultFull, as_vault_error
from .leftovers import PREFIX, clean_leftovers, process_alive, process_start
from .memory import huge_bytes, numa_node_of_device, numa_node_of_process, numa_nodes, parse_cpus
from .reading import Copies
from .rebuild import Piece, RebuildFailed, rebuild
from .replicator import Replicator
from .scratch import Scratch
from .scrub import Scrubber
from .sender import PartTo, SendPace, Target
from .server import VaultServer
from .stripes import Stripes, WordPlan
from .transfer import exchange, fetch, own_copy, store_shard
from .transport import choose_transport, make_transport
from .vault import Vault, small_capacity
from .version import CONSTANT, EMPTY, MAX_GENERATION, Version, constants_of, is_constants, owner_of, unpack
from .writer import ConstantsWriter, SlotWriter

__all__ = ["CONSTANT", "EMPTY", "MAX_GENERATION", "PREFIX", "Arena", "ChecksumMismatch", "CommitLedger"]
__all__ += ["ConstantsWriter", "Copies", "Kind", "NotHeld", "PartTo", "Piece", "RebuildFailed", "Replicator", "Scratch"]
__all__ += ["Scrubber", "SendPace", "Slot", "SlotWriter", "StaleEpoch", "Stripes", "Target", "Told", "Unreadable"]
__all__ += ["Vault", "VaultError", "VaultFull", "VaultServer", "Version", "WordPlan", "as_vault_error"]
__all__ += ["choose_transport", "clean_leftovers", "constants_of", "exchange", "fetch", "huge_bytes", "is_constants"]
__all__ += ["make_transport", "numa_node_of_device", "numa_node_of_process", "numa_nodes", "own_copy", "owner_of"]
__all__ += ["parse_cpus", "process_alive", "process_start", "rebuild", "small_capacity", "store_shard", "unpack"]
