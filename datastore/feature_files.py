"""Features, and rows of streams, as files that every array library reads: npy and safetensors, float32, a block of rows
at a time.

Whatever the stored dtype, a feature comes as it was computed, up to that dtype's rounding. A row that is absent is NaN.
Both formats say at their beginning how long they are, so a file can be sent without holding more than a block.

npy: numpy's format 1.0. safetensors: 8 bytes with the header's length, the header, the numbers; one tensor, `features`
or `rows`, and in `__metadata__` the JSON text `gradstore` (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.errors import InvalidInput
from datastore.segments import Rows

BLOCK = 256  # features sent at a time: 8 MiB at dim 8,192
MAX_HEADER = 100_000_000  # bytes of a safetensors header that other programs read
_TYPES = {"<f4": "F32", "<i4": "I32", "|u1": "U8"}


@dataclass(frozen=True)
class ArrayFile:
    """A file of numbers: how long it is, and its pieces."""

    length: int
    """Bytes."""
    pieces: Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Numbers:
    """Rows of numbers that are read a few at a time."""

    dim: int
    blocks: Callable[[int, int], Iterator[NDArray[np.float32]]]
    """Rows `start:stop` in order, a few at a time (n, dim); NaN where a row is absent."""


def of_features(view: Rows) -> Numbers:
    """The features of a feature set."""

    def blocks(start: int, stop: int) -> Iterator[NDArray[np.float32]]:
        valid = view.valid
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            block = view.features(first, last)
            block[~valid[first:last]] = np.nan
            yield block

    return Numbers(view.dim, blocks)


def npy(numbers: Numbers, start: int, stop: int) -> ArrayFile:
    """Rows `start:stop` as an .npy file (stop − start, dim)."""
    buffer = io.BytesIO()
    shape = (stop - start, numbers.dim)
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return _file(buffer.getvalue(), numbers, start, stop)


def safetensors(numbers: Numbers, start: int, stop: int, *, name: str, metadata: Mapping[str, str]) -> ArrayFile:
    """Rows `start:stop` as a safetensors file with a tensor of this name (stop − start, dim).

    Raises `InvalidInput` where the metadata are longer than other programs read.
    """
    size = (stop - start) * numbers.dim * 4
    tensor = {"dtype": "F32", "shape": [stop - start, numbers.dim], "data_offsets": [0, size]}
    header = _header({name: tensor}, metadata)
    if (taken := len(header) - 8) > MAX_HEADER:  # the format does not count the eight bytes of the length
        raise InvalidInput(
            f"a safetensors file says in at most {MAX_HEADER:,} bytes what is in it, and here that takes "
            f"{taken:,}: ask for fewer rows at a time (start, stop), or for npy"
        )
    return _file(header, numbers, start, stop)


def safetensors_of(arrays: Mapping[str, NDArray[Any]], *, metadata: str) -> bytes:
    """Arrays in memory as a safetensors file, in their order."""
    tensors, offset = {}, 0
    for name, array in arrays.items():
        spanned = [offset, offset + array.nbytes]
        tensors[name] = {"dtype": _TYPES[array.dtype.str], "shape": list(array.shape), "data_offsets": spanned}
        offset += array.nbytes
    return _header(tensors, {"gradstore": metadata}) + b"".join(array.tobytes() for array in arrays.values())


def _header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": dict(metadata), **tensors}, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _file(header: bytes, numbers: Numbers, start: int, stop: int) -> ArrayFile:
    def pieces() -> Iterator[bytes]:
        yield header
        for block in numbers.blocks(start, stop):
            yield block.astype("<f4", copy=False).tobytes()

    return ArrayFile(len(header) + (stop - start) * numbers.dim * 4, pieces)
