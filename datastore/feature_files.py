"""Features as files that every array library reads: npy and safetensors, float32, a block of rows at a time.

Whatever the stored dtype, a row comes as it was computed, up to that dtype's rounding. A row without a feature is NaN.
Both formats say at their beginning how long they are, so a file can be sent without holding more than a block.

npy: numpy's format 1.0. safetensors: 8 bytes with the header's length, the header, the numbers; one tensor `features`,
and in `__metadata__` the JSON text `gradstore` (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.segments import Rows

BLOCK = 256  # rows sent at a time: 8 MiB at dim 8,192
_TYPES = {"<f4": "F32", "<i4": "I32", "|u1": "U8"}


@dataclass(frozen=True)
class ArrayFile:
    """A file of numbers: how long it is, and its pieces."""

    length: int
    """Bytes."""
    pieces: Callable[[], Iterator[bytes]]


def npy(view: Rows, start: int, stop: int) -> ArrayFile:
    """Rows `start:stop` as an .npy file (stop − start, dim)."""
    buffer = io.BytesIO()
    shape = (stop - start, view.dim)
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return _file(buffer.getvalue(), view, start, stop)


def safetensors(view: Rows, start: int, stop: int, *, metadata: str) -> ArrayFile:
    """Rows `start:stop` as a safetensors file with the tensor `features` (stop − start, dim)."""
    size = (stop - start) * view.dim * 4
    tensor = {"dtype": "F32", "shape": [stop - start, view.dim], "data_offsets": [0, size]}
    return _file(_header({"features": tensor}, metadata), view, start, stop)


def safetensors_of(arrays: Mapping[str, NDArray[Any]], *, metadata: str) -> bytes:
    """Arrays in memory as a safetensors file, in their order."""
    tensors, offset = {}, 0
    for name, array in arrays.items():
        spanned = [offset, offset + array.nbytes]
        tensors[name] = {"dtype": _TYPES[array.dtype.str], "shape": list(array.shape), "data_offsets": spanned}
        offset += array.nbytes
    return _header(tensors, metadata) + b"".join(array.tobytes() for array in arrays.values())


def _header(tensors: Mapping[str, Any], metadata: str) -> bytes:
    text = json.dumps({"__metadata__": {"gradstore": metadata}, **tensors}, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _file(header: bytes, view: Rows, start: int, stop: int) -> ArrayFile:
    def pieces() -> Iterator[bytes]:
        yield header
        valid = view.valid
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            block = view.features(first, last)
            block[~valid[first:last]] = np.nan
            yield block.astype("<f4", copy=False).tobytes()

    return ArrayFile(len(header) + (stop - start) * view.dim * 4, pieces)
