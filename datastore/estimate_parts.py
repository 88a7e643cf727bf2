"""What estimates leave: the arrays of a shard's subsets and the groups of a pool's rows, named by all they depend on.

Estimates that differ only in how groups are compared share the arrays of their subsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from datastore.array_files import Arrays
from datastore.gradex import Members
from datastore.identity import content_id
from datastore.schema import JobRow, ShardRow
from datastore.subset_searches import SEARCHES

PART, KEPT = "part", "checkpoint"
"""What the name of a shard's arrays, and of the checkpoint that its step was kept as, are recorded as in its payload.
"""


def part_key(plan: dict[str, Any], payload: dict[str, Any]) -> str:
    """The name of what a shard finds: the same subsets, however their groups are compared, are estimated once."""
    own = {name: value for name, value in payload.items() if name not in (PART, KEPT)}
    return content_id("part", {"plan": content(plan), "shard": own})


def content(plan: dict[str, Any]) -> dict[str, Any]:
    """What estimates of subsets depend on; only a search depends on how groups are compared."""
    compared = () if plan["search"] in SEARCHES else ("search", "metric")
    found = {name: value for name, value in plan.items() if name not in (*compared, "labels")}
    if "exact" in plan:
        found["exact"] = {name: value for name, value in plan["exact"].items() if name != "keep_adapters"}
    return {**found, "grouping": grouping_key(plan)}


def grouping(plan: dict[str, Any]) -> dict[str, Any]:
    """What the groups of a plan's rows depend on."""
    names = ("version", "dataset", "group_by", "names", "labels", "annotation")
    found = {name: plan[name] for name in names if name in plan}
    return found | ({"feature_set": plan["feature_set"]} if plan["group_by"] == "cluster" else {})


def grouping_key(plan: dict[str, Any]) -> str:
    """The name of the groups of a plan's rows."""
    return content_id("grouping", grouping(plan))


def recorded_arrays(session: Session) -> set[str]:
    """The names of the arrays that estimates have."""
    plans = session.scalars(select(JobRow.plan).where(JobRow.kind == "estimates"))
    return recorded_parts(session) | {grouping_key(plan) for plan in plans}


def recorded_parts(session: Session, *which: ColumnElement[bool]) -> set[str]:
    """The names of the arrays that shards have recorded, which no other worker will find again by itself."""
    payloads = session.scalars(select(ShardRow.payload).where(ShardRow.kind == "estimates", *which))
    return {payload[PART] for payload in payloads if PART in payload}


def members_of(payload: dict[str, Any], groups: int) -> Members:
    """The subsets of a shard (subsets, groups)."""
    if "draw" in payload:
        chosen: list[Sequence[int]] = [
            np.random.default_rng([payload["seed"], number]).choice(groups, payload["size"], replace=False).tolist()
            for number in range(*payload["draw"])
        ]
    else:
        chosen = payload["subsets"]
    found = np.zeros((len(chosen), groups), bool)
    for subset, own in zip(found, chosen, strict=True):
        subset[own] = True
    return found


def unpacked(arrays: Arrays, groups: int) -> Members:
    """Which groups each of the subsets has that arrays are of (subsets, groups)."""
    return np.unpackbits(arrays["members"], axis=1, count=groups).astype(bool)
