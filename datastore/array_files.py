"""Named arrays that were computed, a folder of .npy files for each hash of all that they depend on; never a pickle."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.durable import unfinished, write_file
from datastore.errors import Damaged
from datastore.identity import sha256_of
from datastore.kept_folders import KeptFolders

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
Arrays = dict[str, NDArray[Any]]


def write_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]], *, about: Mapping[str, Any]) -> None:
    """Write a .npy file for each array into a new folder, and a manifest with what they are about and their SHA-256."""
    sums = {name: write_array(folder / f"{name}.npy", array) for name, array in arrays.items()}
    write_file(folder / MANIFEST, json.dumps({**about, "sha256": sums}, indent=1).encode())


def read_arrays(folder: Path) -> Arrays:
    """The arrays of a folder. Raises FileNotFoundError where it is not whole, ValueError or KeyError where damaged."""
    sums = json.loads((folder / MANIFEST).read_bytes())["sha256"]
    return {name: read_array(folder / f"{name}.npy", sha256) for name, sha256 in sums.items()}


def write_array(path: Path, array: NDArray[Any]) -> str:
    """Write an .npy file and return its SHA-256."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_file(path, buffer.getbuffer())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def read_array(path: Path, sha256: str) -> NDArray[Any]:
    """The array of an .npy file. Raises FileNotFoundError, and ValueError where it is not what was written."""
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError(f"{path} does not match its checksum")
    array: NDArray[Any] = np.load(io.BytesIO(raw), allow_pickle=False)
    return array


def map_array(path: Path, sha256: str) -> NDArray[Any]:
    """The array of an .npy file as `read_array` has it, read-only and without holding it in memory."""
    if sha256_of(path) != sha256:
        raise ValueError(f"{path} does not match its checksum")
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


class ArrayFiles(KeptFolders):
    """The arrays of one kind under one folder: a cache, see `KeptFolders`."""

    def get(self, key: str) -> Arrays | None:
        """The arrays of this name; None where there are none, or where their bytes are damaged (they are removed)."""
        try:
            return read_arrays(self.root / key) if self._depot.ensure(self.root / key) else None
        except (FileNotFoundError, ValueError, KeyError, Damaged) as error:
            log.warning("damaged arrays removed", extra={"arrays": key, "reason": str(error)})
            self.delete([key])
            return None

    def check(self, key: str) -> None:
        """Raise `Damaged` where arrays cannot be read as they were written; nothing is removed."""
        try:
            self._depot.ensure(self.root / key)
            read_arrays(self.root / key)
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise Damaged(f"the arrays {key} cannot be read ({error})") from error

    def put(self, key: str, arrays: Mapping[str, NDArray[Any]], *, made_from: Mapping[str, Any]) -> None:
        """Keep arrays; where some are kept already, nothing happens."""
        with unfinished(self._unfinished, key) as partial:
            write_arrays(partial, arrays, about={"made_from": dict(made_from)})
            self._depot.keep(partial, self.root / key)
