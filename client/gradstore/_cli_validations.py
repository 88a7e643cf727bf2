"""The commands of `gradstore validations` that other nouns do not have: create and show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gradstore._cli_output import Columns
from gradstore.types import Interval

SCORES_HELP = (
    "Scores to judge, as kind=adam,dim=1024,precondition=trackstar or as JSON; repeat to compare several on the same "
    "trainings, the first with each of the others. Left out: the only scores that there are."
)
TEXTS = {
    "dataset": "The pool, by id or name.",
    "fraction": "lds: part of the pool in a subset: 0.5 is a half.",
    "k": "leave-top-k-out: how many rows to leave out.",
    "kind": "Correlate predicted and measured losses over random subsets, or train without the best rows.",
    "pct": "leave-top-k-out: part of the pool to leave out: 0.05 is 5 %.",
    "repeats": "Trainings of a subset that differ in their seed; without the best rows, and as many random draws. By "
    "default 1, and 5.",
    "split": "Rows whose losses are measured.",
    "subsets": "lds: models to train, each on a subset of its own.",
    "targets": "lds: what a prediction is for, each row or the mean of a subtask.",
}


def _interval(interval: Interval | None) -> str | None:
    return None if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"


JUDGED: Columns = {
    "scores": lambda row: row.label,
    "value": lambda row: f"{row.value:.3f}",
    "95 %": lambda row: _interval(row.interval),
    "more than the first": lambda row: None if row.difference is None else f"{row.difference:+.3f}",
    "95 % ": lambda row: _interval(row.difference_interval),
}


def read_scores(texts: Sequence[str]) -> list[dict[str, Any]] | None:
    """The scores that are named on the command line; None where none are. Raises `ValueError` for what names none.

    >>> read_scores(["kind=adam,dim=1024"])
    [{'kind': 'adam', 'dim': '1024'}]
    """
    return [_scores(text) for text in texts] or None


def _scores(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--scores {text}: this is no JSON: {error}") from error
        return found
    pairs = [part.partition("=") for part in text.split(",") if part]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--scores {text}: say name=value, not {name!r}")
    return {name.strip().replace("-", "_"): value.strip() for name, _, value in pairs}
