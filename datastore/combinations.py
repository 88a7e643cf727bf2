"""How several adapters of the bank are measured as one model: what is combined, and what can be.

Static merges are those of PEFT's `add_weighted_adapter`: one adapter is made of several, and every token gets it. Arrow
(arXiv 2405.11157) makes none: in each layer a token gets the adapters whose ΔW answers most to its direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradstore.types import Adapter, EvaluationRequest

from datastore.errors import refusal

ARROW_TOP_K = 3
"""PEFT's."""
_ELEMENTWISE = frozenset({"linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"})
"""Merges of all A and of all B, number by number."""


def combination_of(request: EvaluationRequest, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What the worker is told of a combination, with nothing left to a default.

    Raises `InvalidInput` where these adapters cannot be combined so.
    """
    how, count = request.combine or "", len(adapters)
    _refuse_unlike(adapters, how)
    if how == "arrow":
        top_k = min(ARROW_TOP_K, count) if request.arrow_top_k is None else request.arrow_top_k
        return {"how": how, "top_k": top_k, "temperature": request.arrow_temperature or 1.0}
    # where signs are elected, what is left of each number is divided by how many adapters it is of
    equal = 1.0 if "ties" in how else 1 / count
    return {
        "how": how,
        "weights": request.merge_weights or [equal] * count,
        "rank": request.merge_rank or max(adapter.rank for adapter in adapters) if how.endswith("svd") else None,
        "density": request.merge_density,
    }


def _refuse_unlike(adapters: Sequence[Adapter], how: str) -> None:
    """Hold the adapters against each other; the first that differs is named beside the first of all."""
    ids = [adapter.id for adapter in adapters]
    for number, id in enumerate(ids):
        if id in ids[:number]:
            raise refusal(f"{id} is named twice: give it a larger weight instead", f"/adapters/{number}")
    _alike(adapters, "base model", lambda each: (each.base_model, each.revision), why="one model is measured")
    if how in _ELEMENTWISE:
        _alike(
            adapters,
            "rank",
            lambda adapter: adapter.rank,
            why=f"combine={how} works on A and B number by number: take cat, or a merge that ends in svd",
        )
    if how == "arrow":
        _alike(adapters, "rank", lambda adapter: adapter.rank, why="combine=arrow stacks the adapters")
        _alike(
            adapters,
            "targets",
            lambda adapter: (adapter.targets, adapter.modules),
            why="combine=arrow chooses among all adapters in every module",
        )


def _alike(adapters: Sequence[Adapter], what: str, value: Callable[[Adapter], Any], *, why: str) -> None:
    first = adapters[0]
    for number, other in enumerate(adapters):
        if value(other) != value(first):
            detail = (
                f"{_shown(other)} and {_shown(first)} differ in {what} ({_said(value(other))}; {_said(value(first))})"
            )
            raise refusal(f"{detail}: {why}", f"/adapters/{number}")


def _shown(adapter: Adapter) -> str:
    return adapter.name or adapter.id


def _said(value: Any) -> str:
    parts = value if isinstance(value, tuple | list) else [value]
    return " ".join(_said(part) if isinstance(part, list) else str(part) for part in parts if part is not None)
