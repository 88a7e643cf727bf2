"""Choosing adapters of the bank for a task, from K of its rows (ROCKET, arXiv 2408.15915, algorithm 1), as a job.

Its shards are a few adapters each, scored together by a worker (worker/kinds/adapter_choices.py) unless they were
scored before (datastore/adapter_scores.py). The worker that does the last one reads the candidates' tensors, ranks and
chooses (datastore/adapter_sets.py, datastore/adapter_similarity.py). Sets are not stored: they follow from ranks and
similarities, which the result has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import comb, inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from gradstore.types import (
    MAX_ADAPTERS,
    Adapter,
    AdapterChoiceEstimate,
    AdapterChoiceRequest,
    AdapterChoiceResult,
    AdapterSet,
    AdapterSets,
    AdapterShot,
    AdapterShots,
    AdaptersWanted,
    AnyJob,
    ChosenAdapter,
    ShotScore,
)
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from datastore import adapter_scores, adapter_sets, assembly, tasks
from datastore.adapter_sets import RankedAdapter, ScoredAdapter
from datastore.adapter_similarity import factors, similarities
from datastore.array_files import ArrayFiles, Arrays
from datastore.catalog import Catalog
from datastore.checkpoints import ADAPTER_WEIGHTS, Checkpoints
from datastore.durations import duration
from datastore.errors import Conflict, Damaged, InvalidInput, refusal
from datastore.evaluations import DEFAULT_MAX_LENGTH
from datastore.identity import content_id, sha256_of
from datastore.leases import Claim, Jobs, NewShard
from datastore.schema import JobRow, ShardRow
from datastore.tasks import TaskExample, Tasks

CHOICES_VERSION = 1
"""Counted up when the same request would choose otherwise."""
MAX_SETS = 20_000
"""C(16, 6) is 8,008, C(16, 8) 12,870: they are ranked anew for each page of them."""
TOGETHER = 4  # adapters of a shard, whose rows share batches
SHARD_SHOTS = 256  # of all adapters of a shard together, where there are several: so much is lost with a worker
PASSES = 2
"""Over each shot: one for the perplexity, and one for the metric."""


@dataclass(frozen=True)
class AdapterChoices:
    """The choices of a catalog."""

    catalog: Catalog
    jobs: Jobs
    tasks: Tasks
    checkpoints: Checkpoints
    scores: ArrayFiles

    # Users' side ------------------------------------------------------------------------------------------------------

    def start(self, request: AdapterChoiceRequest) -> tuple[AnyJob, bool]:
        """Start a choice, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, and `InvalidInput` for adapters that are too few or not of one base model, and for a task
        without a metric.
        """
        plan = self.plan(request)
        each = PASSES * plan["shots"]
        return self.jobs.create(
            id=content_id("choice", plan),
            kind="adapter-choice",
            request=request.model_dump(mode="json"),
            plan=plan,
            shards=[NewShard({"adapters": group}, units=each * len(group)) for group in _groups(plan)],
            name=request.name,
            uses=[plan["task"], *plan["adapters"]],
        )

    def plan(self, request: AdapterChoiceRequest) -> dict[str, Any]:
        """A request resolved to ids. Raises what `start` does."""
        task = self.catalog.task(request.task)
        rows = drawn(self.tasks.validation(task.id), request.shots, seed=request.seed)
        examples = self._shots(task.id, rows)
        _refuse_without_metric(examples, task.name)
        adapters = self._adapters(request)
        candidates = min(request.candidates, len(adapters))
        _refuse_few(request, adapters, candidates)
        if request.similarity == "cosine_ab":
            _refuse_unlike(adapters)
        return {
            "version": CHOICES_VERSION,
            "task": task.id,
            "rows": rows,
            "shots": len(examples),
            "shots_sha256": hashlib.sha256(tasks.lines(examples)).hexdigest(),
            "adapters": sorted(adapter.id for adapter in adapters),
            "model": adapters[0].base_model,
            "revision": adapters[0].revision,
            "candidates": candidates,
            "size": request.size,
            "similarity": request.similarity,
            "template": request.template or _one_template(adapters) or "tulu",
            "max_length": request.max_length or DEFAULT_MAX_LENGTH,
            "max_new_tokens": request.max_new_tokens,
            "precision": request.precision or self._precision(adapters),
        }

    def estimate(self, request: AdapterChoiceRequest) -> AdapterChoiceEstimate:
        """What a request would take. Raises what `start` does."""
        plan = self.plan(request)
        reused = sum(self.scores.exists(adapter_scores.key(plan, id)) for id in plan["adapters"])
        passes = PASSES * plan["shots"] * (len(plan["adapters"]) - reused)
        time = duration(
            self.jobs,
            kind="adapter-choice",
            units=passes,
            done=partial(_passes_done, plan),
            operations=None,
            precision=None,
            alone=True,
        )
        return AdapterChoiceEstimate(
            adapters=len(plan["adapters"]),
            reused_adapters=reused,
            shots=plan["shots"],
            sets=comb(plan["candidates"], plan["size"]),
            passes=passes,
            seconds=time.seconds,
            basis=time.basis,
        )

    def sets(self, reference: str, *, after: int, limit: int) -> AdapterSets:
        """A page of the sets of a finished choice, the best first. Raises `NotFound` and `Conflict`."""
        job, result = self.finished(reference)
        of = {one.adapter: _ranked(one) for one in result.adapters if one.candidate}
        candidates = [of[id] for id in result.candidates]
        size = self.jobs.plan(job.id)["size"]
        found = adapter_sets.sets(candidates, np.array(result.similarities), size=size)
        data = [_set(each) for each in found[after : after + limit]]
        return AdapterSets(data=data, has_more=after + len(data) < len(found))

    def shots(self, reference: str, *, after: int, limit: int) -> AdapterShots:
        """A page of the shots of a finished choice. Raises `NotFound`, `Conflict` and `Damaged`."""
        job, result = self.finished(reference)
        plan = self.jobs.plan(job.id)
        examples = self._shots(plan["task"], plan["rows"])
        rows = range(len(examples)) if plan["rows"] is None else plan["rows"]
        ids = [one.adapter for one in result.adapters]
        scores = [self._kept(plan, id) for id in ids]
        perplexities = [adapter_scores.perplexities(each) for each in scores]
        data = [
            AdapterShot(
                row=rows[number],
                id=examples[number].example.id,
                subtask=examples[number].subtask,
                rationale=examples[number].rationale is not None,
                scores=[
                    ShotScore(adapter=id, perplexity=_number(of[number]), value=_number(each["values"][number]))
                    for id, of, each in zip(ids, perplexities, scores, strict=True)
                ],
            )
            for number in range(after, min(after + limit, len(examples)))
        ]
        return AdapterShots(data=data, has_more=after + len(data) < len(examples))

    def finished(self, reference: str) -> tuple[AnyJob, AdapterChoiceResult]:
        """A choice that has been made, and its result. Raises `NotFound` and `Conflict`."""
        job = self.jobs.get(reference, kind="adapter-choice")
        if job.status != "succeeded" or job.result is None:
            raise Conflict(f"{job.id} is {job.status}: what it chose from can be read once it has succeeded")
        return job, AdapterChoiceResult.model_validate(job.result.model_dump())

    def remove(self, reference: str) -> str:
        """Delete a choice and return its id; the scores stay. Raises `NotFound`, `Conflict` while it is at work."""
        return self.jobs.remove(reference, kind="adapter-choice")

    def _adapters(self, request: AdapterChoiceRequest) -> list[Adapter]:
        """The adapters that are meant, all of one base model."""
        if request.adapters is not None:
            found = [self.catalog.adapter(reference) for reference in request.adapters]
            twice = next((one for number, one in enumerate(found) if one in found[:number]), None)
            if twice is not None:
                raise refusal(f"{twice.name or twice.id} is named twice", "/adapters")
        else:
            asked = request.model_dump(include=set(AdaptersWanted.model_fields))
            dataset = None if request.dataset is None else self.catalog.dataset(request.dataset).id
            found = self.catalog.adapters(limit=MAX_ADAPTERS + 1, **asked | {"dataset": dataset}).data
            if len(found) > MAX_ADAPTERS:
                raise InvalidInput(f"more than {MAX_ADAPTERS} adapters are as is said: say more of them, or name some")
        bases = sorted({(one.base_model, one.revision or "") for one in found})
        if len(bases) > 1:
            (model, revision), (other, its) = bases[:2]
            raise refusal(
                f"the adapters are of {len(bases)} base models, {_base(model, revision)} and {_base(other, its)} among "
                "them, and their perplexities cannot be compared: name one (base_model, revision)",
                "/base_model" if request.adapters is None else "/adapters",
            )
        return found

    def _precision(self, adapters: Sequence[Adapter]) -> str:
        """What the adapters were trained in, where it is one and the same."""
        found = {self.catalog.checkpoint(adapter.checkpoint).precision for adapter in adapters}
        return found.pop() if len(found) == 1 else "float32"

    def _shots(self, task: str, rows: Sequence[int] | None) -> list[TaskExample]:
        examples = self.tasks.validation(task)
        return examples if rows is None else [examples[row] for row in rows]

    # Workers' side ----------------------------------------------------------------------------------------------------

    def examples(self, plan: dict[str, Any]) -> list[TaskExample]:
        """The shots of a choice, in the order of the task's rows. Raises `NotFound`, `Damaged`."""
        return self._shots(plan["task"], plan["rows"])

    def missing(self, claim: Claim) -> dict[str, Path]:
        """The adapters of a shard (ids) that have not been scored so, and their PEFT folders.

        Raises `Damaged` where a folder's tensors are not those with which the adapter came into the bank.
        """
        ids: list[str] = claim.payload["adapters"]
        unknown = [id for id in ids if self.scores.get(adapter_scores.key(claim.plan, id)) is None]
        return {id: self._folder(self.catalog.adapter(id)) for id in unknown}

    def keep(
        self, plan: dict[str, Any], adapter: str, losses: Sequence[float | None], values: Sequence[float | None]
    ) -> None:
        """Keep what an adapter (id) makes of the shots. Raises `InvalidInput` where it is nothing."""
        for what, numbers in (("answer", losses), ("prompt", values)):
            if all(number is None for number in numbers):
                raise InvalidInput(
                    f"no shot has a token of its {what} within max_length={plan['max_length']:,}: ask for a larger one"
                )
        self.scores.put(
            adapter_scores.key(plan, adapter),
            adapter_scores.arrays(losses, values),
            made_from=adapter_scores.content(plan, adapter),
        )

    def finish(self, claim: Claim, scored: int, seconds: float) -> bool:
        """Commit a shard whose adapters are scored, `scored` of them now, and with the last one the job's result; False
        where it is not wanted.
        """
        done = {"scored": scored, "seconds": seconds}
        return assembly.commit(
            self.jobs, claim, record=partial(_record, done), result=partial(self._result, claim, done)
        )

    def _result(self, claim: Claim, done: dict[str, Any]) -> AdapterChoiceResult:
        """What a choice comes to whose adapters are all scored. Raises `Damaged`."""
        plan = claim.plan
        shards = assembly.payloads(self.catalog, claim, **done)
        ranked = adapter_sets.ranked([_scored(id, self._kept(plan, id)) for id in plan["adapters"]])
        candidates = ranked[: plan["candidates"]]
        similarity = self._similarities(plan, [one.name for one in candidates])
        found = adapter_sets.sets(candidates, similarity, size=plan["size"])
        return AdapterChoiceResult(
            chosen=_set(found[0]),
            adapters=[self._described(one, candidates, found[0]) for one in ranked],
            candidates=[one.name for one in candidates],
            similarities=similarity.tolist(),
            sets=len(found),
            shots=plan["shots"],
            shots_sha256=plan["shots_sha256"],
            base_model=plan["model"],
            revision=plan["revision"],
            template=plan["template"],
            max_length=plan["max_length"],
            precision=plan["precision"],
            scored_adapters=sum(shard["scored"] for shard in shards),
            seconds=sum(shard["seconds"] for shard in shards),
        )

    def _described(
        self, one: RankedAdapter, candidates: Sequence[RankedAdapter], chosen: adapter_sets.AdapterSet
    ) -> ChosenAdapter:
        return ChosenAdapter(
            adapter=one.name,
            name=self.catalog.adapter(one.name).name,
            perplexity=_number(one.perplexity),
            accuracy=one.accuracy,
            perplexity_rank=one.perplexity_rank,
            accuracy_rank=one.accuracy_rank,
            candidate=one in candidates,
            chosen=one in chosen.members,
        )

    def _similarities(self, plan: dict[str, Any], ids: Sequence[str]) -> NDArray[np.float64]:
        """How alike adapters (ids) are (m, m)."""
        files = [self._folder(self.catalog.adapter(id)) / ADAPTER_WEIGHTS for id in ids]
        return similarities(factors(files), by=plan["similarity"])

    def _folder(self, adapter: Adapter) -> Path:
        """The PEFT folder of an adapter, its tensors as they came into the bank. Raises `Damaged`."""
        folder = self.checkpoints.weights(adapter.checkpoint)
        try:
            found = sha256_of(folder / ADAPTER_WEIGHTS)
        except FileNotFoundError as error:
            raise _lost(adapter, "is missing") from error
        if found != adapter.sha256:
            raise _lost(adapter, "has changed since it came into the bank")
        return folder

    def _kept(self, plan: dict[str, Any], adapter: str) -> Arrays:
        found = self.scores.get(adapter_scores.key(plan, adapter))
        if found is None:
            raise Damaged(f"the scores of {adapter} were lost: delete the choice and send it again")
        return found


def drawn(examples: Sequence[TaskExample], count: int | None, *, seed: int) -> list[int] | None:
    """The rows of a task that are its shots, in order; None for all of them.

    Of fewer, each subtask has as many as any other, as far as it has so many: the rows are shuffled by numpy's PCG64 of
    this seed, and the first of each subtask, then the second of each, and so on, are taken in the order of the shuffle.
    """
    if count is None or count >= len(examples):
        return None
    turns: dict[str, int] = {}
    order = []
    for place, row in enumerate(np.random.default_rng(seed).permutation(len(examples)).tolist()):
        subtask = examples[row].subtask
        turns[subtask] = turns.get(subtask, -1) + 1
        order.append((turns[subtask], place, row))
    return sorted(row for *_, row in sorted(order)[:count])


def _groups(plan: dict[str, Any]) -> Iterator[list[str]]:
    """The adapters of each shard: as many as fill batches together, and fewer of many shots."""
    size = max(1, min(TOGETHER, SHARD_SHOTS // plan["shots"]))
    ids: list[str] = plan["adapters"]
    yield from (ids[start : start + size] for start in range(0, len(ids), size))


def _record(done: dict[str, Any], _session: Session, shard: ShardRow) -> None:
    shard.payload = {**shard.payload, **done}


def _scored(id: str, scores: Arrays) -> ScoredAdapter:
    perplexities = adapter_scores.perplexities(scores)
    return ScoredAdapter(
        name=id,
        perplexity=float(perplexities[~np.isnan(perplexities)].mean()),
        accuracy=float(np.nanmean(scores["values"])),
    )


def _ranked(one: ChosenAdapter) -> RankedAdapter:
    return RankedAdapter(
        name=one.adapter,
        perplexity=inf if one.perplexity is None else one.perplexity,
        accuracy=one.accuracy,
        perplexity_rank=one.perplexity_rank,
        accuracy_rank=one.accuracy_rank,
    )


def _set(found: adapter_sets.AdapterSet) -> AdapterSet:
    return AdapterSet(
        members=[member.name for member in found.members],
        similarity=found.similarity,
        omega=found.omega,
        diversity_rank=found.diversity_rank,
        total=found.total,
    )


def _number(value: float) -> float | None:
    return float(value) if isfinite(value) else None


def _passes_done(plan: dict[str, Any], job: JobRow) -> float:
    """The passes of a finished choice on the same base model, 0 of one on another."""
    alike = all(job.plan[name] == plan[name] for name in ("model", "revision", "precision"))
    return PASSES * job.plan["shots"] * job.result["scored_adapters"] if job.result and alike else 0.0


def _base(model: str, revision: str) -> str:
    return f"{model} at {revision}" if revision else model


def _lost(adapter: Adapter, what: str) -> Damaged:
    return Damaged(
        f"{ADAPTER_WEIGHTS} of the adapter {adapter.name or adapter.id} ({adapter.checkpoint}) {what}: put it back, or "
        "leave the adapter out"
    )


# What is refused ------------------------------------------------------------------------------------------------------


def _refuse_without_metric(examples: Sequence[TaskExample], task: str) -> None:
    without = sorted({example.subtask for example in examples if example.metric == "none"})
    if without:
        raise refusal(
            f"the validation rows of {task} have no metric (subtask {without[0]}), so nothing says which answers are "
            "right: upload the task with one (choice, exact_match, token_f1)",
            "/task",
        )


def _refuse_few(request: AdapterChoiceRequest, adapters: Sequence[Adapter], candidates: int) -> None:
    if len(adapters) < request.size:
        raise refusal(
            f"{len(adapters)} adapters are as is said, and {request.size} are to be chosen: put more into the bank, "
            "ask for others, or for fewer",
            "/size",
        )
    if comb(candidates, request.size) > MAX_SETS:
        raise refusal(
            f"{candidates} candidates make {comb(candidates, request.size):,} sets of {request.size}, and at most "
            f"{MAX_SETS:,} are compared: ask for fewer candidates",
            "/candidates",
        )


def _refuse_unlike(adapters: Sequence[Adapter]) -> None:
    """Tensors of other shapes have no cosine."""
    for what, values in (
        ("ranks", {str(one.rank) for one in adapters}),
        ("targets", {", ".join(one.targets) for one in adapters}),
    ):
        if len(values) > 1:
            one, other = sorted(values)[:2]
            raise refusal(
                f"the adapters are of different {what} ({one}; {other}), and cosine_ab compares their tensors: ask for "
                "cosine_delta, or for adapters of one kind",
                "/similarity",
            )


def _one_template(adapters: Sequence[Adapter]) -> Any:
    """The chat format that the adapters were trained in, where it is known of any."""
    found = {adapter.template for adapter in adapters if adapter.template is not None}
    if len(found) > 1:
        raise refusal(
            f"the adapters were trained in different chat formats ({', '.join(sorted(found))}): name one", "/template"
        )
    return found.pop() if found else None
