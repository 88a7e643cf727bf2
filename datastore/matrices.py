"""Rows of numbers that streams and uploaded labels consist of, kept under the hash of what they were made from.

    <root>/matrix_…/rows.npy       (n, d) float32, or bool for labels; zeros where there is no row
                    present.npy    (n,) bool: which rows there are
                    manifest.json  what they were made from, why rows are absent, and the SHA-256 of both files

Reading checks both files against their SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.array_files import map_array, read_array, write_array
from datastore.depot import LOCAL, Depot
from datastore.durable import unfinished, write_file
from datastore.errors import Damaged
from datastore.kept_folders import KeptFolders

_ARRAYS = ("rows", "present")


@dataclass(frozen=True)
class Matrix:
    """Numbers for some of n rows."""

    rows: NDArray[Any]
    """(n, d) float32 or bool; zeros where there is no row."""
    present: NDArray[np.bool_]
    """(n,)."""
    reasons: Mapping[int, str] = field(default_factory=dict)
    """Why rows are absent, by their number, where it is known."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of it."""


class Matrices(KeptFolders):
    """The matrices under one folder: originals, see `KeptFolders`."""

    def __init__(self, root: Path, *, depot: Depot = LOCAL) -> None:
        super().__init__(root, pattern="matrix_*", depot=depot)

    def get(self, key: str) -> Matrix:
        """The matrix of this name. Raises `Damaged` where its files are missing or have changed."""
        return self._read(key, read_array)

    def map(self, key: str) -> Matrix:
        """The matrix of this name, its numbers left on the disk until they are looked at. Raises as `get` does."""
        return self._read(key, map_array)

    def _read(self, key: str, read: Callable[[Path, str], NDArray[Any]]) -> Matrix:
        folder = self.root / key
        self._depot.ensure(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            rows, present = (read(folder / f"{name}.npy", manifest["sha256"][name]) for name in _ARRAYS)
            return Matrix(rows, present, {int(row): text for row, text in manifest["reasons"]}, manifest["notes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(
                f"{folder} cannot be read ({error}): delete what it is part of, and make that again"
            ) from error

    def put(self, key: str, matrix: Matrix, *, made_from: Mapping[str, Any]) -> None:
        """Keep a matrix; where one of this name is kept already, nothing happens."""
        if self.exists(key):
            self._depot.touch(self.root / key)
            return
        with unfinished(self._unfinished, key) as partial:
            sums = {name: write_array(partial / f"{name}.npy", getattr(matrix, name)) for name in _ARRAYS}
            reasons = sorted(matrix.reasons.items())
            manifest = {
                "made_from": dict(made_from),
                "reasons": reasons,
                "notes": dict(matrix.notes),
                "sha256": sums,
            }
            write_file(partial / "manifest.json", json.dumps(manifest, ensure_ascii=False).encode())
            self._depot.keep(partial, self.root / key)
