"""Feature sets: which features a request means, which of them exist, and which shards are left to compute.

A feature set is a list of immutable row segments. A dataset that begins with another one refers to the segments that
exist for its prefix, under the same recipe, and only the new rows become shards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any, cast

from gradstore.types import (
    AnyJob,
    Checkpoint,
    Estimate,
    ExcludedRow,
    FeatureDtype,
    FeatureKind,
    FeatureSet,
    GradientsRequest,
    GradientsResult,
    JobKind,
    ProjectionName,
)
from sqlalchemy import Exists, delete, exists, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from datastore import encoders, models, shards
from datastore.catalog import Catalog, utc_now
from datastore.checkpoints import Checkpoints
from datastore.durations import duration
from datastore.encoders import Encoder
from datastore.errors import Conflict, InvalidInput, NotEnoughSpace, NotFound, refusal, several
from datastore.gradients import FeatureStore
from datastore.identity import content_id
from datastore.index import Indexes
from datastore.isolation import POISONED
from datastore.leases import Jobs, NewShard, collection
from datastore.models import Size
from datastore.schema import (
    ChunkRow,
    DatasetRow,
    FeatureSegmentRow,
    FeatureSetRow,
    JobFeatureRow,
    JobRow,
    SegmentRow,
)
from datastore.scores import ScoreCache
from datastore.segments import FeatureView, stored_bytes
from datastore.settings import Settings
from datastore.sizes import free_bytes
from datastore.weights import chosen

PROJECTION_VERSION = 1
"""Version of the projections' random numbers (worker/projection/words.py): features of two versions are never mixed."""
UNPROJECTED: frozenset[FeatureKind] = frozenset({"hidden", "rds", "embedding"})
"""Kinds of features that are no gradients, but made of hidden states: not projected, and as wide as the model."""
OF_A_FORWARD_PASS: frozenset[FeatureKind] = UNPROJECTED | {"output"}
"""Kinds of features that are no gradients of trained weights, and take no backward pass."""
LIKE_WITH_LIKE: frozenset[FeatureKind] = OF_A_FORWARD_PASS | {"logodds"}
"""Kinds of features that are compared with features of their own kind only."""
DENSE: frozenset[ProjectionName] = frozenset({"rademacher", "reference"})
"""Projections that multiply a gradient by a matrix of signs."""
LARGEST_REFERENCE = 1 << 32
"""Signs of a projection of kind `reference` that a worker draws, one after another, before it begins."""
DEFAULT_MAX_LENGTH = 2048  # tokens
USUAL_TOKEN_BUDGET = 8192  # tokens of a batch, padding included, where only the worker will know
MAX_REPORTED = 100  # excluded rows named in a result
KEPT = 4096  # records of feature sets that a process remembers


@dataclass(frozen=True)
class Plan:
    """A gradients request resolved to ids, with what exists and what is left to do."""

    id: str
    owner: str
    """The dataset or task whose rows are meant."""
    is_task: bool
    rows: int
    settings: dict[str, Any]
    """What the worker needs beside the shard."""
    feature_sets: Sequence[PlannedFeatureSet]

    def of_new_rows(self, rows: int) -> Plan:
        """The same for so many rows that nothing is known of."""
        found = [replace(feature, rows=rows, covered=0, exists=False) for feature in self.feature_sets]
        return replace(self, rows=rows, feature_sets=found)

    @property
    def missing_rows(self) -> int:
        """Rows to go through the model with, summed over checkpoints."""
        return sum(stop - start for _, start, stop, _ in self.missing_ranges())

    @property
    def dims(self) -> int:
        """Numbers that a row has in the feature sets of one checkpoint together."""
        return sum(
            feature.dim for feature in self.feature_sets if feature.checkpoint == self.feature_sets[0].checkpoint
        )

    @property
    def missing_bytes(self) -> int:
        """Bytes that the missing rows add to the store."""
        return sum(
            stored_bytes(feature.rows - feature.covered, dim=feature.dim, dtype=feature.dtype, kind=feature.kind)
            for feature in self.feature_sets
            if not feature.exists
        )

    @property
    def reused_rows(self) -> int:
        """Rows of which everything exists, summed over checkpoints."""
        begins = dict.fromkeys((feature.checkpoint for feature in self.feature_sets), self.rows)
        for checkpoint, start, _, _ in self.missing_ranges():
            begins[checkpoint] = min(begins[checkpoint], start)
        return sum(begins.values())

    def missing_ranges(self) -> list[tuple[str, int, int, list[PlannedFeatureSet]]]:
        """(checkpoint, start, stop, feature sets) of every range that one pass over its rows completes."""
        groups: dict[tuple[str, int, int], list[PlannedFeatureSet]] = defaultdict(list)
        for feature in self.feature_sets:
            if not feature.exists:
                groups[feature.checkpoint, feature.covered, feature.shard_rows].append(feature)
        return [(checkpoint, start, self.rows, found) for (checkpoint, start, _), found in groups.items()]


@dataclass(frozen=True)
class PlannedFeatureSet:
    """A feature set of a plan."""

    id: str
    recipe: str
    checkpoint: str
    parameters: dict[str, Any]
    rows: int
    covered: int
    """Rows whose features exist already, from the start on."""
    segments: Sequence[tuple[str, int, int]]
    """(segment, start, stop), in order; the last one is new unless `exists`."""
    shard_rows: int
    exists: bool

    @property
    def dim(self) -> int:
        """Numbers of a row."""
        return int(self.parameters["dim"])

    @property
    def kind(self) -> FeatureKind:
        """What the features are made of."""
        return cast("FeatureKind", self.parameters["kind"])

    @property
    def dtype(self) -> FeatureDtype:
        """Stored type."""
        return cast("FeatureDtype", self.parameters["dtype"])


@dataclass(frozen=True)
class Features:
    """The feature sets of a catalog and the store they lie in."""

    catalog: Catalog
    jobs: Jobs
    store: FeatureStore
    checkpoints: Checkpoints
    scores: ScoreCache
    indexes: Indexes
    settings: Settings
    _described: dict[tuple[str, datetime], FeatureSet] = field(default_factory=dict, init=False, compare=False)

    def start(self, request: GradientsRequest) -> tuple[AnyJob, bool]:
        """Start the job that computes what is missing, or return the one that has; says whether there is work to do.

        Raises `NotFound`, `InvalidInput` and `NotEnoughSpace`.
        """
        plan = self.plan(request)
        free = self.free_bytes()
        if plan.missing_bytes > free:
            raise NotEnoughSpace(needed=plan.missing_bytes, free=free)
        return self.jobs.create(
            id=plan.id,
            kind="gradients",
            request=request.model_dump(mode="json"),
            plan=plan.settings,
            name=request.name,
            uses=[plan.owner, *(feature.checkpoint for feature in plan.feature_sets)],
            before=partial(self.begin, plan),
        )

    def estimate(self, plan: Plan, *, tokens_per_row: float, size: Size | None) -> Estimate:
        """What a plan would cost; `tokens_per_row` and the base model's `size` are the caller's to find out."""
        settings = plan.settings
        batch = max(1, round((settings["token_budget"] or USUAL_TOKEN_BUDGET) / max(tokens_per_row, 1)))
        time = duration(
            self.jobs,
            kind="gradients",
            units=plan.missing_rows,
            done=lambda job: _computed_rows(job, settings),
            operations=None if size is None else self._operations(plan, size, tokens_per_row),
            precision=settings["precision"],
            alone=False,
        )
        return Estimate(
            rows=plan.missing_rows,
            tokens=round(plan.missing_rows * tokens_per_row),
            bytes=plan.missing_bytes,
            free_bytes=self.free_bytes(),
            seconds=time.seconds,
            basis=time.basis,
            memory_bytes=None if size is None else self._memory_bytes(plan, size, examples=batch),
            reused_rows=plan.reused_rows,
        )

    def plan(self, request: GradientsRequest) -> Plan:
        """Resolve a request. Raises `NotFound` and `InvalidInput`."""
        checkpoints = self._checkpoints(request)
        owner, rows = self._owner(request)
        kinds = request.kinds or _default_kinds(request)
        for checkpoint in checkpoints:
            self._check(checkpoint, kinds=kinds, request=request)
        first = checkpoints[0]
        encoder = _encoder(first, request) if "embedding" in kinds else None
        settings: dict[str, Any] = {
            "dataset": owner if request.dataset else None,
            "task": owner if request.task else None,
            "rows": rows,
            "model": first.model,
            "weights": _weights(kinds, request),
            "reduction": request.reduction,
            # a job without gradients has another rate, and tells nothing of those with them
            "projection": None if UNPROJECTED.issuperset(kinds) else request.projection,
            "projection_version": PROJECTION_VERSION,
            "seed": request.seed,
            "dtype": request.dtype,
            "template": None if encoder else request.template or first.template or "tulu",
            "max_length": request.max_length
            or (encoder.max_length if encoder else first.max_length or DEFAULT_MAX_LENGTH),
            "precision": request.precision or first.precision,
            "quantisation": request.quantisation,
        }
        variants = _variants(kinds, request, width=_width(first, kinds, encoder))
        common = {key: settings[key] for key in _IDENTITY}
        wanted = [{**common, **variant, "checkpoint": each.id} for each in checkpoints for variant in variants]
        with self.catalog.reading() as session:
            found = [self.planned(session, owner, rows, parameters) for parameters in wanted]
        # These change no feature beyond rounding: they are recorded, and name nothing.
        name = content_id("grad", {"owner": owner, "sets": [feature.id for feature in found]})
        settings["token_budget"] = request.token_budget
        settings["gradient_checkpointing"] = request.gradient_checkpointing
        settings["attention"] = request.attention
        settings["encoder"] = encoder.plan() if encoder else None
        return Plan(id=name, owner=owner, is_task=bool(request.task), rows=rows, settings=settings, feature_sets=found)

    def get(self, id: str) -> FeatureSet:
        """A feature set by id. Raises `NotFound`."""
        with self.catalog.reading() as session:
            row = session.get(FeatureSetRow, id)
            if row is None:
                raise NotFound("feature set", id, collection="/gradients")
            return described(session, row)

    def complete(self, *, datasets: Sequence[str] = (), tasks: Sequence[str] = ()) -> list[FeatureSet]:
        """The feature sets of these datasets and tasks whose rows are all there."""
        owned = FeatureSetRow.dataset.in_(datasets) | FeatureSetRow.task.in_(tasks)
        query = select(FeatureSetRow).where(owned, ~_incomplete(FeatureSetRow.id))
        with self.catalog.reading() as session:
            rows = session.scalars(query.order_by(FeatureSetRow.created_at, FeatureSetRow.id))
            return [self._described_once(session, row) for row in rows]

    def _described_once(self, session: Session, row: FeatureSetRow) -> FeatureSet:
        """A complete feature set's record, which never changes: its many chunks are counted at the first question."""
        key = row.id, row.created_at
        if key not in self._described:
            if len(self._described) >= KEPT:
                self._described.clear()
            self._described[key] = described(session, row)
        return self._described[key]

    def of_job(self, job: AnyJob, feature_set: str | None, *, path: str) -> FeatureSet:
        """A feature set of a finished job (`Jobs.of_features`), by its id or as the only one there is.

        `path` is where the alternatives are asked for. Raises `NotFound`, `Ambiguous` and, before all rows are there,
        `Conflict`.
        """
        known = self.all_of_job(job)
        if feature_set is not None and feature_set not in known:
            raise NotFound("feature set of this job", feature_set, collection=f"{collection(job.kind)}/{job.id}")
        if feature_set is None and len(known) > 1:
            raise several(f"{job.id} has {len(known)} feature sets", known, parameter="feature_set", path=path)
        return self.get(feature_set or known[0])

    def all_of_job(self, job: AnyJob) -> list[str]:
        """The ids of a finished job's feature sets. Raises `Conflict` before all rows are there."""
        if job.status != "succeeded":
            raise Conflict(f"{job.id} is {job.status}: its rows can be read once it has succeeded")
        query = select(JobFeatureRow.feature_set_id).where(JobFeatureRow.job_id == job.id)
        with self.catalog.reading() as session:
            return list(session.scalars(query.order_by(JobFeatureRow.position)))

    def view(self, feature_set: FeatureSet) -> FeatureView:
        """The rows of a feature set."""
        return self.store.view(self.segments(feature_set.id))

    def views(self, feature_sets: Sequence[str]) -> list[FeatureView]:
        """The rows of several feature sets (ids), which share theirs. Raises `Conflict` where one has been deleted."""
        segments = [self.segments(id) for id in feature_sets]
        if not all(segments):
            raise Conflict(
                "features have been deleted since this was asked: POST /gradients computes them again, then ask, or "
                "retry the job, again"
            )
        return [self.store.view(own) for own in segments]

    def segments(self, feature_set: str) -> list[str]:
        """The segments of a feature set, in order of rows."""
        with self.catalog.reading() as session:
            return [segment for segment, _, _ in _segments(session, feature_set)]

    def result(self, session: Session, job: JobRow) -> dict[str, Any]:
        """The result of a gradients job whose shards are all done."""
        rows = _of_job(session, job)
        excluded = excluded_rows(session, rows)
        computed = job.done - job.plan["reused"]
        tokens = sum(_tokens(session, row.id) for row in _one_per_checkpoint(rows))
        seconds = ((job.finished_at or utc_now()) - (job.started_at or utc_now())).total_seconds()
        return GradientsResult(
            feature_sets=[described(session, row) for row in rows],
            rows=job.plan["rows"],
            computed_rows=computed,
            excluded=sorted(excluded, key=lambda row: row.reason != POISONED)[:MAX_REPORTED],
            total_excluded=len(excluded),
            tokens=tokens,
            token_budget=job.plan["token_budget"],
            seconds=seconds,
        ).model_dump(mode="json")

    def of_result(self, session: Session, job: JobRow) -> list[FeatureSet]:
        """The feature sets that a job answers with, inside its transaction."""
        return [described(session, row) for row in _of_job(session, job)]

    def tokens(self, feature_set: str, start: int, stop: int) -> int:
        """Tokens of the chunks of a feature set that begin in rows `start:stop`."""
        with self.catalog.reading() as session:
            return sum(
                chunk.tokens for base, chunk in _chunks(session, feature_set) if start <= base + chunk.start < stop
            )

    def remove(self, reference: str, *, kind: JobKind = "gradients") -> str:
        """Delete a job that features come from, and every feature that no other job answers with; returns its id."""
        orphans: list[str] = []

        def delete_features(session: Session, job: JobRow) -> None:
            orphans.extend(_orphan(session, job))
            for segment in orphans:  # before others can ask for the same features again
                self.store.delete(segment)

        id = self.jobs.remove(reference, kind=kind, before=delete_features)
        for segment in orphans:
            self.scores.delete(segment)
            self.indexes.delete(segment)
        return id

    def _checkpoints(self, request: GradientsRequest) -> list[Checkpoint]:
        if request.run is not None:
            return self.catalog.run(request.run).checkpoints
        found = [self.catalog.checkpoint(reference) for reference in request.checkpoints or []]
        if len({checkpoint.id for checkpoint in found}) < len(found):
            raise refusal("a checkpoint is named twice", pointer="/checkpoints")
        if len({(checkpoint.model, checkpoint.revision) for checkpoint in found}) > 1:
            raise InvalidInput("the checkpoints have different base models: send one request for each model")
        return found

    def _check(self, checkpoint: Checkpoint, *, kinds: Sequence[FeatureKind], request: GradientsRequest) -> None:
        """Refuse what cannot be computed at a checkpoint. Raises `InvalidInput`."""
        if checkpoint.method == "mixture":
            raise refusal(
                f"{checkpoint.id} is a mixture of LoRA experts, of which there are no features: which experts a token "
                "goes to, and with what weight, changes with what is trained. Take features at the base model or at a "
                "plain adapter",
                pointer="/checkpoints",
            )
        if checkpoint.method == "lora" and request.weights:
            raise refusal(
                f"{checkpoint.id} is a LoRA adapter, whose gradients are those of its own matrices: leave weights out, "
                "or name checkpoints without an adapter",
                pointer="/weights",
            )
        if "embedding" in kinds and checkpoint.method != "none":
            raise refusal(
                f"{checkpoint.id} is a training's: embeddings are of an encoder as it is, for example the one "
                'that POST /checkpoints {"model": "sentence-transformers/all-MiniLM-L6-v2"} registers',
                pointer="/checkpoints",
            )
        if not _has_gradients(kinds):
            return
        if checkpoint.method != "lora" and not request.weights:
            of_encoder = ', or, of a sentence encoder, ask for kinds=["embedding"]'
            raise refusal(
                f"{checkpoint.id} has no adapter: say which of the model's weights the gradients are of, for example "
                'weights=["*.q_proj.weight", "*.v_proj.weight"]' + (of_encoder if checkpoint.method == "none" else ""),
                pointer="/weights",
            )
        if "adam" in kinds and not checkpoint.has_moments:
            register = ", or register the checkpoint with its optimizer state" if checkpoint.method == "lora" else ""
            raise refusal(
                f"{checkpoint.id} has no Adam moments ({checkpoint.moments_note or 'none were given'}): "
                f"ask for kinds sgd or sign{register}",
                pointer="/kinds",
            )
        size = self._gradient_size(checkpoint, request)
        if request.projection == "none" and size is not None and request.dims != [size]:
            raise refusal(f"projection=none stores the gradient itself: send dims=[{size}]", pointer="/dims")
        if request.projection == "reference" and size is not None and size * sum(request.dims) > LARGEST_REFERENCE:
            raise refusal(
                f"projection=reference draws {size:,} signs for each dim, one after another: ask for dims of at most "
                f"{LARGEST_REFERENCE // size:,} together, or for projection=rademacher, which has no such bound",
                pointer="/dims",
            )

    def _gradient_size(self, checkpoint: Checkpoint, request: GradientsRequest) -> int | None:
        """Numbers of a gradient; None where only the worker, which has the model, will know which weights are meant."""
        if request.weights is None:
            return checkpoint.parameters
        if not checkpoint.has_moments:
            return None
        trained = self.checkpoints.trained(checkpoint.id)
        return sum(trained[name] for name in chosen(request.weights, trained))

    def _owner(self, request: GradientsRequest) -> tuple[str, int]:
        if request.dataset is not None:
            dataset = self.catalog.dataset(request.dataset)
            return dataset.id, dataset.rows
        task = self.catalog.task(request.task or "")
        if not task.validation:
            raise InvalidInput(f"the task {task.name} has no validation rows: upload it again with some")
        return task.id, task.validation

    def begin(self, plan: Plan, session: Session, job: JobRow) -> list[NewShard]:
        """Record a new job's feature sets and return its shards; where other requests have started or deleted some of
        the features since the plan was made, those that are missing now.
        """
        sets = [self.planned(session, plan.owner, plan.rows, feature.parameters) for feature in plan.feature_sets]
        plan = replace(plan, feature_sets=sets)
        missing = _shards(session, plan)
        segments = sorted({segment for feature in sets for segment, _, _ in feature.segments})
        reused = sum(shard.units for shard in missing if shard.finished)
        job.plan = {**job.plan, "segments": segments, "reused": reused}
        record(session, plan)
        return missing

    def planned(self, session: Session, owner: str, rows: int, parameters: dict[str, Any]) -> PlannedFeatureSet:
        """The feature set with these parameters: which of its rows exist, and the segment that the others go to."""
        checkpoint = parameters["checkpoint"]
        recipe = content_id("recipe", parameters)
        id = content_id("feat", {"recipe": recipe, "owner": owner})
        stored = _segments(session, id)
        if stored:
            # Known, though perhaps not yet complete: its last segment is the one that this owner's rows added.
            last, start, _ = stored[-1]
            row = session.get_one(SegmentRow, last)
            return PlannedFeatureSet(
                id=id, recipe=recipe, checkpoint=checkpoint, parameters=parameters, rows=rows,
                covered=start, segments=stored, shard_rows=row.shard_rows, exists=_is_complete(session, id),
            )  # fmt: skip
        prefix = _prefix_segments(session, owner, recipe)
        covered = prefix[-1][2] if prefix else 0
        new = (content_id("seg", {"recipe": recipe, "owner": owner, "start": covered}), covered, rows)
        return PlannedFeatureSet(
            id=id, recipe=recipe, checkpoint=checkpoint, parameters=parameters, rows=rows,
            covered=covered, segments=[*prefix, new], shard_rows=self.settings.shard_rows, exists=False,
        )  # fmt: skip

    def _operations(self, plan: Plan, size: Size, tokens_per_row: float) -> float:
        """Floating-point operations of a plan: its rows' passes through the model, and projections that multiply."""
        checkpoint = self.catalog.checkpoint(plan.feature_sets[0].checkpoint)
        adapter = checkpoint.parameters if checkpoint.method == "lora" else 0
        weights = size.chosen_parameters(plan.settings["weights"] or ())
        checkpointing = plan.settings["gradient_checkpointing"]
        total = 0.0
        for _, start, stop, features in plan.missing_ranges():
            dims: dict[tuple[Any, ...], int] = defaultdict(int)  # the largest of a kind has the others in it
            for feature in features:
                if feature.kind not in OF_A_FORWARD_PASS:
                    kind = feature.kind, feature.parameters["adam"]
                    dims[kind] = max(dims[kind], feature.dim)
            by_token = (
                size.operations(adapter, checkpointing=checkpointing) + 2 * weights
                if dims
                else size.forward_operations(adapter)
            )
            dense = 2 * (adapter + weights) * sum(dims.values()) if plan.settings["projection"] in DENSE else 0
            total += (stop - start) * (tokens_per_row * by_token + dense)
        return total

    def _memory_bytes(self, plan: Plan, size: Size, *, examples: int) -> int:
        """Bytes that a worker needs: the model twice over, the features of a batch, and Adam's two numbers a weight."""
        settings = plan.settings
        model = size.stored_bytes(settings["quantisation"] or settings["precision"])
        forms = {feature.parameters["adam"] for feature in plan.feature_sets} - {None}
        moments = 8 * len(forms) * size.chosen_parameters(settings["weights"] or ())
        return model * 2 + examples * plan.dims * 4 + moments

    def free_bytes(self) -> int:
        """Bytes that the store can still take."""
        return free_bytes(self.settings)


_IDENTITY = ("dtype", "template", "max_length", "precision", "quantisation")
"""What every feature depends on, beside its row and its checkpoint."""


def _variants(kinds: Sequence[FeatureKind], request: GradientsRequest, *, width: int) -> list[dict[str, Any]]:
    """What tells a checkpoint's feature sets apart: their kind, dim and what else features of their kind depend on.

    `width` is that of features which are not projected. What a kind does without is None, so that it is the same
    however it was asked for.
    """
    projected = {
        "weights": _weights(kinds, request),
        "reduction": request.reduction,
        "projection": request.projection,
        "projection_version": PROJECTION_VERSION,
        "seed": request.seed,
    }
    found: list[dict[str, Any]] = []
    for kind in kinds:
        if kind in UNPROJECTED:
            found.append({"kind": kind, "adam": None, **dict.fromkeys(projected), "dim": width})
            continue
        own: dict[str, Any] = {"logodds_form": request.logodds_form} if kind == "logodds" else {}
        if kind == "output":  # of another matrix than the weights
            own = {"weights": None}
        forms = ("less", "exact") if request.adam == "both" else (request.adam,)
        for form in forms if kind == "adam" else (None,):
            found += [{"kind": kind, "adam": form, **projected, **own, "dim": dim} for dim in request.dims]
    return found


def _default_kinds(request: GradientsRequest) -> list[FeatureKind]:
    return ["sgd"] if request.task else ["adam"]


def _has_gradients(kinds: Sequence[FeatureKind]) -> bool:
    return not OF_A_FORWARD_PASS.issuperset(kinds)


def _weights(kinds: Sequence[FeatureKind], request: GradientsRequest) -> list[str] | None:
    """The patterns of the weights whose gradients are computed."""
    return list(request.weights) if request.weights and _has_gradients(kinds) else None


def _encoder(checkpoint: Checkpoint, request: GradientsRequest) -> Encoder:
    """The encoder that a checkpoint is. Raises `InvalidInput` where it is none, or takes fewer tokens than wanted."""
    found = encoders.described(checkpoint.model, checkpoint.revision)
    if request.max_length and request.max_length > found.max_length:
        raise refusal(f"{checkpoint.model} takes {found.max_length:,} tokens of a text", pointer="/max_length")
    return found


def _width(checkpoint: Checkpoint, kinds: Sequence[FeatureKind], encoder: Encoder | None) -> int:
    """The dim of features that are not projected. Raises `InvalidInput` where it is not known here."""
    if encoder is not None:
        return encoder.dim
    if UNPROJECTED.isdisjoint(kinds):
        return 0
    found = models.hidden_size(checkpoint.model, checkpoint.revision)
    if found is None:
        raise refusal(
            f"the width of {checkpoint.model}'s hidden states is not known: it stands in the config.json, which "
            "is neither on the service's machine nor on the hub; put the model there, or ask for other kinds",
            pointer="/kinds",
        )
    return found


def _computed_rows(job: JobRow, settings: dict[str, Any]) -> float:
    """Rows that a finished job computed, 0 where its model, weights or projection were others."""
    like = all(job.plan[key] == settings[key] for key in ("model", "weights", "projection"))
    return float((job.result or {}).get("computed_rows", 0)) if like else 0.0


def record(session: Session, plan: Plan) -> None:
    """Record a plan's feature sets and segments, as far as they are new, and that its job answers with them."""
    for position, feature in enumerate(plan.feature_sets):
        if session.get(FeatureSetRow, feature.id) is None:
            session.add(
                FeatureSetRow(
                    id=feature.id,
                    dataset=None if plan.is_task else plan.owner,
                    task=plan.owner if plan.is_task else None,
                    checkpoint=feature.checkpoint,
                    recipe=feature.recipe,
                    parameters=feature.parameters,
                    rows=feature.rows,
                    created_at=utc_now(),
                )
            )
            session.flush()
            for segment, start, stop in feature.segments:
                if session.get(SegmentRow, segment) is None:
                    session.add(
                        SegmentRow(
                            id=segment,
                            rows=stop - start,
                            dim=feature.dim,
                            dtype=feature.dtype,
                            shard_rows=feature.shard_rows,
                            complete=False,
                        )
                    )
                    session.flush()
                session.add(FeatureSegmentRow(feature_set_id=feature.id, start=start, stop=stop, segment_id=segment))
        session.add(JobFeatureRow(job_id=plan.id, position=position, feature_set_id=feature.id))
    session.flush()


def _shards(session: Session, plan: Plan) -> list[NewShard]:
    """The plan's shards; those whose chunks exist already, left by an earlier job, are finished."""
    found = []
    for checkpoint, start, stop, features in plan.missing_ranges():
        outputs = [output_of(feature) for feature in features]
        for shard in shards.plan(stop - start, size=features[0].shard_rows):
            done = all(_chunk_exists(session, output["segment"], shard.start) for output in outputs)
            payload = {
                "checkpoint": checkpoint,
                "start": start + shard.start,
                "stop": start + shard.stop,
                "outputs": outputs,
            }
            found.append(NewShard(payload=payload, units=shard.stop - shard.start, finished=done))
    return found


def output_of(feature: PlannedFeatureSet) -> dict[str, Any]:
    """Where a shard's features of a set go, as its payload says it: to the set's last segment."""
    segment, start, stop = feature.segments[-1]
    return {
        "segment": segment,
        "kind": feature.kind,
        "adam": feature.parameters["adam"],
        "logodds_form": feature.parameters.get("logodds_form"),
        "dim": feature.dim,
        "base": start,
        "rows": stop - start,
        "attributes": {**feature.parameters, "feature_set": feature.id, "first_row": start},
    }


def _segments(session: Session, feature_set: str) -> list[tuple[str, int, int]]:
    query = select(FeatureSegmentRow).where(FeatureSegmentRow.feature_set_id == feature_set)
    return [(row.segment_id, row.start, row.stop) for row in session.scalars(query.order_by(FeatureSegmentRow.start))]


def _prefix_segments(session: Session, owner: str, recipe: str) -> list[tuple[str, int, int]]:
    """Segments of the longest stored prefix of a dataset that has this recipe's features."""
    row = session.get(DatasetRow, owner)
    while row is not None and row.prefix is not None:
        candidate = content_id("feat", {"recipe": recipe, "owner": row.prefix})
        if session.get(FeatureSetRow, candidate) is not None and _is_complete(session, candidate):
            return _segments(session, candidate)
        row = session.get(DatasetRow, row.prefix)
    return []


def _is_complete(session: Session, feature_set: str) -> bool:
    return not session.scalar(select(_incomplete(feature_set)))


def _incomplete(feature_set: str | InstrumentedAttribute[str]) -> Exists:
    """Whether a segment of a feature set (an id, or the column of ids) has rows that are not there yet."""
    return exists().where(
        FeatureSegmentRow.feature_set_id == feature_set,
        SegmentRow.id == FeatureSegmentRow.segment_id,
        SegmentRow.complete.is_(False),
    )


def _chunk_exists(session: Session, segment: str, start: int) -> bool:
    return session.get(ChunkRow, (segment, start)) is not None


def _chunks(session: Session, feature_set: str) -> list[tuple[int, ChunkRow]]:
    """(first row of the segment, chunk) of every chunk of a feature set."""
    query = (
        select(FeatureSegmentRow.start, ChunkRow)
        .join(ChunkRow, ChunkRow.segment_id == FeatureSegmentRow.segment_id)
        .where(FeatureSegmentRow.feature_set_id == feature_set)
        .order_by(FeatureSegmentRow.start, ChunkRow.start)
    )
    return [(start, chunk) for start, chunk in session.execute(query)]


def excluded_rows(session: Session, rows: Sequence[FeatureSetRow]) -> list[ExcludedRow]:
    """Every row that a kind of features lacks, once for each reason, in the order of checkpoints and rows."""
    order = {row.checkpoint: position for position, row in enumerate(_one_per_checkpoint(rows))}
    kinds: dict[tuple[int, int, str, str], dict[FeatureKind, None]] = defaultdict(dict)
    for feature in rows:
        for base, chunk in _chunks(session, feature.id):
            for row, reason in chunk.excluded:
                place = order[feature.checkpoint], base + row, feature.checkpoint, reason
                kinds[place][feature.parameters["kind"]] = None
    return [
        ExcludedRow(row=row, checkpoint=checkpoint, kinds=list(found), reason=reason)
        for (_, row, checkpoint, reason), found in sorted(kinds.items(), key=lambda item: item[0])
    ]


def _of_job(session: Session, job: JobRow) -> list[FeatureSetRow]:
    query = (
        select(FeatureSetRow)
        .join(JobFeatureRow, JobFeatureRow.feature_set_id == FeatureSetRow.id)
        .where(JobFeatureRow.job_id == job.id)
        .order_by(JobFeatureRow.position)
    )
    return list(session.scalars(query))


def _one_per_checkpoint(rows: Sequence[FeatureSetRow]) -> list[FeatureSetRow]:
    """The first feature set of each checkpoint: what is the same for all of them."""
    return list({row.checkpoint: row for row in reversed(rows)}.values())[::-1]


def _tokens(session: Session, feature_set: str) -> int:
    return sum(chunk.tokens for _, chunk in _chunks(session, feature_set))


def described(session: Session, row: FeatureSetRow) -> FeatureSet:
    """A feature set's record as it is answered."""
    parameters = row.parameters
    excluded = sum(len(chunk.excluded) for _, chunk in _chunks(session, row.id))
    segments = _segments(session, row.id)
    size = sum(
        stored_bytes(stop - start, dim=parameters["dim"], dtype=parameters["dtype"], kind=parameters["kind"])
        for _, start, stop in segments
    )
    return FeatureSet.model_validate(
        {**parameters, "id": row.id, "dataset": row.dataset, "task": row.task, "rows": row.rows,
         "excluded": excluded, "bytes": size}
    )  # fmt: skip


def _orphan(session: Session, job: JobRow) -> list[str]:
    """Delete the job's feature sets that no other job has, and return the segments that nothing refers to any more."""
    mine = list(session.scalars(select(JobFeatureRow.feature_set_id).where(JobFeatureRow.job_id == job.id)))
    session.execute(delete(JobFeatureRow).where(JobFeatureRow.job_id == job.id))
    kept = set(session.scalars(select(JobFeatureRow.feature_set_id).where(JobFeatureRow.feature_set_id.in_(mine))))
    gone = [id for id in mine if id not in kept]
    segments = set(
        session.scalars(select(FeatureSegmentRow.segment_id).where(FeatureSegmentRow.feature_set_id.in_(gone)))
    )
    session.execute(delete(FeatureSegmentRow).where(FeatureSegmentRow.feature_set_id.in_(gone)))
    session.execute(delete(FeatureSetRow).where(FeatureSetRow.id.in_(gone)))
    segments -= set(
        session.scalars(select(FeatureSegmentRow.segment_id).where(FeatureSegmentRow.segment_id.in_(segments)))
    )
    session.execute(delete(ChunkRow).where(ChunkRow.segment_id.in_(segments)))
    session.execute(delete(SegmentRow).where(SegmentRow.id.in_(segments)))
    return sorted(segments)
