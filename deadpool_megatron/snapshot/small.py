"""The small state as bytes: typed msgpack, no pickle, so that bytes from another node can do nothing but be data.

Kept exactly: None, bool, int of any size, float, str, bytes, list, tuple, dict with str keys, torch tensors (dtype,
shape, bytes; they come back on the host), numpy arrays and numpy scalars. Anything else is refused by the name of its
place.
"""

from __future__ import annotations

import array
import random
from typing import Any, Final

import msgspec
import numpy as np
import torch

_VERSION: Final = b"\x03"
_TUPLE, _UINT32S, _BIGINT, _TENSOR, _ARRAY, _SCALAR = range(1, 7)
_PLAIN: Final = frozenset((type(None), bool, float, str, bytes))
_ONLY_INTS: Final = {int}
_DTYPES: Final[dict[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and "bits" not in str(dtype) and not str(dtype).startswith("torch.q")
}


class SmallStateError(ValueError):
    """A value cannot be part of the small state, or bytes are not one. The message names the place."""


def encode(state: dict[str, Any]) -> bytes:
    """The state as bytes. Tensors on a device are brought to the host, which waits for it. Raises SmallStateError."""
    if type(state) is not dict:
        raise SmallStateError(f"the small state must be a dict, not {type(state).__name__}")
    return _VERSION + _encoder.encode(_plain(state, ""))


def decode(data: bytes) -> dict[str, Any]:
    """The state that `encode` was given; tensors and arrays are new and on the host. Raises SmallStateError."""
    if data[:1] != _VERSION:
        raise SmallStateError(f"small state of format {data[:1].hex() or 'none'}, not {_VERSION.hex()}")
    try:
        state = _decoder.decode(memoryview(data)[1:])
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, RuntimeError, UnicodeDecodeError) as err:
        raise SmallStateError(f"malformed small state: {err}") from None
    if type(state) is not dict:
        raise SmallStateError("malformed small state: not a dict")
    return state


def capture_host_rng() -> dict[str, Any]:
    """The generators of python, numpy (the legacy global one) and torch's CPU, as a part of a small state.

    Large states are given as bytes: encoding them number by number would be half the cost of a small state.
    """
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)  # half as dear as the tuple
    state = numpy["state"]
    return {
        "python": [version, array.array("I", words).tobytes(), gauss],
        "numpy": [numpy["bit_generator"], state["key"].tobytes(), state["pos"], numpy["has_gauss"], numpy["gauss"]],
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def restore_host_rng(state: dict[str, Any]) -> None:
    """Bring the three generators back to what `capture_host_rng` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(array.array("I", words)), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))


def _plain(value: Any, path: str) -> Any:
    """``value`` in terms of what msgpack has, tuples and the like as extensions."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:
        if -(1 << 63) <= value < 1 << 64:
            return value
        return _ext(_BIGINT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise SmallStateError(f"{path or 'small state'}: key {key!r} is a {type(key).__name__}, must be a str")
        return {key: _plain(each, f"{path}.{key}" if path else key) for key, each in value.items()}
    if kind is list:
        return [_plain(each, f"{path}[{index}]") for index, each in enumerate(value)]
    if kind is tuple:
        # Python's generator state is a tuple of 625 of these: as one block
        if len(value) > 16 and set(map(type, value)) == _ONLY_INTS and min(value) >= 0 and max(value) < 1 << 32:
            return _ext(_UINT32S, array.array("I", value).tobytes())
        return _ext(_TUPLE, _encoder.encode([_plain(each, f"{path}[{index}]") for index, each in enumerate(value)]))
    if isinstance(value, torch.Tensor):
        return _tensor(value, path)
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.hasobject or value.dtype.names is not None:
            raise SmallStateError(f"{path}: a numpy array of {value.dtype} cannot be part of the small state")
        code = _ARRAY if isinstance(value, np.ndarray) else _SCALAR
        return _ext(code, _encoder.encode((value.dtype.str, value.shape, value.tobytes())))
    raise SmallStateError(
        f"{path}: a {kind.__module__}.{kind.__qualname__} cannot be part of the small state; "
        "use plain values, tensors or arrays"
    )


def _tensor(value: torch.Tensor, path: str) -> msgspec.msgpack.Ext:
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES or value.layout != torch.strided:
        raise SmallStateError(f"{path}: a {value.layout} tensor of {value.dtype} cannot be part of the small state")
    return _ext(_TENSOR, _encoder.encode((name, tuple(value.shape), host_bytes(value).tobytes())))


def host_bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A tensor's elements as bytes on the host (uint8, one dimension), in order. Waits for a device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def _ext(code: int, data: bytes) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, data)


def _from_ext(code: int, data: memoryview) -> Any:
    if code == _TUPLE:
        return tuple(_list_decoder.decode(data))
    if code == _UINT32S:
        return tuple(array.array("I", data.tobytes()))
    if code == _BIGINT:
        return int.from_bytes(data, "little", signed=True)
    if code not in (_TENSOR, _ARRAY, _SCALAR):
        raise ValueError(f"unknown extension {code}")
    name, shape, raw = _block_decoder.decode(data)
    if code == _TENSOR:
        dtype = _DTYPES[name]
        if not raw:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(shape)
    found = np.frombuffer(bytearray(raw), dtype=np.dtype(name)).reshape(shape)
    return found if code == _ARRAY else found[()]


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ext_hook=_from_ext)
_list_decoder: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list[Any], ext_hook=_from_ext)
_block_decoder = msgspec.msgpack.Decoder(tuple[str, tuple[int, ...], bytes])
