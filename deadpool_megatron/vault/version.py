"""A version names one shard's bytes: (epoch, generation), ordered, and packed into one 64-bit word.

Packing keeps the lexicographic order and makes a version readable and writable in shared memory in a single aligned
store, so that no reader can ever see half of one version and half of another.
"""

from __future__ import annotations

from typing import Final, NamedTuple

_GENERATION_BITS: Final = 40
MAX_GENERATION: Final = (1 << _GENERATION_BITS) - 1
MAX_EPOCH: Final = (1 << (64 - _GENERATION_BITS)) - 2  # the all-ones word is EMPTY
EMPTY: Final = (1 << 64) - 1


class Version(NamedTuple):
    """The epoch a shard was written in and the generation it belongs to."""

    epoch: int
    generation: int

    def pack(self) -> int:
        """This version as one word. Raises ValueError outside of 24 bits of epoch and 40 of generation."""
        if not (0 <= self.epoch <= MAX_EPOCH and 0 <= self.generation <= MAX_GENERATION):
            raise ValueError(
                f"version {tuple(self)} is out of range: epoch 0..{MAX_EPOCH}, generation 0..{MAX_GENERATION}"
            )
        return self.epoch << _GENERATION_BITS | self.generation


CONSTANT: Final = Version(0, 0)  # the one version of what never changes (`ConstantsWriter`)
_CONSTANTS: Final = 1 << 40  # ranks are below; parity has words, which are of another kind


def constants_of(rank: int) -> int:
    """The holder of what never changes of a rank's state."""
    return rank + _CONSTANTS


def is_constants(holder: int) -> bool:
    """Whether a holder of own or peer memory is such a one, and not a rank."""
    return holder >= _CONSTANTS


def owner_of(holder: int) -> int:
    """The rank whose constants these are (`constants_of`)."""
    return holder - _CONSTANTS


def unpack(word: int) -> Version | None:
    """The version in a word of an arena; None when the word is EMPTY."""
    return None if word == EMPTY else Version(word >> _GENERATION_BITS, word & MAX_GENERATION)
