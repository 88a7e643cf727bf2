"""Features of questions: rows that belong to no dataset, kept under the hash of all that they depend on.

One small file each, at every checkpoint: float32 as the worker computed it, not rounded to the pool's dtype (32 KiB at
8,192 dims). What is damaged or half-written is taken for missing and computed again, so nothing is flushed to the disk.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datastore.chunk_files import CHECKSUM_BYTES, checksum
from datastore.depot import LOCAL, Depot
from datastore.durable import replacing, sweep_files
from datastore.errors import Damaged


@dataclass(frozen=True)
class QuestionFeature:
    """The feature of one question at one checkpoint."""

    feature: NDArray[np.float32]
    """(dim,), of any length but zero."""
    loss: float
    """Mean cross-entropy per supervised token."""
    tokens: int
    """Supervised tokens."""


class Questions:
    """The features of questions under one folder."""

    def __init__(self, root: Path, *, depot: Depot = LOCAL) -> None:
        self.root, self._depot = root, depot

    def get(self, key: str) -> QuestionFeature | None:
        """What is kept under this name; None where nothing is, or what is there is damaged."""
        try:
            self._depot.ensure(self._path(key))
            raw = self._path(key).read_bytes()
            body, check = raw[:-CHECKSUM_BYTES], raw[-CHECKSUM_BYTES:]
            if checksum(np.frombuffer(body, np.uint8)) != check:
                return None
            row: NDArray[np.float32] = np.load(io.BytesIO(body), allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError, Damaged):
            return None
        return QuestionFeature(row[2:], float(row[0]), int(row[1]))

    def put(self, key: str, feature: QuestionFeature) -> None:
        """Keep a feature; what is there is replaced by the same."""
        buffer = io.BytesIO()
        row = np.concatenate([[feature.loss, feature.tokens], feature.feature]).astype(np.float32)
        np.save(buffer, row, allow_pickle=False)
        body = buffer.getvalue()
        with replacing(self._path(key)) as partial:
            partial.write_bytes(body + checksum(np.frombuffer(body, np.uint8)))
            self._depot.publish(partial, self._path(key))

    def delete(self, keys: Iterable[str]) -> None:
        """Remove what is kept under these names."""
        for key in keys:
            self._depot.delete(self._path(key))
            with contextlib.suppress(FileNotFoundError):
                self._path(key).unlink()

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return sweep_files(self.root, older_than=older_than)

    def _path(self, key: str) -> Path:
        return self.root / f"{key}.npy"
