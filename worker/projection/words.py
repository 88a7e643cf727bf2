"""Streams of random words: SplitMix64 (Steele, Lea and Flood, 2014), the same on every machine, device and torch.

A stream is named by a key; its word c is

    z = key + (c + 1) · 9E3779B97F4A7C15
    z = (z ^ z≫30) · BF58476D1CE4E5B9
    z = (z ^ z≫27) · 94D049BB133111EB
    word = z ^ z≫31

modulo 2⁶⁴, so any part of a stream is made without the rest, in integer arithmetic. The key is the first 8 bytes,
little-endian, of SHA-256 over `gradstore-projection|<version>|<seed>|<purpose>|<parameter name>`. Keyed by *name* and
by the offset inside the parameter, a coordinate's random bits do not depend on the order of the parameters or on the
other ones.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

PROJECTION_VERSION = 1
"""Part of a feature set's identity: it changes when any map gives other numbers for the same seed."""

MAX_DIM = 1 << 20

_LOW = (1 << 32) - 1


def stream_key(seed: int, purpose: str, name: str) -> int:
    """Return the 64-bit key of a stream of random words."""
    text = f"gradstore-projection|{PROJECTION_VERSION}|{seed}|{purpose}|{name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def random_words(key: int, counters: Tensor) -> Tensor:
    """Return the words of stream `key` at `counters` (int64, any shape), as the int64 with the same 64 bits."""
    z = (counters + 1) * signed(0x9E3779B97F4A7C15) + signed(key)
    z = (z ^ _shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned words; torch's own shift of int64 repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def bits(words: Tensor) -> Tensor:
    """Return the bits of 64-bit words, lowest first: (…, 64) int8 of 0 and 1."""
    return ((words.unsqueeze(-1) >> torch.arange(64, device=words.device)) & 1).to(torch.int8)


def below(words: Tensor, bound: int) -> Tensor:
    """Return ⌊word · bound / 2⁶⁴⌋ of unsigned words, int64: a number below `bound` (at most 2³¹) for each."""
    return (_shifted(words, 32) * bound + ((words & _LOW) * bound >> 32)) >> 32


def random_signs(seed: int, name: str, size: int, device: torch.device) -> Tensor:
    """Return the signs of a parameter's coordinates, (size,) int8 of ±1.

    Coordinate c has the sign of bit c mod 64 of word ⌊c / 64⌋ of the stream `signs` (set: +1).
    """
    words = random_words(stream_key(seed, "signs", name), torch.arange(math.ceil(size / 64), device=device))
    return bits(words).flatten()[:size].mul(2).sub_(1)
