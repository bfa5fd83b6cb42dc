"""What comes off the wire is a record of this version, exactly, or it is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from deadpool_megatron.cluster import records as r

DECODERS: list[tuple[str, Callable[[bytes], Any], msgspec.Struct]] = [
    ("agent", r.decode_from_agent, r.NodeArrived(3, 1)),
    ("agent", r.decode_from_agent, r.NodeReady(3, 1)),
    ("coordinator", r.decode_from_coordinator, r.Form(3)),
    ("worker", r.decode_from_worker, r.Arrived(3, 1, None)),
    ("agent", r.decode_to_worker, r.TakeOver(3, 1)),
]
each_decoder = pytest.mark.parametrize(
    ("sender", "decode", "record"), DECODERS, ids=[decode.__name__ for _, decode, _ in DECODERS]
)

EVERY: list[msgspec.Struct] = [
    r.Join(1, 2, "127.0.0.1", 3, [4, 5]),
    r.Registered(0, 1, r.CoordinateInfo(1, 0, 1, 0), 10, 20, "abc", True),
    r.WorkerFailed(0, 0, None, "setup", 0, -1, 2, "UserError", "a.py:1", "no", "trace"),
    r.Offer(2, 1, {0: 5, 1: None}, {0: [(0, 4), (1, 5)]}, {3: [(1, 5)]}),
    r.Iteration(0, 1, 2, 3, {"lm loss": (0.1).hex()}, None, 0.5, 0.01, 7, 0),
    r.Inject(r.Fault("kill", 1, 0, 5, 3)),
    r.StateHash(1, 2, {"params": "ab"}),
]


@pytest.mark.parametrize("record", EVERY, ids=lambda record: type(record).__name__)
def test_a_record_comes_out_as_it_went_in(record: msgspec.Struct) -> None:
    assert r.decode_from_agent(r.encode(record)) == record


def test_a_declaration_comes_out_as_it_went_in() -> None:
    slots = [r.SlotAddress(0, 0), r.SlotAddress(3, 1)]
    record = r.Declare(2, "save", "why", [1], [1], slots, {0: r.Address("h", 1)}, [[0, 3]])
    assert r.decode_from_coordinator(r.encode(record)) == record
    assert r.decode_to_worker(r.encode(record)) == record


@each_decoder
def test_another_protocol_version_is_refused(
    sender: str, decode: Callable[[bytes], Any], record: msgspec.Struct
) -> None:
    packet = r.encode(record)
    assert decode(packet) == record
    with pytest.raises(r.RecordError, match=f"packet from {sender} is of protocol version 01, not 0d"):
        decode(b"\x01" + packet[1:])
    with pytest.raises(r.RecordError, match=r"protocol version \?"):
        decode(b"")


@each_decoder
def test_an_unknown_field_is_refused(sender: str, decode: Callable[[bytes], Any], record: msgspec.Struct) -> None:
    fields = {"type": type(record).__name__, **msgspec.structs.asdict(record), "extra": 1}
    with pytest.raises(r.RecordError, match=f"malformed record from {sender}.*extra"):
        decode(r.VERSION + b"\0" + msgspec.msgpack.encode(fields))


@each_decoder
def test_an_unknown_tag_is_refused(sender: str, decode: Callable[[bytes], Any], record: msgspec.Struct) -> None:
    fields = {**msgspec.structs.asdict(record), "type": "Pickle"}
    with pytest.raises(r.RecordError, match="Pickle"):
        decode(r.VERSION + b"\0" + msgspec.msgpack.encode(fields))


@each_decoder
@pytest.mark.parametrize("junk", [b"", b"\xff", b"\x80\x04\x95", b"\x81\xa4type"])
def test_junk_is_refused(sender: str, decode: Callable[[bytes], Any], record: msgspec.Struct, junk: bytes) -> None:
    with pytest.raises(r.RecordError):
        decode(r.VERSION + b"\0" + junk)


def test_a_missing_field_and_a_wrong_type_are_refused_by_name() -> None:
    with pytest.raises(r.RecordError, match="node"):
        r.decode_from_agent(r.VERSION + b"\0" + msgspec.msgpack.encode({"type": "NodeReady", "epoch": 1}))
    with pytest.raises(r.RecordError, match="epoch"):
        r.decode_from_agent(r.VERSION + b"\0" + msgspec.msgpack.encode({"type": "NodeReady", "epoch": "1", "node": 0}))


def test_a_worker_cannot_say_what_only_an_agent_may() -> None:
    for record in (r.Join(0, 1, "h", 1, []), r.Committed(0, 1, 2), r.WorkerExited(0, 0, 0, 1, 0)):
        with pytest.raises(r.RecordError):
            r.decode_from_worker(r.encode(record))
