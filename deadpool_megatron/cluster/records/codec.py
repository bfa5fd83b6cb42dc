"""Packets: the protocol version, whether the rest is compressed, then one record as msgpack.

Unknown tags, unknown fields and malformed values are refused when decoded, and nothing is ever unpickled.
"""

from __future__ import annotations

import typing
import zlib
from collections.abc import Collection

import msgspec

from deadpool_megatron import points
from deadpool_megatron.cluster.records.agents import AgentRecord
from deadpool_megatron.cluster.records.coordinators import CoordinatorRecord
from deadpool_megatron.cluster.records.values import Step
from deadpool_megatron.cluster.records.workers import WorkerRecord, WorkerTold

__all__ = ["VERSION", "RecordError", "decode_from_agent", "decode_from_coordinator", "decode_from_worker"]
__all__ += ["decode_to_worker", "encode"]

VERSION = b"\x0d"
# What grows with the job is mostly alike from node to node: it shrinks to a tenth, once for all that it is sent to.
_COMPRESS_BYTES = 4096
_MOST_BYTES = 1 << 28


class RecordError(ValueError):
    """Bytes that are not a record of this protocol version."""


_encoder = msgspec.msgpack.Encoder()
_from_agent: msgspec.msgpack.Decoder[AgentRecord] = msgspec.msgpack.Decoder(AgentRecord)
_from_coordinator: msgspec.msgpack.Decoder[CoordinatorRecord] = msgspec.msgpack.Decoder(CoordinatorRecord)
_from_worker: msgspec.msgpack.Decoder[WorkerRecord] = msgspec.msgpack.Decoder(WorkerRecord)
_to_worker: msgspec.msgpack.Decoder[WorkerTold] = msgspec.msgpack.Decoder(WorkerTold)


def encode(record: msgspec.Struct) -> bytes:
    """One packet: the protocol version, whether the rest is compressed, then the record as msgpack."""
    body = _encoder.encode(record)
    if len(body) < _COMPRESS_BYTES:
        return VERSION + b"\0" + body
    return VERSION + b"\1" + zlib.compress(body, 1)


def _body(packet: bytes, sender: str) -> bytes:
    if packet[:1] != VERSION:
        raise RecordError(f"packet from {sender} is of protocol version {packet[:1].hex() or '?'}, not {VERSION.hex()}")
    if packet[1:2] != b"\1":
        return packet[2:]
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(packet[2:], _MOST_BYTES)
    except zlib.error as err:
        raise RecordError(f"packet from {sender} cannot be decompressed: {err}") from None
    if not inflate.eof:
        raise RecordError(f"packet from {sender} has more than {_MOST_BYTES} bytes, or is cut short")
    return body


def _decode[T](decoder: msgspec.msgpack.Decoder[T], sender: str, packet: bytes) -> T:
    """The record in a packet that ``sender`` has sent. Raises RecordError."""
    try:
        return decoder.decode(_body(packet, sender))
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise RecordError(f"malformed record from {sender}: {err}") from None


def decode_from_agent(packet: bytes) -> AgentRecord:
    """Decode what an agent (or `deadpool inject`) sent. Raises RecordError."""
    return _decode(_from_agent, "agent", packet)


def decode_from_coordinator(packet: bytes) -> CoordinatorRecord:
    """Decode what the coordinator sent. Raises RecordError."""
    return _decode(_from_coordinator, "coordinator", packet)


def decode_from_worker(packet: bytes) -> WorkerRecord:
    """Decode what a worker sent. Raises RecordError."""
    return _decode(_from_worker, "worker", packet)


def decode_to_worker(packet: bytes) -> WorkerTold:
    """Decode what the agent told this worker. Raises RecordError."""
    return _decode(_to_worker, "agent", packet)


def _names(union: object, without: Collection[str] = ()) -> list[str]:
    return [name for record in typing.get_args(union) if (name := points.kebab(record.__name__)) not in without]


# Every message and every step is a crash point. Tools are not in the job; a worker's steps have points of their own; a
# `Changed` is how a `Declare` goes out.
points.add("worker", "step", typing.get_args(Step), "a worker is about to tell that it is {}")
points.add("worker", "worker", _names(WorkerRecord, ["worker-step"]), "a worker is about to send {}")
_TOOLS = ("inject", "drain", "enlist", "add-spare")
points.add("agent", "agent", _names(AgentRecord, _TOOLS), "an agent is about to send {}")
points.add("coordinator", "coordinator", _names(CoordinatorRecord, ["changed"]), "the coordinator is about to send {}")
