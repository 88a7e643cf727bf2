"""An index over a pool: rows that may have the most and the least influence on a question, without reading them all.

The rows of a pool at all its checkpoints are one long row √w_i φ_i(z)/‖φ_i(z)‖ after the other, whose product with the
question's is the influence itself. That row, less the pool's mean (which changes no order), is projected to the
`REDUCED` principal directions of a sample, stored in a byte a number (FAISS's scalar quantiser), and a question is
compared with all of them: 128 MB for a million rows instead of 16 GB. What comes first at either end is then scored
exactly from the store (datastore/search.py), so that an index can miss a row and never misstates a score.

How often it misses is measured when it is built: the build multiplies every row with some vectors that are not in the
index anyway, and the number of candidates is the smallest of `CANDIDATES` that finds `WANTED_RECALL` of their first
`RECALL_AT` rows at both ends. The measurement is kept and stands in every answer.

    <root>/index_<hash>/manifest.json      what it is made of, and what was measured
    <root>/index_<hash>/projection.npy     float32: the mean, projected (1, reduced), and the directions below
    <root>/index_<hash>/valid.npy          which rows have a feature at every checkpoint
    <root>/index_<hash>/empty.faiss        the trained quantiser
    <root>/index_<hash>/part-<n>.faiss     rows of a segment, mapped into memory when they are searched

A segment has as many parts as it takes for each to hold about `PART_ROWS` rows. A pool that has grown begins with an
index that exists: its parts are taken over (hard links), and the new rows added.
What was tried, with numbers: docs/decisions/an-index-of-principal-directions.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.depot import LOCAL, Depot, evict
from datastore.durable import sweep, unfinished, write_file
from datastore.identity import content_id
from datastore.influence import Floats, Mask, normalise
from datastore.search import Ends, Places, Pool, best_of, blocks, directions
from datastore.segments import Rows, ranges
from datastore.sizes import bytes_of

log = logging.getLogger(__name__)

INDEX_VERSION = 1
"""Counted up when the arithmetic changes, so that old indexes are not found again."""
INDEX_ROWS = 100_000
"""Rows from which a pool gets an index: below, a pass over the store takes about a second."""
PART_ROWS = 1 << 20
"""Rows at which a part ends: those of a part are in memory while it is made, 128 MB at `REDUCED` bytes a row."""
REDUCED = 128
"""Principal directions."""
SAMPLE_BYTES = 256 << 20
SAMPLE_ROWS = 4096
"""Rows that the directions are found from, as far as SAMPLE_BYTES of float32 hold them."""
PROBES = 32
"""Rows of the pool whose true neighbours are found while the index is built, each left out of its own."""
RECALL_AT = 100
WANTED_RECALL = 0.95
CANDIDATES = (250, 350, 500, 700, 1000, 1400, 2000, 2800, 4000)
"""Per end."""
GROWTH = 1.1
"""A pool that has grown by more than this since its index was measured is measured again."""
OVERSAMPLED = 32
"""Directions that the search for the principal ones has to spare (Halko, Martinsson and Tropp, 2011)."""
POWERS = 2
MASK_ROWS = 1 << 20
"""Rows of a mask that are looked at at once."""


def available() -> bool:
    """Whether FAISS is installed; without it every search is exact."""
    return importlib.util.find_spec("faiss") is not None


@dataclass(frozen=True)
class MeasuredRecall:
    """What an index was found to do on vectors that are not in it."""

    recall: float
    """Mean share of the true first `RECALL_AT` rows that are among the candidates; the lower one of both ends, and of
    questions and rows of the pool."""
    candidates: int
    """Rows per end that are scored exactly."""


class Index:
    """An opened index."""

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        self.id = folder.name
        self.measured = MeasuredRecall(**manifest["measured"])
        self._folder = folder
        self._starts = np.cumsum([0, *(stop - start for start, stop in manifest["ranges"])])

    @property
    def bytes(self) -> int:
        """Bytes on the disk."""
        return bytes_of(self._folder)

    def search(self, pool: Pool, asked: NDArray[np.floating], k: int) -> list[Ends]:
        """The k rows with the highest and the lowest scores for each question, as far as the index finds them.

        `asked`: unit rows (questions, checkpoints, dim). More candidates are taken where k is large.
        """
        number = max(self.measured.candidates, 4 * k)
        few = np.flatnonzero(pool.wanted) if int(pool.wanted.sum()) <= 2 * number else None
        reduced = self.reduce(pool, asked)
        return [
            best_of(pool, question, self.candidates(row, pool, number) if few is None else few, k)
            for question, row in zip(asked, reduced, strict=True)
        ]

    def reduce(self, pool: Pool, asked: NDArray[np.floating]) -> Floats:
        """Questions (questions, checkpoints, dim) as the index compares them: (questions, reduced)."""
        found = np.zeros((len(asked), self._projection.shape[1]), np.float32)
        for number, (weight, part) in enumerate(zip(pool.weights, _parts(self._projection, pool), strict=True)):
            rows = (asked[:, number] * np.sqrt(weight)).astype(np.float32)
            found += np.einsum("qd,dr->qr", rows, part)  # OpenBLAS's threads would be in the way of the scan's
        return found

    def candidates(self, question: Floats, pool: Pool, number: int) -> Places:
        """Rows of the pool that may be among the first at either end, `number` for each, in order of rows."""
        faiss = _faiss()
        both = np.stack([question, -question])
        scores, rows = [], []
        for start, (first, part) in zip(self._starts, self._opened, strict=False):
            parameters = None
            if not pool.wanted.all():
                own = np.ascontiguousarray(pool.wanted[first : first + part.ntotal])
                selector = faiss.IDSelectorBitmap(np.packbits(own, bitorder="little"))
                parameters = faiss.SearchParameters(sel=selector)
            found, places = part.search(both, min(number, part.ntotal), params=parameters)
            scores.append(found)
            rows.append(np.where(places >= 0, places + start, -1))
        table, places = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
        best = np.argpartition(-table, min(number, table.shape[1]) - 1, axis=1)[:, :number]
        chosen = np.unique(np.take_along_axis(places, best, axis=1))
        return chosen[chosen >= 0]

    @cached_property
    def valid(self) -> Mask:
        """Rows that have a feature at every checkpoint (n,): read here, they need not be read from the store."""
        found: Mask = np.load(self._folder / "valid.npy", allow_pickle=False)
        return found

    @cached_property
    def _projection(self) -> Floats:
        found: Floats = np.load(self._folder / "projection.npy", mmap_mode="r", allow_pickle=False)
        return found

    @cached_property
    def _opened(self) -> list[tuple[int, Any]]:
        """(first row, FAISS index) of each part, its codes mapped into memory."""
        return [
            (int(start), _read(self._folder / f"part-{number}.faiss", mapped=True))
            for number, start in enumerate(self._starts[:-1])
        ]


@dataclass(frozen=True)
class Indexes:
    """The indexes under one folder."""

    root: Path
    depot: Depot = LOCAL

    def get(self, views: Sequence[Rows], weights: Sequence[float]) -> Index | None:
        """The index of a pool, if it has one; nothing of the pool's is read."""
        folder = self.root / _id(views, weights)
        return Index(folder) if self.depot.ensure(folder) else None

    def build(self, pool: Pool, asked: NDArray[np.floating], *, on_rows: Callable[[int], None] | None = None) -> Index:
        """Make the index of a pool, from the one that begins it where there is one, and measure it.

        `asked` are questions (n, checkpoints, dim) to measure it with, beside rows of the pool. `on_rows` hears how
        many rows are done. What it holds beside the pool's own masks does not grow with the rows: a sample and the
        directions, a block of rows at every checkpoint, the rows of a part (twice for a moment, as it grows), and the
        first `RECALL_AT` rows at both ends for each question and probe. Raises `NotEnoughSpace` and `Damaged`.
        """
        final = self.root / _id(pool.views, pool.weights)
        with unfinished(self.root / "unfinished", final.name) as partial:
            build = _Build(partial, pool, self._beginning(pool))
            build.run(asked[:PROBES], on_rows)
            self.depot.keep(partial, final, of=segments_of(_pieces(pool.views)))
            self.depot.ensure(final)  # where another was faster, its own
        log.info("index built", extra={"index": final.name, "rows": pool.rows})
        return Index(final)

    def delete(self, segment: str) -> int:
        """Remove the indexes that hold rows of a segment; returns how many there were."""
        users = self.depot.users(self.root, "index_*", segment)
        if users is None:
            users = [folder.name for folder, found in self._manifests() if segment in segments_of(found["pieces"])]
        for user in users:
            self.depot.delete(self.root / user)
            evict(self.root / user)
        return len(users)

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return sweep(self.root / "unfinished", older_than=older_than)

    def _beginning(self, pool: Pool) -> Path | None:
        """The largest index whose rows begin the pool's."""
        pieces, weights = _pieces(pool.views), list(pool.weights)
        found = [
            (len(manifest["pieces"]), folder)
            for folder, manifest in self._manifests()
            if manifest["weights"] == weights
            and manifest["version"] == INDEX_VERSION
            and manifest["pieces"] == pieces[: len(manifest["pieces"])]
        ]
        return max(found)[1] if found and self.depot.ensure(max(found)[1]) else None

    def _manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for name in sorted(self.depot.names(self.root, "index_*")):
            manifest = self.depot.read(self.root / name, "manifest.json")
            if manifest is not None:  # else deleted at this moment
                yield self.root / name, json.loads(manifest)


class _Build:
    """An index on its way: what rows are projected to, the parts that exist, and what it is measured with."""

    def __init__(self, folder: Path, pool: Pool, beginning: Path | None) -> None:
        self._folder = folder
        self._pool = pool
        self._ranges: list[tuple[int, int]] = []
        """Rows of each part that exists."""
        self._open: Any | None = None
        """The part that rows are added to."""
        self._kept: dict[str, Any] | None = None
        """What was measured of the beginning, where it holds for the whole."""
        if beginning is None:
            self._projection, sample = _fitted(pool)
            np.save(folder / "projection.npy", self._projection, allow_pickle=False)
            _write_empty(folder / "empty.faiss", sample)
        else:
            self._take_over(beginning)
        self._parts = _parts(self._projection, pool)

    def run(self, asked: NDArray[np.floating], on_rows: Callable[[int], None] | None) -> None:
        """Write the parts that are missing, and the manifest with what was measured."""
        pool = self._pool
        probes, places = _probes(pool, asked) if self._kept is None else (asked[:0], np.zeros(0, np.int64))
        first, truth = self._rows, Truth(places)
        segments_end = {stop for _, stop in ranges(pool.views)}
        for start, stop, begins in blocks(pool):
            if start < first and not len(probes):
                continue
            rows = [directions(view, start, stop, check=begins) for view in pool.views]
            truth.add(start, _scores(probes, rows, pool.weights), pool.wanted[start:stop])
            if start >= first:
                self._add(self._reduced(rows), last=stop in segments_end)
            if on_rows is not None:
                on_rows(stop)
        self._finish(probes, truth)

    @property
    def _rows(self) -> int:
        """Rows that have a part."""
        return self._ranges[-1][1] if self._ranges else 0

    def _add(self, reduced: Floats, *, last: bool) -> None:
        """Add rows to the open part, and write it where they fill it or are the `last` of their segments."""
        if self._open is None:
            self._open = _read(self._folder / "empty.faiss")
        self._open.add(reduced)
        if last or self._open.ntotal >= PART_ROWS:
            _write(self._open, self._folder / f"part-{len(self._ranges)}.faiss")
            self._ranges.append((self._rows, self._rows + self._open.ntotal))
            self._open = None

    def _reduced(self, rows: Sequence[Floats]) -> Floats:
        """Rows of all checkpoints as the index stores them (n, reduced)."""
        products = [
            np.float32(np.sqrt(weight)) * (own @ part)
            for own, part, weight in zip(rows, self._parts, self._pool.weights, strict=True)
        ]
        return np.asarray(np.sum(products, axis=0) - self._projection[0], np.float32)

    def _take_over(self, beginning: Path) -> None:
        manifest = json.loads((beginning / "manifest.json").read_bytes())
        self._ranges = [(start, stop) for start, stop in manifest["ranges"]]
        parts = (f"part-{number}.faiss" for number in range(len(self._ranges)))
        for name in ("projection.npy", "empty.faiss", *parts):
            os.link(beginning / name, self._folder / name)
        self._projection = np.load(self._folder / "projection.npy", allow_pickle=False)
        if self._pool.rows <= GROWTH * manifest["measured_rows"]:
            self._kept = {"measured": manifest["measured"], "measured_rows": manifest["measured_rows"]}

    def _finish(self, probes: NDArray[np.floating], truth: Truth) -> None:
        content: dict[str, Any] = {
            "version": INDEX_VERSION,
            "pieces": _pieces(self._pool.views),
            "ranges": self._ranges,  # of the parts, of which a piece may have several
            "weights": list(self._pool.weights),
            "measured": {"recall": 0.0, "candidates": CANDIDATES[-1]},
            "measured_rows": self._pool.rows,
        }
        np.save(self._folder / "valid.npy", self._pool.wanted, allow_pickle=False)
        manifest = self._folder / "manifest.json"
        manifest.write_text(json.dumps(content))  # for the index to be opened and measured
        found = self._kept or {"measured": vars(_measure(Index(self._folder), self._pool, probes, truth))}
        manifest.unlink()
        write_file(manifest, json.dumps(content | found, indent=1).encode())


# What is measured -------------------------------------------------------------------------------------------------


class Truth:
    """The rows with the highest and the lowest scores for each of m probes, of the rows that were added so far."""

    def __init__(self, places: Places) -> None:
        self.places = places
        """Which row of the pool a probe is, -1 for one that is none (m,)."""
        self.rows = np.full((2, len(places), RECALL_AT), -1, np.int64)
        """The first rows at the high and at the low end, -1 where there are no more; of equal ones the lower first."""
        self._values = np.full(self.rows.shape, np.inf, np.float32)
        """Their scores, the high end's negated: the least comes first."""

    def add(self, start: int, scores: Floats, wanted: Mask) -> None:
        """See the rows from `start` on, which follow all that were added: their scores (m, n), which are wanted (n,).

        A probe that is one of them is not among its own first.
        """
        for end, sign in enumerate((-1, 1)):
            values = np.where(wanted, sign * scores, np.inf)
            own = np.flatnonzero((self.places >= start) & (self.places < start + len(wanted)))
            values[own, self.places[own] - start] = np.inf
            self._merge(end, start, values)

    def _merge(self, end: int, start: int, values: Floats) -> None:
        better = np.flatnonzero((values < self._values[end, :, -1:]).any(axis=0))
        if not len(better):
            return
        joined = np.concatenate([self._values[end], values[:, better]], axis=1)
        added = np.broadcast_to(start + better, (len(values), len(better)))
        rows = np.concatenate([self.rows[end], added], axis=1)
        best = np.argsort(joined, axis=1, kind="stable")[:, :RECALL_AT]
        self._values[end] = np.take_along_axis(joined, best, axis=1)
        self.rows[end] = np.where(np.isinf(self._values[end]), -1, np.take_along_axis(rows, best, axis=1))


def _probes(pool: Pool, asked: NDArray[np.floating]) -> tuple[NDArray[np.floating], Places]:
    """Vectors that the index is measured with (m, checkpoints, dim), and which row of the pool each is, -1 for none."""
    rows = drawn_rows(pool.wanted, PROBES, np.random.default_rng(1))
    own = np.stack([normalise(view.take(rows)) for view in pool.views], axis=1)
    places = np.concatenate([np.full(len(asked), -1, np.int64), rows])
    return np.concatenate([asked, own]).astype(np.float32), places


def _measure(index: Index, pool: Pool, probes: NDArray[np.floating], truth: Truth) -> MeasuredRecall:
    """The smallest number of candidates that finds enough of what is first for the probes, else the largest."""
    reduced = index.reduce(pool, probes)
    found = MeasuredRecall(0.0, CANDIDATES[-1])
    for number in CANDIDATES:
        recalls: dict[tuple[bool, int], list[float]] = {}
        for probe, question in enumerate(reduced):
            candidates = index.candidates(question, pool, number + 1)  # the probe itself is not to be found
            for end, rows in enumerate(truth.rows[:, probe]):
                share = np.isin(rows[rows >= 0], candidates).mean()
                recalls.setdefault((bool(truth.places[probe] < 0), end), []).append(float(share))
        found = MeasuredRecall(min(float(np.mean(each)) for each in recalls.values()), number)
        if found.recall >= WANTED_RECALL:
            break
    return found


def _scores(probes: NDArray[np.floating], rows: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Influence of rows (checkpoints, n, dim) on probes (m, checkpoints, dim): (m, n)."""
    found = np.zeros((len(probes), len(rows[0])), np.float32)
    for number, (own, weight) in enumerate(zip(rows, weights, strict=True)):
        found += (probes[:, number] * np.float32(weight)) @ own.T
    return found


# What rows are projected to ---------------------------------------------------------------------------------------


def _fitted(pool: Pool) -> tuple[Floats, Floats]:
    """The projection of a pool, from a sample of it, and the sample's reduced rows.

    The projected mean (1, reduced), and below it the principal directions of all checkpoints together, (checkpoints ·
    dim, reduced), by subspace iteration from random vectors (Halko, Martinsson and Tropp, 2011, algorithm 4.4).
    """
    rng = np.random.default_rng(0)
    width = len(pool.views) * pool.views[0].dim
    rows = drawn_rows(pool.wanted, min(SAMPLE_ROWS, max(1, SAMPLE_BYTES // (4 * width))), rng)
    sample = np.concatenate(
        [
            np.float32(np.sqrt(weight)) * normalise(view.take(rows))
            for view, weight in zip(pool.views, pool.weights, strict=True)
        ],
        axis=1,
    )
    mean = sample.mean(axis=0)
    sample -= mean
    reduced = min(REDUCED, width, len(rows))
    basis = rng.standard_normal((width, min(reduced + OVERSAMPLED, width)), np.float32)
    for _ in range(POWERS):
        basis, _ = np.linalg.qr(sample.T @ (sample @ basis))
    _, _, axes = np.linalg.svd(sample @ basis, full_matrices=False)
    basis = np.ascontiguousarray(basis @ axes[:reduced].T, np.float32)
    return np.concatenate([(mean @ basis)[None], basis]), sample @ basis


def drawn_rows(wanted: Mask, number: int, rng: np.random.Generator) -> Places:
    """So many rows, or all there are, drawn from those that are wanted (n,); in ascending order.

    The mask is looked at in pieces: the places of all its rows would take eight times its bytes.
    """
    count = int(np.count_nonzero(wanted))
    ranks = np.sort(rng.choice(count, min(number, count), replace=False))
    found, before = [ranks[:0]], 0
    for start in range(0, len(wanted), MASK_ROWS):
        places = np.flatnonzero(wanted[start : start + MASK_ROWS])
        here = ranks[(ranks >= before) & (ranks < before + len(places))]
        found.append(start + places[here - before])
        before += len(places)
    return np.concatenate(found)


def _parts(projection: Floats, pool: Pool) -> list[Floats]:
    """The principal directions of each checkpoint (dim, reduced)."""
    dim = pool.views[0].dim
    return [projection[1 + number * dim : 1 + (number + 1) * dim] for number in range(len(pool.views))]


# What an index is made of -----------------------------------------------------------------------------------------


def _id(views: Sequence[Rows], weights: Sequence[float]) -> str:
    content = {"version": INDEX_VERSION, "pieces": _pieces(views), "weights": list(weights)}
    return content_id("index", content)


def _pieces(views: Sequence[Rows]) -> list[list[list[Any]]]:
    """The segments of each range at each checkpoint, and where in them it lies: as a manifest's JSON has them."""
    return [[list(view.place(*each)) for view in views] for each in ranges(views)]


def segments_of(pieces: list[list[list[Any]]]) -> set[str]:
    """The segments that an index has rows of, by the `pieces` of its manifest."""
    return {name for piece in pieces for name, _, _ in piece}


def _write_empty(path: Path, sample: Floats) -> None:
    """A quantiser that knows the range of each direction, and no rows."""
    faiss = _faiss()
    empty = faiss.IndexScalarQuantizer(sample.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    empty.train(np.ascontiguousarray(sample))
    _write(empty, path)


def _write(index: Any, path: Path) -> None:
    _faiss().write_index(index, str(path))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read(path: Path, *, mapped: bool = False) -> Any:
    faiss = _faiss()
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)


def _faiss() -> Any:
    """FAISS, whose Python side its type hints do not tell of; imported where an index is built or searched."""
    return importlib.import_module("faiss")
