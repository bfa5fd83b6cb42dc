"""The promise: the small state comes back exactly, and nothing else can be smuggled through it."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from deadpool_megatron.snapshot import capture_host_rng, decode, encode, restore_host_rng
from deadpool_megatron.snapshot.small import SmallStateError


def test_every_supported_value_comes_back_with_its_type() -> None:
    state = {
        "none": None,
        "bool": True,
        "ints": [0, -1, 2**63, -(2**63), 2**64, -(2**200)],
        "float": 0.1,
        "nan": float("nan"),
        "text": "é",
        "bytes": b"\x00\xff",
        "tuple": (1, "a", (2.5, None), []),
        "nested": {"a": {"b": [{"c": (True, 1)}]}},
        "many": tuple(range(100)),
        "many_big": tuple([2**32] * 20),
        "many_bools": (True,) * 20,
        "empty": (),
    }
    back = decode(encode(state))
    assert back.pop("nan") != 0
    state.pop("nan")
    assert repr(back) == repr(state)  # repr tells True from 1 and tuples from lists


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        torch.randn(5).to(torch.bfloat16),
        torch.tensor(3.5, dtype=torch.float64),
        torch.empty(0, 4, dtype=torch.int16),
        torch.tensor([True, False]),
        torch.randn(3).to(torch.float8_e4m3fn),
        torch.tensor([1 + 2j]),
        torch.get_rng_state(),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_tensors_come_back_bitwise(tensor: torch.Tensor) -> None:
    back = decode(encode({"t": tensor}))["t"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    bits = lambda t: t.contiguous().reshape(-1).view(torch.uint8).tolist() if t.numel() else []  # noqa: E731
    assert bits(back) == bits(tensor)
    back.zero_()  # writable, or torch would warn


def test_numpy_arrays_and_scalars_come_back_bitwise() -> None:
    state = {
        "a": np.arange(6, dtype=">u2").reshape(2, 3),
        "s": np.float32(1.5),
        "z": np.array(7),
        "e": np.empty((0, 2)),
    }
    back = decode(encode(state))
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert type(back[name]) is type(value)
        assert back[name].tobytes() == value.tobytes()


def test_the_host_generators_go_on_as_if_nothing_had_happened() -> None:
    data = encode(capture_host_rng())
    expected = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    restore_host_rng(decode(data))
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == expected


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": {"b": [1, {2, 3}]}}, r"a\.b\[1\]: a builtins.set"),
        ({"a": {1: 2}}, "a: key 1 is a int"),
        ({"f": print}, "f: a builtins.builtin_function"),
        ({"o": np.array([object()])}, "o: a numpy array of object"),
        ({"s": torch.eye(2).to_sparse()}, "s: a torch.sparse_coo"),
        ({"t": (1, torch.device("cpu"))}, r"t\[1\]: a torch.device"),
        ([], "must be a dict"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_place(state: dict[str, object], place: str) -> None:
    with pytest.raises(SmallStateError, match=place):
        encode(state)


def test_damaged_or_foreign_bytes_are_refused() -> None:
    good = encode({"t": torch.arange(4), "n": np.arange(3), "x": (1, 2)})
    for bad in (b"", b"\x01" + good[1:], good[:-3], b"\x03\xc1", b"\x03\x93\x01\x03\x03", good + b"x"):
        with pytest.raises(SmallStateError):
            decode(bad)
    for at in range(1, len(good), 3):
        changed = bytearray(good)
        changed[at] ^= 0xFF
        try:
            decode(bytes(changed))
        except SmallStateError:
            continue


@pytest.mark.perf
def test_encoding_four_generators_takes_no_longer_than_pickling_them() -> None:
    state = {**capture_host_rng(), "tracker": {name: torch.get_rng_state() for name in ("default", "model", "expert")}}
    ours, pickled = (min(_timed(call, state) for _ in range(200)) for call in (encode, pickle.dumps))
    size = len(encode(state))
    print(f"all generator states: encoded in {ours * 1e6:.0f} us, pickled in {pickled * 1e6:.0f} us; {size} bytes")
    assert ours < pickled


def _timed(call: Callable[[object], object], state: dict[str, object]) -> float:
    start = time.perf_counter()
    call(state)
    return time.perf_counter() - start
