"""Reed-Solomon over chunks, by ISA-L through pyeclib (as OpenStack Swift uses it): any k shares give all back.

The code is systematic and linear byte by byte: shares 0 .. k-1 are the data, and a parity byte is the sum, which is
exclusive or, of each data byte multiplied by a constant. So what one data chunk adds to a parity chunk is a look-up in
a table of 256 bytes, in whatever order chunks arrive. The tables are read off the library, by encoding every byte
value; nothing here knows how to multiply.

pyeclib's fragments are a header and the bytes. The header depends on sizes and the share's number alone, so it is taken
from a fragment of zeros and put before our bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .errors import VaultError

_TYPE: Final = "isa_l_rs_cauchy"  # any k of k + m, whatever k and m; ISA-L's Vandermonde matrix cannot say that


class Coder:
    """``k`` data and ``m`` parity chunks of ``chunk_bytes``. Thread-safe. Raises VaultError without pyeclib."""

    def __init__(self, k: int, m: int, chunk_bytes: int) -> None:
        try:
            from pyeclib.ec_iface import ECDriver, ECDriverError
        except ImportError as err:
            raise VaultError(f"redundancy {k}+{m} needs pyeclib, which cannot be imported: {err}") from None
        self.k, self.m, self.chunk_bytes = k, m, chunk_bytes
        self._error: type[Exception] = ECDriverError
        self._driver: Any = ECDriver(k=k, m=m, ec_type=_TYPE, chksum_type="none")
        zeros: list[bytes] = self._driver.encode(bytes(k * chunk_bytes))
        head = len(zeros[0]) - chunk_bytes
        self._heads = [fragment[:head] for fragment in zeros]
        self._zero = bytes(chunk_bytes)
        every = bytes(range(256)) * (chunk_bytes // 256)
        self._tables: list[list[bytes]] = []  # by data share, by parity row
        for share in range(k):
            chunks = [self._zero] * k
            chunks[share] = every
            fragments = self._driver.encode(b"".join(chunks))
            self._tables.append([fragment[head : head + 256] for fragment in fragments[k:]])

    def add(self, parity: npt.NDArray[np.uint8], row: int, share: int, chunk: memoryview) -> None:
        """Add data share ``share``'s chunk, uint8 [at most chunk_bytes], to a chunk of parity row ``row``, in place.

        A shorter chunk counts as filled up with zeros. Adding the same twice takes it away again.
        """
        view = parity[: len(chunk)]
        np.bitwise_xor(view, np.frombuffer(bytes(chunk).translate(self._tables[share][row]), np.uint8), out=view)

    def rebuild(self, wanted: int, shares: Mapping[int, memoryview]) -> bytes:
        """Data share ``wanted`` out of any k shares (data below k, parity from k on), each of at most chunk_bytes.

        Raises VaultError when they are too few.
        """
        size = self.chunk_bytes
        fragments = [
            b"".join((self._heads[share], chunk, self._zero[: size - len(chunk)])) for share, chunk in shares.items()
        ]
        try:
            data: bytes = self._driver.decode(fragments)
        except self._error as err:
            raise VaultError(f"share {wanted} cannot be had from shares {sorted(shares)}: {err}") from None
        return data[wanted * size : (wanted + 1) * size]
