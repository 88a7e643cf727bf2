"""Conversions: stored features rounded to a narrower dtype, shard by shard, by any worker and without a model.

A conversion only goes down, float32 > float16 > bfloat16 > int8 > int4 > binary: the other way costs bytes and brings
nothing back. Signs are taken from float numbers only, since what int8 or int4 has rounded to 0 has lost its own.

Float32 is what the engine computes, stored as it is, so what is made of it has the same bytes as if it had been
computed with the narrower dtype, and the same id. What has been rounded once before may differ by a step from that:
such sets say so (`converted_from`, a part of their recipe and so of their id), and pool and task must agree in it.
See docs/decisions/conversions-round-once.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from gradstore.types import AnyJob, ConversionRequest, ConversionResult, FeatureDtype, FeatureSet
from sqlalchemy.orm import Session

from datastore.catalog import Catalog, utc_now
from datastore.errors import Conflict, NotEnoughSpace, refusal
from datastore.features import Features, Plan
from datastore.gradients import Block
from datastore.identity import content_id
from datastore.leases import Jobs
from datastore.schema import FeatureSetRow, JobRow
from datastore.segments import Rows

WIDEST_FIRST: Final[tuple[FeatureDtype, ...]] = ("float32", "float16", "bfloat16", "int8", "int4", "binary")
COMPUTED: Final[FeatureDtype] = "float32"
"""What the engine computes: stored like this, a feature has not been rounded."""


@dataclass(frozen=True)
class Conversions:
    """The conversions of a catalog's feature sets."""

    catalog: Catalog
    jobs: Jobs
    features: Features

    def start(self, request: ConversionRequest) -> tuple[AnyJob, bool]:
        """Start the job that converts what is missing, or return the one that has; says whether there is work to do.

        Raises `NotFound`, `InvalidInput`, `Conflict` for features that are still computed, and `NotEnoughSpace`.
        """
        plan = self._plan(request)
        free = self.features.free_bytes()
        if plan.missing_bytes > free:
            raise NotEnoughSpace(needed=plan.missing_bytes, free=free)
        return self.jobs.create(
            id=plan.id,
            kind="conversion",
            request=request.model_dump(mode="json"),
            plan=plan.settings,
            name=request.name,
            uses=[plan.owner, *(feature.checkpoint for feature in plan.feature_sets)],
            before=partial(self.features.begin, plan),
        )

    def source(self, plan: dict[str, Any], output: dict[str, Any]) -> FeatureSet:
        """The feature set that a shard's output is made from. Raises `NotFound`."""
        return self.features.get(plan["sources"][output["attributes"]["feature_set"]])

    def result(self, session: Session, job: JobRow) -> dict[str, Any]:
        """The result of a conversion whose shards are all done."""
        seconds = ((job.finished_at or utc_now()) - (job.started_at or utc_now())).total_seconds()
        return ConversionResult(
            feature_sets=self.features.of_result(session, job),
            rows=job.plan["rows"],
            converted_rows=job.done - job.plan["reused"],
            seconds=seconds,
        ).model_dump(mode="json")

    def _plan(self, request: ConversionRequest) -> Plan:
        sources = self._sources(request)
        owners = {(source.dataset, source.task) for source in sources}
        if len(owners) > 1:
            raise refusal(
                "the feature sets are of several datasets or tasks: send a request for each", pointer="/feature_sets"
            )
        (dataset, task), rows = owners.pop(), sources[0].rows
        owner = dataset or task or ""
        with self.catalog.reading() as session:
            found = [
                self.features.planned(session, owner, rows, _converted(session, source, request.dtype))
                for source in sources
            ]
        ids = [feature.id for feature in found]
        settings = {
            "dataset": dataset,
            "task": task,
            "rows": rows,
            "dtype": request.dtype,
            "sources": dict(zip(ids, (source.id for source in sources), strict=True)),
        }
        name = content_id("conv", {"owner": owner, "sets": ids})
        return Plan(id=name, owner=owner, is_task=task is not None, rows=rows, settings=settings, feature_sets=found)

    def _sources(self, request: ConversionRequest) -> list[FeatureSet]:
        """The feature sets to convert. Raises `InvalidInput` where there is none, or one that must not be."""
        if request.feature_sets is not None or request.gradients is not None:
            ids = request.feature_sets or self.features.all_of_job(self.jobs.of_features(request.gradients or ""))
            named = [self.features.get(id) for id in dict.fromkeys(ids)]
            for source in named:
                _check(source, request.dtype)
                self._check_complete(source)
            return named
        if request.dataset is not None:
            known = self.features.complete(datasets=[self.catalog.dataset(request.dataset).id])
        else:
            known = self.features.complete(tasks=[self.catalog.task(request.task or "").id])
        if request.run is not None:
            members = {checkpoint.id for checkpoint in self.catalog.run(request.run).checkpoints}
            known = [source for source in known if source.checkpoint in members]
        found = _widest([source for source in known if _fault(source, request.dtype) is None])
        if not found:
            wanted = ", ".join(_wider(request.dtype)) or "anything"
            raise refusal(
                f"there are no complete features in a dtype that {request.dtype} can be made of ({wanted}): "
                f"POST /gradients with dtype={request.dtype} computes them",
                pointer="/dataset" if request.dataset is not None else "/task",
            )
        return found

    def _check_complete(self, source: FeatureSet) -> None:
        own = {"datasets": [source.dataset]} if source.dataset else {"tasks": [source.task or ""]}
        if source.id not in {one.id for one in self.features.complete(**own)}:
            raise Conflict(f"the rows of {source.id} are still computed: convert it when its job has succeeded")


def block(view: Rows, start: int, stop: int) -> Block:
    """Rows `start:stop` of stored features as they were handed in, but for their rounding. Raises `Damaged`."""
    rows = slice(start, stop)
    reasons = view.reasons
    return Block(
        features=view.features(start, stop),
        norms=view.norms[rows],
        raw_norms=view.raw_norms[rows],
        losses=view.losses[rows],
        tokens=view.tokens[rows],
        reasons=[reasons.get(row) for row in range(start, stop)],
        logodds=view.logodds[rows] if "logodds" in view.columns else None,
    )


def _converted(session: Session, source: FeatureSet, dtype: FeatureDtype) -> dict[str, Any]:
    """The parameters of a source's conversion."""
    parameters = session.get_one(FeatureSetRow, source.id).parameters
    once_more = {} if source.dtype == COMPUTED else {"converted_from": source.dtype}
    return {**parameters, "dtype": dtype, **once_more}


def _wider(dtype: FeatureDtype) -> list[FeatureDtype]:
    """The dtypes that it can be made of."""
    wider = WIDEST_FIRST[: WIDEST_FIRST.index(dtype)]
    return [each for each in wider if dtype != "binary" or each not in ("int8", "int4")]


def _fault(source: FeatureSet, dtype: FeatureDtype) -> str | None:
    """Why a feature set must not be converted to a dtype, if so."""
    if source.converted_from is not None:
        return (
            f"{source.id} was itself converted from {source.converted_from}, and would be rounded a third time: "
            "convert the features that it was made of"
        )
    if source.dtype not in _wider(dtype):
        return (
            f"{source.id} is stored as {source.dtype}, of which no {dtype} can be made without loss beyond its own: "
            + (f"convert from {', '.join(wider)}, or " if (wider := _wider(dtype)) else "")
            + f"POST /gradients with dtype={dtype}"
        )
    return None


def _check(source: FeatureSet, dtype: FeatureDtype) -> None:
    fault = _fault(source, dtype)
    if fault is not None:
        raise refusal(fault, pointer="/dtype")


def _widest(sources: Sequence[FeatureSet]) -> list[FeatureSet]:
    """Of the sets that differ in their dtype alone, the widest."""
    found: dict[str, FeatureSet] = {}
    for source in sorted(sources, key=lambda each: WIDEST_FIRST.index(each.dtype)):
        same = source.model_dump(mode="json", exclude={"id", "dtype", "bytes", "excluded"})
        found.setdefault(content_id("same", same), source)
    return list(found.values())
