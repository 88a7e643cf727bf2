"""Which weights of a model a request means: patterns over the names of its parameters, as shells have for files."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from datastore.errors import refusal

SHOWN = 15  # names in a refusal: the weights of a layer, of which a model has many, count once


def matching(patterns: Sequence[str], names: Collection[str]) -> list[str]:
    """The names that match one of the patterns, in their order.

    >>> matching(["*.q_proj.weight"], ["0.q_proj.weight", "0.k_proj.weight", "1.q_proj.weight"])
    ['0.q_proj.weight', '1.q_proj.weight']
    """
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def chosen(patterns: Sequence[str], names: Collection[str]) -> list[str]:
    """Like `matching`; raises `InvalidInput` naming what there is where a pattern matches nothing."""
    for pattern in patterns:
        if not matching([pattern], names):
            alike = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names))
            shown = ", ".join(alike[:SHOWN]) + (f" and {len(alike) - SHOWN} more" if len(alike) > SHOWN else "")
            detail = (
                f"the model has no parameter {pattern!r}; it has {shown} (a weight that two layers share has the name "
                "of the first one)"
            )
            raise refusal(detail, "/weights")
    return matching(patterns, names)
