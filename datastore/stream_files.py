"""Rows of numbers in a file of another program, and their ids: .npy, or .safetensors, never a pickle.

Ids stand beside the rows, in their order: in `ids.json`, an array of texts or whole numbers, in `ids.txt`, one a line,
or, of a safetensors file, in its metadata under `ids`, as the text of such an array.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from numpy.typing import NDArray

from datastore.errors import InvalidCheckpoint, InvalidInput
from datastore.identity import sha256_of
from datastore.strict_json import NotJson, parse
from datastore.tensors import Header, read_header

TENSOR = "rows"
"""Name of the tensor in a safetensors file that has several."""
MAX_DIM = 1 << 20
IDS = ("ids.json", "ids.txt")
_ENDINGS = (".npy", ".safetensors")
_REFUSED = (".npz", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".mat")
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip

_HEADERS = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}


@dataclass(frozen=True)
class SentRows:
    """The rows of an upload, in its order."""

    rows: NDArray[Any]
    """(m, d) of any type of numbers, mapped from the file."""
    ids: Sequence[str]
    """(m,)."""


def read_upload(folder: Path) -> SentRows:
    """The rows of the one file of numbers in a folder, and their ids. Raises `InvalidInput`."""
    file = _only(folder)
    rows, metadata = _safetensors(file) if file.suffix == ".safetensors" else (_npy(file), {})
    if rows.ndim == 3 and rows.shape[1] == 1:
        rows = rows[:, 0]
    if rows.ndim != 2 or not 1 <= rows.shape[1] <= MAX_DIM or rows.dtype.kind not in "fiub":
        raise InvalidInput(
            f"{file.name} has the shape {rows.shape} and the type {rows.dtype}: send numbers of the shape (rows, dim), "
            f"with at most {MAX_DIM:,} dims"
        )
    ids = _ids(folder, metadata)
    if len(ids) != len(rows):
        raise InvalidInput(f"{file.name} has {len(rows):,} rows and there are {len(ids):,} ids: send an id for each")
    return SentRows(rows, ids)


def fingerprint(folder: Path) -> list[list[str]]:
    """What tells an upload from any other: names and SHA-256 of its files."""
    return [[path.name, sha256_of(path)] for path in sorted(folder.rglob("*")) if path.is_file()]


def _only(folder: Path) -> Path:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    arrays = [path for path in found if path.suffix in _ENDINGS]
    refused = next((path for path in found if path.suffix in _REFUSED), None)
    if refused is not None:
        raise InvalidInput(
            f"{refused.name} is not read: such files can run code, or hold several arrays; save the rows as .npy "
            "(numpy.save with allow_pickle=False) or .safetensors"
        )
    if len(arrays) != 1:
        shown = ", ".join(path.name for path in found[:5])
        raise InvalidInput(f"send one .npy or .safetensors file with the rows, and their ids; here is {shown}")
    return arrays[0]


def _npy(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InvalidInput(f"{path.name} {_wrong(path)}") from error
    if not isinstance(array, np.ndarray):
        raise InvalidInput(f"{path.name} is an archive of arrays: save one array with numpy.save")
    return array


def _wrong(path: Path) -> str:
    """Why numpy cannot map a file, and what to send instead: numpy's own words advise to trust a pickle."""
    nothing = "is no .npy file of numbers: save the rows with numpy.save and allow_pickle=False"
    with path.open("rb") as file:
        try:
            shape, _, dtype = _HEADERS[read_magic(file)](file)
        except (ValueError, KeyError):
            return nothing
        needed, there = math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell()
    if dtype.hasobject or there >= needed:
        return nothing
    return f"was cut off: it has {there:,} of {needed:,} bytes of numbers; send it again"


def _safetensors(path: Path) -> tuple[NDArray[Any], dict[str, str]]:
    try:
        header = read_header(path)
    except InvalidCheckpoint as error:
        raise InvalidInput(str(error)) from error
    name = TENSOR if TENSOR in header.tensors or len(header.tensors) != 1 else next(iter(header.tensors))
    if name not in header.tensors:
        raise InvalidInput(f"{path.name} has {len(header.tensors)} tensors: call the one that is meant {TENSOR!r}")
    return _tensor(path, header, name), dict(header.metadata)


def _tensor(path: Path, header: Header, name: str) -> NDArray[Any]:
    tensor = header.tensors[name]
    offset = header.bytes + tensor.start
    if tensor.size == 0:
        raise InvalidInput(f"{path.name}: the tensor {name!r} has no numbers")
    if tensor.dtype == "BF16":  # the upper half of a float32
        halves = np.memmap(path, "<u2", mode="r", offset=offset, shape=tensor.shape)
        return (halves.astype("<u4") << 16).view("<f4")
    if tensor.dtype not in _DTYPES:
        raise InvalidInput(f"{path.name}: numbers of the type {tensor.dtype} are not read: save them as F32 or F16")
    return np.memmap(path, _DTYPES[tensor.dtype], mode="r", offset=offset, shape=tensor.shape)


def _ids(folder: Path, metadata: dict[str, str]) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.name in IDS)
    if len(files) + ("ids" in metadata) != 1:
        raise InvalidInput(
            "send the ids of the rows once: as ids.json (an array), as ids.txt (one a line), or in the metadata of a "
            "safetensors file as ids"
        )
    if not files:
        return _array(metadata["ids"].encode(), "the metadata's ids")
    if files[0].suffix == ".json":
        return _array(files[0].read_bytes(), files[0].name)
    try:
        return files[0].read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{files[0].name} is not UTF-8: save it as UTF-8") from error


def _array(text: bytes, name: str) -> list[str]:
    try:
        found = parse(text)
    except NotJson as error:
        raise InvalidInput(f"{name}: {error}") from error
    if not isinstance(found, list) or any(isinstance(id, bool) or not isinstance(id, str | int) for id in found):
        raise InvalidInput(f"{name} is no array of texts or whole numbers")
    return [id if isinstance(id, str) else json.dumps(id) for id in found]
