"""The server of a vault: keeps shards for peers, gives shards back."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import msgspec

from deadpool_megatron import points

from .arena import Kind, Slot
from .direct import Direct, Reader
from .errors import (
    ChecksumMismatch,
    DirectFailed,
    GivenUp,
    LandingLost,
    Malformed,
    NotHeld,
    Refused,
    VaultError,
    VaultFull,
)
from .frames import (
    NO_DIRECT,
    Begin,
    Begun,
    Bytes,
    Complete,
    Echo,
    Fetch,
    Refusal,
    Sent,
    Share,
    Stored,
    Taken,
)
from .intake import Intakes
from .keeper import Keeper
from .stripes import Filling, Stripes
from .transfer import give, read_doubted, read_entries, take_entry, telling
from .vault import Vault
from .version import Version, is_constants
from .wire import Channel, Deadlines, accept, check_secret

_log = logging.getLogger(__name__)
_AGAIN_S = 0.1  # after a connection that could not be taken
_CODES = {
    GivenUp: "given-up",
    NotHeld: "not-held",
    VaultFull: "no-room",
    ChecksumMismatch: "checksum",
    DirectFailed: NO_DIRECT,
}
_LEVELS = {"not-planned": logging.DEBUG}  # the sender warns if it lasts
_BY_EPOCH = ("stale-epoch", "not-planned", "wrong-size")  # what is refused as nodes enter an epoch one by one


class VaultServer:
    """Serves one vault to the other agents of the job; a thread per connection.

    Args:
        vault: what is served.
        secret: the job's 32 bytes; who cannot prove to have them gets nothing and writes nothing.
        host: address to listen on (the node's own).
        port: 0 for any.
        stripes: the parity this node keeps, with a k+m redundancy.
        direct: to read what peers offer, and let them read, without a copy through the connection.
        on_full: called with one line when memory for what is to be kept here cannot be had; any thread.
        on_damaged: called with holder, kind and version of what was found changed when it was to be given; any thread.
    """

    def __init__(
        self,
        vault: Vault,
        secret: bytes,
        host: str,
        port: int = 0,
        deadlines: Deadlines | None = None,
        stripes: Stripes | None = None,
        direct: Direct | None = None,
        on_full: Callable[[str], None] = lambda why: None,
        on_damaged: Callable[[int, Kind, Version], None] = lambda holder, kind, version: None,
    ) -> None:
        self._vault = vault
        self._on_damaged = on_damaged
        self._on_full = on_full
        self._secret = check_secret(secret)
        self._deadlines = deadlines or Deadlines()
        self._lock = threading.Lock()
        self._channels: set[Channel] = set()
        self._direct = direct
        self._keeper = Keeper(vault, stripes, self._deadlines.late)
        self._intakes = Intakes()
        self._threads: set[threading.Thread] = set()
        self._pending: set[socket.socket] = set()
        self._stopping = False
        self.refused_members = 0
        self.mismatches = 0
        self.malformed = 0
        self.misfits = 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="vault-accept", daemon=True)

    def start(self) -> None:
        self._accepting.start()

    def stop(self) -> None:
        """Close everything and wait for the threads (well under a second)."""
        with self._lock:
            self._stopping = True
            for sock in self._pending:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            for channel in self._channels:
                channel.shut()
            threads = list(self._threads)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        if self._accepting.ident is not None:
            self._accepting.join()
        self._listener.close()
        for thread in threads:
            thread.join()

    def set_epoch(self, epoch: int) -> None:
        """From now on writes of older epochs are refused; those under way are cut off."""
        if epoch > self._vault.epoch:
            self._keeper.entered()
        self._vault.set_epoch(epoch)
        self._intakes.end_before(epoch)

    @property
    def refusals(self) -> dict[str, int]:
        """How much was refused so far, by reason. What the change of an epoch explains does not count."""
        return {
            "not a member": self.refused_members,
            "stale epoch": self._keeper.refused_epochs,
            "changed or no frame": self.malformed,
            "not as planned": self.misfits,
            "checksum": self.mismatches,
        }

    def set_plan(self, unique_bytes: Mapping[int, int | None]) -> None:
        """Whose shards are kept here for others from now on, and of what size (None: any); any other is refused."""
        self._keeper.plan = dict(unique_bytes)

    # ---- connections

    def _accept(self) -> None:
        failing = False
        while not self._stopping:
            try:
                self._accept_one()
                failing = False
            except (OSError, RuntimeError) as err:
                if self._stopping:
                    return
                if not failing:
                    _log.warning("the vault of node %d cannot take a connection: %s", self._vault.node, err)
                failing = True
                time.sleep(_AGAIN_S)  # who asks for another one is waiting

    def _accept_one(self) -> None:
        """Raises OSError when no descriptor is left, RuntimeError when no thread is, and OSError after `stop`."""
        sock, _ = self._listener.accept()
        with self._lock:
            if self._stopping:
                sock.close()
                return
            thread = threading.Thread(target=self._serve, args=(sock,), name="vault-serve", daemon=True)
            self._threads.add(thread)
            self._pending.add(sock)
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._threads.discard(thread)
                self._pending.discard(sock)
            sock.close()
            raise

    def _serve(self, sock: socket.socket) -> None:
        channel: Channel | None = None
        try:
            channel = accept(sock, self._secret, self._deadlines)
            with self._lock:
                self._pending.discard(sock)
                if self._stopping:
                    return
                self._channels.add(channel)
            self._requests(channel)
        except Refused as err:
            if err.code == "not-a-member":
                self.refused_members += 1
                _log.warning("a connection to the vault of node %d was refused: %s", self._vault.node, err)
        except VaultError as err:
            # the other side is gone, or talks nonsense: it will connect again, or not
            self.malformed += isinstance(err, Malformed)
            _log.debug("a connection to the vault of node %d ended: %s", self._vault.node, err)
        finally:
            with self._lock:
                self._pending.discard(sock)
                if channel is not None:
                    self._channels.discard(channel)
                self._threads.discard(threading.current_thread())
            sock.close()

    def _requests(self, channel: Channel) -> None:
        while True:
            frame = channel.receive(wait=True)
            try:
                if isinstance(frame, Begin):
                    self._keep(channel, frame)
                elif isinstance(frame, Share):
                    self._keep_share(channel, frame)
                elif isinstance(frame, Fetch):
                    self._give(channel, frame)
                elif isinstance(frame, Echo):
                    payload = bytearray(frame.nbytes)
                    channel.fill(memoryview(payload))
                    channel.send(frame, memoryview(payload))
                else:
                    raise Malformed(f"unexpected {type(frame).__name__} frame")
            except (Refused, NotHeld, VaultFull, ChecksumMismatch, DirectFailed) as err:
                code = next((code for kind, code in _CODES.items() if isinstance(err, kind)), "refused")
                code = err.code if isinstance(err, Refused) else code
                self.mismatches += isinstance(err, ChecksumMismatch)
                if isinstance(err, VaultFull):
                    self._on_full(str(err))
                explained = code in _BY_EPOCH and self._keeper.right_elsewhere(frame.epoch)
                self.misfits += code in ("not-planned", "wrong-size", "protocol") and not explained
                level = logging.DEBUG if explained else _LEVELS.get(code, logging.WARNING)
                if isinstance(frame, Fetch) and is_constants(frame.rank) and not frame.parity:
                    level = logging.DEBUG  # most ranks have none
                _log.log(level, "vault of node %d: %s", self._vault.node, err)
                channel.send(Refusal(self._vault.epoch, code, str(err)[:1000]))
                if isinstance(frame, Begin | Share):
                    return  # what follows is payload nobody wants

    # ---- keeping a shard for its owner

    def _keep(self, channel: Channel, begin: Begin) -> None:
        vault, what = self._vault, f"shard of rank {begin.rank}"
        self._keeper.check(begin)
        with self._writing(channel, (begin.rank,), begin.epoch):
            slot = self._keeper.open(begin)
            if slot is None:
                channel.send(Begun(vault.epoch, True))
                return
            reader = None
            arena = vault.arena(begin.rank, "peer")
            if self._direct is not None and begin.window is not None and arena is not None:
                reader = Reader(self._direct, channel, begin.window, arena)
            channel.send(Begun(vault.epoch, False, direct=reader is not None))
            try:
                self._receive_shard(channel, slot, reader, what)
            except LandingLost:
                vault.drop(begin.rank, "peer")
                raise

    def _receive_shard(self, channel: Channel, slot: Slot, reader: Reader | None, what: str) -> None:
        """Fill an opened slot to the end of the version, each chunk verified; read by ``reader`` if there is one.

        Raises Refused (StaleEpoch for a frame of an epoch that is over), Malformed, ChecksumMismatch, TransferFailed,
        DeadlinePassed; the slot stays incomplete then. LandingLost: its arena must not be used again.
        """
        done, table = 0, 1 + slot.chunks
        while True:
            frame = channel.receive(wait=True)
            self._keeper.check_epoch(frame.epoch, what)
            if isinstance(frame, Begin):
                raise Refused("the transfer before was not ended", "protocol")
            if isinstance(frame, Complete):
                if done != table:
                    raise Refused(f"{what} ended after {done} of {table} parts", "protocol")
                self._keeper.check_epoch(frame.epoch, what)
                slot.mark_complete()
                slot.seal()
                points.reach("peer-receive.complete")
                channel.send(Stored(self._vault.epoch))
                return
            if not isinstance(frame, Bytes) or frame.first != done or done + len(frame.sums) > table:
                raise Malformed(f"unexpected {type(frame).__name__} frame in a shard")
            try:
                if reader is not None:
                    self._read(channel, slot, reader, frame)
                else:
                    for entry, expected in enumerate(frame.sums, frame.first):
                        take_entry(channel, slot, slot.small_bytes, entry, expected)
            except ChecksumMismatch as err:
                raise ChecksumMismatch(f"{what}: {err}") from None
            done += len(frame.sums)
            points.reach("peer-receive.chunk")

    def _read(self, channel: Channel, slot: Slot, reader: Reader, frame: Bytes) -> None:
        epoch = self._vault.epoch
        entries = range(frame.first, frame.first + len(frame.sums))
        progress = telling(channel, lambda done: Taken(epoch, frame.first + done))
        try:
            read_entries(reader, slot, slot.small_bytes, entries, frame.sums, progress)
        except ChecksumMismatch:
            # the owner may have opened its slot again; then it does not answer but leaves
            channel.send(Taken(epoch, frame.first, changed=True))
            if not isinstance(channel.receive(), Sent):
                raise Malformed("no answer whether the slot that was read is still the same") from None
            raise
        channel.send(Taken(epoch, entries.stop))

    @contextmanager
    def _writing(self, channel: Channel, what: tuple[int, ...], epoch: int) -> Iterator[None]:
        """Only one connection writes a rank's shard: the newest. The one before it is cut off and waited for."""
        with self._intakes.begin(what, f"rank {what[-1]}", epoch, self._deadlines.idle) as intake:
            intake.add(channel.shut)
            yield

    # ---- keeping parity

    def _keep_share(self, channel: Channel, share: Share) -> None:
        vault, what = self._vault, f"part {share.part} of rank {share.rank}"
        stripes = self._keeper.check_share(share)
        with self._writing(channel, (share.word, share.part, share.rank), share.epoch):
            filling = self._keeper.open_share(share, stripes)
            if filling is None:
                channel.send(Begun(vault.epoch, True))
                return
            channel.send(Begun(vault.epoch, False, filling.done(share.part)))
            self._receive_share(channel, share, filling, what)

    def _receive_share(self, channel: Channel, share: Share, filling: Filling, what: str) -> None:
        """Add one part to a word's parity as it comes. Raises as `_receive_shard`; what is in stays in."""
        scratch = memoryview(bytearray(max(self._vault.chunk_bytes, share.small_bytes)))
        while True:
            frame = channel.receive(wait=True)
            self._keeper.check_epoch(frame.epoch, what)
            if isinstance(frame, Complete):
                filling.complete(share.part)
                channel.send(Stored(self._vault.epoch))
                return
            done, table = filling.done(share.part), filling.entries(share.part)
            if not isinstance(frame, Bytes) or frame.first != done or done + len(frame.sums) > table:
                raise Malformed(f"unexpected {type(frame).__name__} frame in a shard")
            for entry, expected in enumerate(frame.sums, frame.first):
                view = scratch[: filling.entry_bytes(share.part, entry, share.small_bytes)]
                channel.fill(view)
                filling.add(share.part, entry, view, expected)

    # ---- giving a shard back

    def _give(self, channel: Channel, wanted: Fetch) -> None:
        self._keeper.check_epoch(wanted.epoch, f"fetch of rank {wanted.rank}")
        if wanted.part >= wanted.parts:
            raise Refused(f"there is no part {wanted.part} of {wanted.parts}", "protocol")
        if wanted.runs is not msgspec.UNSET and wanted.parts != 1:
            raise Refused("either a part is wanted or single runs of entries", "protocol")
        vault = self._vault
        kinds: tuple[Kind, ...] = ("parity",) if wanted.parity else ("own", "peer")
        arena, slot = vault.find(wanted.rank, Version(wanted.version_epoch, wanted.generation), kinds)
        if wanted.doubted:
            read_doubted(arena, slot, self._on_damaged)
        give(channel, vault, wanted, arena, slot, self._direct)
