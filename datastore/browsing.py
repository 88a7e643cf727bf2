"""Rows as people look at them: a page of a dataset, filtered by origin and text, and how long its rows are.

Any page is found by its place: the lines' offsets are mapped, so the last rows of a large pool take as long as the
first. A search reads the rows that it passes, and so at most `SEARCHED` of them for one page; an index over the text
would double the disk that a dataset takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from gradstore.types import ExampleRow, ExampleRows, Lengths, OriginLengths, ProblemItem, Turn
from numpy.typing import NDArray

from datastore.datasets import Datasets
from datastore.errors import InvalidInput
from datastore.rows import Example

RowT = TypeVar("RowT")

SEARCHED = 10_000  # rows that one page of a search looks through, half a second


def page(
    datasets: Datasets, dataset: str, *, after: int, limit: int, origin: str | None = None, text: str | None = None
) -> ExampleRows:
    """The first `limit` rows from row `after` on that have this origin and hold this text, in any case of letters.

    Raises `InvalidInput` where the dataset has no such origin.
    """
    rows = _rows_of(datasets, dataset, origin)

    def examples(rows: NDArray[np.int64]) -> Iterator[tuple[int, Example]]:
        return zip(rows.tolist(), datasets.examples_at(dataset, rows.tolist()), strict=True)

    found, following = look_through(rows[np.searchsorted(rows, after) :], examples, limit=limit, text=text)
    data = [ExampleRow(row=row, id=one.id, origin=one.origin, turns=turns(one)) for row, one in found]
    return ExampleRows(dataset=dataset, data=data, has_more=following is not None, next=following)


def look_through(
    places: NDArray[np.int64],
    examples: Callable[[NDArray[np.int64]], Iterator[tuple[RowT, Example]]],
    *,
    limit: int,
    text: str | None,
) -> tuple[list[tuple[RowT, Example]], int | None]:
    """The first `limit` rows that hold a text, or all do where it is None, and the place where the next page begins.

    `places` are those of the rows that are left, (n,) and rising; `examples` reads some of them.
    """
    found: list[tuple[RowT, Example]] = []
    passed = 0
    for row, example in examples(places[: SEARCHED if text else limit]):
        if len(found) == limit:
            break
        passed += 1
        if text is None or holds(example, text):
            found.append((row, example))
    return found, int(places[passed]) if passed < len(places) else None


def turns(example: Example) -> list[Turn]:
    """An example's text in the order in which it is read."""
    if example.messages:
        return [Turn(role=turn.role, prefix=turn.prefix, content=turn.content) for turn in example.messages]
    return [
        Turn(role="prompt", prefix="", content=example.prompt or ""),
        Turn(role="completion", prefix="", content=example.completion or ""),
    ]


def holds(example: Example, text: str) -> bool:
    """Whether one of an example's turns holds this text, whatever the case of its letters."""
    wanted = text.casefold()
    return any(wanted in (turn.prefix + turn.content).casefold() for turn in turns(example))


def lengths(datasets: Datasets, dataset: str, *, bins: int) -> Lengths:
    """Histograms of the rows' lengths, one for each origin, over the same bins."""
    sizes, origins = datasets.sizes(dataset), datasets.origins(dataset)
    edges = ratio_edges(int(sizes.min()), int(sizes.max()), bins=bins)
    found = {}
    for number, name in enumerate(origins.names):
        own = sizes[origins.codes == number]
        found[name] = OriginLengths(
            rows=len(own),
            shortest=int(own.min()),
            median=float(np.median(own)),
            longest=int(own.max()),
            counts=np.histogram(own, edges)[0].tolist(),
        )
    return Lengths(dataset=dataset, edges=edges, origins=found)


def ratio_edges(low: int, high: int, *, bins: int) -> list[int]:
    """At most `bins` + 1 rising whole numbers around `low` to `high`, about equal in ratio; the last is above `high`.

    >>> ratio_edges(10, 159, bins=4)
    [10, 20, 40, 80, 160]
    """
    edges = np.unique(np.round(np.geomspace(max(low, 1), high + 1, bins + 1)).astype(np.int64)).tolist()
    edges[0], edges[-1] = low, high + 1
    return edges if len(edges) > 1 else [low, high + 1]


def _rows_of(datasets: Datasets, dataset: str, origin: str | None) -> NDArray[np.int64]:
    """The rows of one origin, or all, rising."""
    if origin is None:
        return np.arange(len(datasets.sizes(dataset)))
    origins = datasets.origins(dataset)
    return np.flatnonzero(origins.codes == number_of(origin, origins.names))


def number_of(origin: str, names: Sequence[str]) -> int:
    """The number of an origin. Raises `InvalidInput` where there is none of this name."""
    if origin not in names:
        detail = f"no row has the origin {origin!r}; there are {', '.join(map(repr, names[:20]))}"
        raise InvalidInput(detail, errors=[ProblemItem(detail=detail, parameter="origin")])
    return names.index(origin)
