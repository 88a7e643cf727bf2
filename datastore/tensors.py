"""Safetensors files, read without torch: names, types and shapes, whether the bytes are all there, and all finite.

The format: 8 bytes little-endian with the header's length, the header as JSON, then the tensors' bytes one after the
other (https://github.com/huggingface/safetensors, "Format"). Nothing in it can run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.errors import InvalidCheckpoint

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip

_NOT_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000), "F32": (np.uint32, 0x7F80_0000), "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80), "F8_E5M2": (np.uint8, 0x7C), "F8_E4M3": (np.uint8, 0x7F),
}  # fmt: skip
"""By type, the bits that are all set in a NaN or an infinity, and in no other number."""
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Numpy's names of the types that trained weights have."""
STEP = 1 << 22  # bytes read at once; a multiple of every number's size


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file."""

    dtype: str
    """As safetensors writes it: F32, BF16 and so on."""
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin, behind the header."""

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    bytes: int
    """Bytes before the first tensor."""


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises `InvalidCheckpoint` where the file is none, or is cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _broken(path, "it does not begin with the length of a header")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", {})
        spans = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
        tensors = {name: _tensor(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _broken(path, f"its header cannot be read ({type(error).__name__}: {error})") from error
    _check_spans(path, spans, tensors, stored=size - 8 - length)
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()}, bytes=8 + length)


def check_finite(path: Path) -> None:
    """Read a safetensors file, a step at a time. Raises `InvalidCheckpoint` naming a tensor with a NaN or infinity."""
    header = read_header(path)
    with path.open("rb") as file:
        for name, tensor in header.tensors.items():
            if tensor.dtype not in _NOT_FINITE:
                continue
            number, mask = _NOT_FINITE[tensor.dtype]
            left = tensor.size * np.dtype(number).itemsize
            file.seek(header.bytes + tensor.start)
            while left > 0:
                read = file.read(min(left, STEP))
                if not read:
                    raise _broken(path, f"the bytes of {name!r} end early")
                left -= len(read)
                if bool(((np.frombuffer(read, number) & number(mask)) == mask).any()):
                    raise InvalidCheckpoint(
                        f"{name!r} in {path.name} holds a number that is not finite: its training has diverged, or the "
                        "file is damaged; send an earlier checkpoint"
                    )


def length(path: Path, *, names: Container[str]) -> float:
    """The L2 norm of these tensors of a safetensors file together, read a step at a time, in float64.

    Raises `InvalidCheckpoint` for a type of numbers without a name in numpy other than BF16.
    """
    header, squares = read_header(path), 0.0
    with path.open("rb") as file:
        for name, tensor in header.tensors.items():
            if name not in names:
                continue
            if tensor.dtype not in _FLOATS:
                raise InvalidCheckpoint(f"{name!r} in {path.name} is stored as {tensor.dtype}, whose length is unknown")
            file.seek(header.bytes + tensor.start)
            left = tensor.size * _ITEM_BITS[tensor.dtype] // 8
            while left > 0:
                read = file.read(min(left, STEP))
                if not read:
                    raise _broken(path, f"the bytes of {name!r} end early")
                left -= len(read)
                squares += float(np.square(_numbers(read, tensor.dtype)).sum())
    return math.sqrt(squares)


def read(path: Path, header: Header, name: str) -> NDArray[np.float64]:
    """A tensor of a safetensors file in float64. Raises `InvalidCheckpoint` for a type of numbers that numpy lacks."""
    tensor = header.tensors[name]
    if tensor.dtype not in _FLOATS:
        raise InvalidCheckpoint(f"{name!r} in {path.name} is stored as {tensor.dtype}, which cannot be read here")
    with path.open("rb") as file:
        file.seek(header.bytes + tensor.start)
        raw = file.read(tensor.size * _ITEM_BITS[tensor.dtype] // 8)
    return _numbers(raw, tensor.dtype).reshape(tensor.shape)


def _numbers(raw: bytes, dtype: str) -> NDArray[np.float64]:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(raw, _FLOATS[dtype]).astype(np.float64)


def _tensor(entry: Mapping[str, Any]) -> TensorInfo:
    shape = tuple(int(side) for side in entry["shape"])
    if min(shape, default=0) < 0:
        raise ValueError("a side of a tensor is negative")
    return TensorInfo(dtype=str(entry["dtype"]), shape=shape, start=int(entry["data_offsets"][0]))


def _check_spans(
    path: Path, spans: list[tuple[int, int, str]], tensors: Mapping[str, TensorInfo], *, stored: int
) -> None:
    """Every tensor has its bytes, one after the other, to the end of the file."""
    reached = 0
    for start, stop, name in spans:
        tensor = tensors[name]
        bits = _ITEM_BITS.get(tensor.dtype)
        if start != reached or (bits is not None and stop - start != tensor.size * bits // 8):
            raise _broken(path, f"the bytes of {name!r} are not where its header says")
        reached = stop
    if reached != stored:
        raise _broken(path, f"it holds {stored:,} bytes of tensors where its header says {reached:,}")


def _broken(path: Path, why: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(f"{path.name} is no safetensors file, or was cut off: {why}; send it again")
