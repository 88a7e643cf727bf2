"""Contamination: rows of the pool that share a run of n words with a task's validation or test rows.

Overlap is counted as in GPT-3 (Brown et al., arXiv 2005.14165, appendix C): runs of 13 words, lower-case and without
punctuation (datastore/words.py); Tülu 3 (Lambert et al., arXiv 2411.15124) takes 8. One shared run is an overlap. Of a
task's row with fewer than n words, and at least 8, the whole text is the run; shorter ones can stand in any text: only
a row that says the same and nothing else overlaps with them, and they are counted as unchecked. A run in more than 10
rows of a task is its prompt's template, and no evidence: it is left out, unless that would leave nothing of the task.

Only rows that are chosen, or about to be, are looked at, whatever the size of the pool.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from gradstore.types import Split
from numpy.typing import NDArray

from datastore.durable import replacing, sweep_files, untouched_for, write_file
from datastore.identity import content_id
from datastore.rows import Example
from datastore.selection.words import Hashes, Ngrams, ngrams, ngrams_in, text_of
from datastore.tasks import Tasks
from datastore.words import words

DEFAULT_NGRAM = 13  # words
VERSION = 3
"""Counted up when words or runs are found otherwise."""
_SUFFIX = f"-v{VERSION}.npz"
SHORTEST = 8  # words of a task's row that can be told from chance
TEMPLATE_ROWS = 10  # rows of a task that may share a run before it counts as the prompt's template
WORDS_AT_ONCE = 1 << 15  # words of rows that are looked up together: some 2 MB of runs
_ARRAYS = ("hashes", "owners", "wholes", "whole_owners")
SPLITS: tuple[Split, Split] = ("validation", "test")


@dataclass(frozen=True)
class Overlap:
    """What a row of the pool shares with a task's row."""

    task: str
    split: Split
    row: int
    """Row of the task's split, from 0."""
    text: str
    """The words that both have."""


@dataclass(frozen=True)
class TaskNgrams:
    """The runs of words of a task's rows."""

    task: str
    sizes: tuple[int, ...]
    """Words of a run: n, and the lengths of rows shorter than that."""
    hashes: Hashes
    """Of all runs, sorted, each once (m,)."""
    owners: NDArray[np.int64]
    """The first row with each run (m,): the test rows are counted on behind the validation rows."""
    validation: int
    """Number of validation rows."""
    unchecked: int
    """Rows with fewer than 8 words, which cannot be found in others."""
    wholes: Hashes
    """Of the texts of these that have any words, sorted, each once (w,)."""
    whole_owners: NDArray[np.int64]
    """The first row with each of these texts (w,), counted as `owners`."""

    def overlaps(self, texts: Sequence[Sequence[str]], runs: Mapping[int, Ngrams]) -> dict[int, Overlap]:
        """The first run that each of some texts shares with the task, by the text's number; none of a text without one.

        `texts` are words, and `runs` theirs (`ngrams_in`) of all the task's sizes.
        """
        first = self._same(texts)
        for size in self.sizes:
            for text, place, owner in self._shared(runs[size]):
                first[text] = min(first.get(text, (place, size, owner)), (place, size, owner))
        return {
            text: self._overlap(texts[text][place : place + size], owner)
            for text, (place, size, owner) in first.items()
        }

    def _shared(self, runs: Ngrams) -> Iterator[tuple[int, int, int]]:
        """The first run of each text that the task has: the text, the run's place in it, and the task's row."""
        if not len(self.hashes):
            return
        near = np.minimum(np.searchsorted(self.hashes, runs.hashes), len(self.hashes) - 1)
        shared = np.flatnonzero(self.hashes[near] == runs.hashes)
        texts, first = np.unique(runs.text[shared], return_index=True)
        shared = shared[first]
        yield from zip(texts.tolist(), runs.place[shared].tolist(), self.owners[near[shared]].tolist(), strict=True)

    def _same(self, texts: Sequence[Sequence[str]]) -> dict[int, tuple[int, int, int]]:
        """The short texts that a row of the task has, too, by number: place 0, words, and the task's row."""
        short = [number for number, text in enumerate(texts) if 0 < len(text) < SHORTEST]
        if not short or not len(self.wholes):
            return {}
        hashes = np.concatenate([ngrams(texts[number], len(texts[number])) for number in short])
        near = np.minimum(np.searchsorted(self.wholes, hashes), len(self.wholes) - 1)
        found = np.flatnonzero(self.wholes[near] == hashes).tolist()
        return {short[at]: (0, len(texts[short[at]]), int(self.whole_owners[near[at]])) for at in found}

    def _overlap(self, run: Sequence[str], owner: int) -> Overlap:
        split: Literal[0, 1] = 1 if owner >= self.validation else 0
        return Overlap(self.task, SPLITS[split], owner - split * self.validation, " ".join(run))


@dataclass(frozen=True)
class NgramIndex:
    """The runs of stored tasks, kept under the task's hash, n and the version: `.npz`, never a pickle."""

    tasks: Tasks
    root: Path

    def of(self, task: str, n: int) -> TaskNgrams:
        """The runs of a task. Raises `NotFound`, `Damaged`."""
        path = self.root / f"{runs_prefix(task)}-{n}{_SUFFIX}"
        if not path.exists():
            runs = self._find(task, n)
            _save(path, runs)
            return runs
        with np.load(path, allow_pickle=False) as kept:
            about = json.loads(kept["about"].tobytes())
            sizes = tuple(about.pop("sizes"))
            arrays = {name: kept[name] for name in _ARRAYS}
            return TaskNgrams(task=task, sizes=sizes, **arrays, **about)

    def delete(self, task: str) -> None:
        """Remove all that is kept of a task's runs."""
        for path in self.root.glob(f"{runs_prefix(task)}-*"):
            path.unlink(missing_ok=True)

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished and what other versions kept, untouched for so many seconds;
        returns how many there were.
        """
        others = [path for path in self.root.glob("runs_*") if not path.name.endswith(_SUFFIX)]
        stale = [path for path in others if untouched_for(path) > older_than]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale) + sweep_files(self.root, older_than=older_than)

    def _find(self, task: str, n: int) -> TaskNgrams:
        validation, test = self.tasks.validation(task), self.tasks.test(task)
        return runs_of(task, [row.example for row in (*validation, *test)], n, validation=len(validation))


def runs_of(task: str, examples: Sequence[Example], n: int, *, validation: int) -> TaskNgrams:
    """The runs of a task's rows, the first `validation` of which are its validation rows."""
    texts = [words(text_of(example)) for example in examples]
    sizes = [min(n, len(text)) for text in texts]
    checked = [row for row, size in enumerate(sizes) if size >= min(SHORTEST, n)]
    parts = [np.unique(ngrams(texts[row], sizes[row])) for row in checked]
    owners = np.repeat(np.array(checked, np.int64), [len(part) for part in parts])
    every = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    hashes, first, counts = np.unique(every, return_index=True, return_counts=True)
    short = [row for row, text in enumerate(texts) if 0 < len(text) < min(SHORTEST, n)]
    texts_of_short = [ngrams(texts[row], len(texts[row])) for row in short]
    wholes, first_whole = np.unique(np.concatenate([*texts_of_short, np.empty(0, np.uint64)]), return_index=True)
    telling = counts <= TEMPLATE_ROWS
    if not telling.any():
        telling[:] = True
    return TaskNgrams(
        task=task,
        sizes=tuple(sorted({sizes[row] for row in checked}, reverse=True)),
        hashes=hashes[telling],
        owners=owners[first[telling]],
        validation=validation,
        unchecked=len(examples) - len(checked),
        wholes=wholes,
        whole_owners=np.array(short, np.int64)[first_whole],
    )


class Contamination:
    """Looks rows of a pool up in the runs of tasks, each once."""

    def __init__(self, text: Callable[[int], str], tasks: Sequence[TaskNgrams]) -> None:
        self._text = text
        self.tasks = tasks
        self._sizes = {size for task in tasks for size in task.sizes}
        self._known: dict[int, Overlap | None] = {}

    def of(self, row: int) -> Overlap | None:
        """What a row shares with the first task that it shares something with."""
        return self.of_all([row])[0]

    def of_all(self, rows: Sequence[int]) -> list[Overlap | None]:
        """`of` for each of some rows, which costs less together than one by one."""
        unknown = [row for row in dict.fromkeys(rows) if row not in self._known]
        for some, texts in self._texts(unknown):
            self._known |= self._look(some, texts)
        return [self._known[row] for row in rows]

    def found(self) -> Iterator[tuple[int, Overlap]]:
        """The rows looked at that share something, in the order in which they were."""
        return ((row, overlap) for row, overlap in self._known.items() if overlap is not None)

    def _texts(self, rows: Iterable[int]) -> Iterator[tuple[list[int], list[list[str]]]]:
        """Rows and their words, some `WORDS_AT_ONCE` at a time."""
        some, texts, size = list[int](), list[list[str]](), 0
        for row in rows:
            some.append(row)
            texts.append(words(self._text(row)))
            size += len(texts[-1])
            if size >= WORDS_AT_ONCE:
                yield some, texts
                some, texts, size = [], [], 0
        if some:
            yield some, texts

    def _look(self, rows: Sequence[int], texts: Sequence[Sequence[str]]) -> dict[int, Overlap | None]:
        runs = ngrams_in(texts, self._sizes)
        found: dict[int, Overlap] = {}
        for task in self.tasks:
            found = task.overlaps(texts, runs) | found
        return {row: found.get(number) for number, row in enumerate(rows)}


def runs_prefix(task: str) -> str:
    """What the names of a task's files begin with; a hash, so that no task's name can lead out of the folder."""
    return content_id("runs", {"task": task})


def _save(path: Path, runs: TaskNgrams) -> None:
    buffer = io.BytesIO()
    about = {"sizes": runs.sizes, "validation": runs.validation, "unchecked": runs.unchecked}
    kept = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(buffer, about=kept, **{name: getattr(runs, name) for name in _ARRAYS})
    with replacing(path) as partial:
        write_file(partial, buffer.getvalue())
