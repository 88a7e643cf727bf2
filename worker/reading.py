"""The rows of a shard as token ids, those of the next shard while this one is computed.

Only reading is done ahead: a shard is claimed when it is its turn, and whose turn it will be is a guess. A wrong guess,
or an error, costs the reading, which is then done at its time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from gradstore.types import TemplateName
from transformers import PreTrainedTokenizerBase

from datastore.rows import Example
from worker.batches import Encoded, Unsupervised, encode

Check = Callable[[], None]


@dataclass(frozen=True)
class Rows:
    """The rows of a shard: those that could be encoded, and why the others could not."""

    encoded: list[Encoded] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Which rows these are, counted from the shard's first."""
    reasons: list[str | None] = field(default_factory=list)
    """(n,) one per row."""


def read(
    examples: Iterable[Example],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    max_length: int,
    check: Check,
) -> Rows:
    """Tokenise a shard's rows; `check` is called before each, and its exception ends the work."""
    rows = Rows()
    for position, example in enumerate(examples):
        check()
        try:
            encoded = encode(example, tokenizer=tokenizer, template=template, max_length=max_length)
        except Unsupervised as error:
            rows.reasons.append(error.reason)
            continue
        rows.encoded.append(encoded)
        rows.positions.append(position)
        rows.reasons.append(None)
    return rows


class Ahead:
    """Reads in a thread what is likely to be needed next. Never beside another user of the tokenizer: take() waits."""

    def __init__(self) -> None:
        self.shard: int | None = None
        """The shard that was read for."""
        self._key: Hashable = None
        self._rows: Rows | None = None
        self._unwanted = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, shard: int, key: Hashable, work: Callable[[Check], Rows]) -> None:
        """Begin to read for a shard; `key` says what `work` reads, whose argument raises when it is not wanted."""
        self.drop()
        self.shard, self._key = shard, key
        self._thread = threading.Thread(target=self._read, args=(work,), name=f"reading-{shard}", daemon=True)
        self._thread.start()

    def take(self, key: Hashable) -> Rows | None:
        """What was read by this key; None where it was something else, or failed. Either way nothing is left."""
        if key != self._key:
            self._unwanted.set()
        if self._thread is not None:
            self._thread.join()
        rows = self._rows if key == self._key else None
        self.shard, self._key, self._rows, self._thread = None, None, None, None
        self._unwanted.clear()
        return rows

    def drop(self) -> None:
        """Have nothing read any more."""
        self.take(None)

    def _read(self, work: Callable[[Check], Rows]) -> None:
        try:
            self._rows = work(self._check)
        except Exception:  # noqa: BLE001 - read again at its time, whatever it is will come up where it can be told
            self._rows = None

    def _check(self) -> None:
        if self._unwanted.is_set():
            raise _Unwanted


class _Unwanted(Exception):
    """What is being read ahead is not wanted any more."""
