"""Features in the files of other programs, read by rows: torch's .pt, numpy's .npy, and safetensors.

Nothing in a file is run: pickles are read with `weights_only=True`, which builds tensors and nothing else, .npy
without pickles. Files are mapped into memory, so 4 GB of them are read in blocks of 1,024 rows. They are gone through
twice, once to check every row and once to store it: what is refused has left nothing behind.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradstore.types import Norms
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from datastore.errors import InvalidFeatures, first_line
from datastore.gradients import Block
from datastore.shards import CHUNK_ROWS

TENSOR = "features"  # the name of the tensor in a safetensors file that has several
UNIT = 1e-2  # how far the length of a normalised row may be from 1: eight times float16's rounding
SHOWN = 5  # rows named in a refusal


@dataclass(frozen=True)
class Part:
    """One file: (rows, dim) numbers of one type."""

    rows: int
    dim: int
    dtype: str
    read: Callable[[int, int], NDArray[np.float32]]
    """Rows from, to → float32 (n, dim)."""


@dataclass(frozen=True)
class Found:
    """What a first look at every row has found."""

    norms: NDArray[np.float32]
    """L2 norms (rows,); 0 for a row that is not finite."""
    normalised: bool
    described: Norms


class Table:
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.dim, self.dtype = parts[0].dim, parts[0].dtype
        self._ends = list(accumulate(part.rows for part in parts))
        self.rows = self._ends[-1]

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start:stop`, float32 (n, dim)."""
        found = []
        for number in range(bisect_right(self._ends, start), len(self.parts)):
            first = self._ends[number] - self.parts[number].rows
            if first >= stop:
                break
            found.append(self.parts[number].read(max(start - first, 0), min(stop, self._ends[number]) - first))
        return np.concatenate(found)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows as (first row, rows), a chunk at a time."""
        for start in range(0, self.rows, CHUNK_ROWS):
            yield start, self.read(start, min(start + CHUNK_ROWS, self.rows))


def open_table(paths: Sequence[Path], *, rows: int, owner: str, dim: int | None) -> Table:
    """The features in these files; `owner` has so many rows. Raises `InvalidFeatures` where they do not fit."""
    parts = [_open(path) for path in paths]
    dims = {part.dim: path.name for path, part in zip(paths, parts, strict=True)}
    if len(dims) > 1:
        shown = ", ".join(f"{found:,} in {name}" for found, name in sorted(dims.items()))
        raise InvalidFeatures(f"the files have rows of different lengths ({shown}): they are not of one projection")
    table = Table(parts)
    if table.rows != rows:
        raise InvalidFeatures(
            f"the files hold {table.rows:,} rows and {owner} has {rows:,}: import the features of exactly these rows, "
            "in their order, or upload the rows that they are of"
        )
    if dim is not None and table.dim != dim:
        raise InvalidFeatures(f"the files have rows of {table.dim:,} numbers, and dim says {dim:,}")
    return table


def look(table: Table, *, on_error: str, check: Callable[[], None]) -> Found:
    """Look at every row; `check` is called between blocks.

    Raises `InvalidFeatures` for rows that are not finite, unless they are to be skipped, and where no row is left.
    """
    norms = np.zeros(table.rows, np.float32)
    bad: list[int] = []
    for start, block in table.blocks():
        check()
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt(np.square(block, dtype=np.float64).sum(axis=1)).astype(np.float32)
        finite = np.isfinite(block).all(axis=1) & np.isfinite(lengths)
        bad += (start + np.flatnonzero(~finite)).tolist()
        norms[start : start + len(block)] = np.where(finite, lengths, 0)
    if bad and on_error == "fail":
        shown = ", ".join(map(str, bad[:SHOWN])) + (" …" if len(bad) > SHOWN else "")
        raise InvalidFeatures(
            f"{len(bad):,} rows hold a NaN, an infinity or more than float32 holds (rows {shown}, from 0): compute "
            "them again, or send on_error=skip to store them as rows without a feature"
        )
    lengths = norms[norms > 0]
    if not len(lengths):
        raise InvalidFeatures("no row has a direction: all of them are zeros or not finite")
    described = Norms(smallest=float(lengths.min()), median=float(np.median(lengths)), largest=float(lengths.max()))
    return Found(norms, bool((np.abs(lengths - 1) <= UNIT).all()), described)


def block_of(features: NDArray[np.float32], norms: NDArray[np.float32]) -> Block:
    """Imported rows as the store takes them. Their losses and tokens are not known and stand as 0."""
    rows = len(features)
    return Block(
        features=features,
        norms=norms,
        raw_norms=norms,
        losses=np.zeros(rows, np.float32),
        tokens=np.zeros(rows, np.int32),
        reasons=[None] * rows,
    )


# Files --------------------------------------------------------------------------------------------------------------


def _open(path: Path) -> Part:
    readers = {".pt": _torch, ".npy": _numpy, ".safetensors": _safetensors}
    if path.suffix not in readers:
        raise InvalidFeatures(f"{path.name} is no file of features: {', '.join(readers)} are read")
    return readers[path.suffix](path)


def _torch(path: Path) -> Part:
    try:
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise InvalidFeatures(
            f"{path.name} holds more than tensors, perhaps code, and was not opened further: save the tensor alone, "
            "torch.save(torch.as_tensor(features), path)"
        ) from error
    except (RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, OSError, struct.error) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise InvalidFeatures(
            f"{path.name} cannot be read, as of no file of torch.save or a cut one ({what})"
        ) from error
    if not isinstance(content, torch.Tensor):
        raise InvalidFeatures(f"{path.name} holds a {type(content).__name__}: a tensor (rows, dim) is needed")
    content = content.detach()  # of a parameter the numbers alone
    if content.layout != torch.strided or content.is_quantized or content.device.type != "cpu":
        raise InvalidFeatures(f"{path.name} holds a sparse, quantised or empty tensor: save it as plain numbers")
    if content.numel() * content.element_size() > content.untyped_storage().nbytes():
        raise InvalidFeatures(
            f"{path.name} says {tuple(content.shape)} and holds fewer numbers, which are shown again and again "
            "(Tensor.expand): save its clone()"
        )
    return _part(path, tuple(content.shape), str(content.dtype).removeprefix("torch."), content.__getitem__)


def _numpy(path: Path) -> Part:
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InvalidFeatures(
            f"{path.name} is no array of numbers, or holds pickled objects, which are not opened: {first_line(error)}"
        ) from error
    return _part(path, content.shape, content.dtype.name, content.__getitem__)


def _safetensors(path: Path) -> Part:
    try:
        file: Any = safe_open(path, framework="pt")
        names = list(file.keys())
        name = names[0] if len(names) == 1 else TENSOR
        tensor = file.get_slice(name)
        dtype = str(file.get_slice(name)[:0].dtype).removeprefix("torch.")
    except (SafetensorError, OSError) as error:
        raise InvalidFeatures(
            f"{path.name} is no safetensors file with one tensor, or one called {TENSOR!r}: {first_line(error)}"
        ) from error
    return _part(path, tuple(tensor.get_shape()), dtype, tensor.__getitem__)


def _part(path: Path, shape: Sequence[int], dtype: str, rows_of: Callable[[slice], Any]) -> Part:
    if len(shape) != 2 or not all(shape):
        raise InvalidFeatures(f"{path.name} has the shape {tuple(shape)}: (rows, dim) is needed")
    if not dtype.startswith(("float", "bfloat")):
        raise InvalidFeatures(f"{path.name} holds numbers of type {dtype}: features are floating-point numbers")

    def read(start: int, stop: int) -> NDArray[np.float32]:
        rows = rows_of(slice(start, stop))
        return rows.float().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows, np.float32)

    return Part(shape[0], shape[1], dtype, read)
