"""An attribution's work: the features of its questions, checkpoint by checkpoint, then the search.

A question's feature is computed as those of a task's rows are, by the same engine and in a batch with the other
questions, and kept at once: a job that is cancelled or lost goes on with the checkpoint that it was at, and the same
question asked about another pool, or with another k, costs no model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from gradstore.types import AttributionRecipe, AttributionRequest, AttributionResult

from datastore.attributions import Answered, question
from datastore.errors import InvalidInput
from datastore.leases import Claim
from datastore.questions import QuestionFeature
from worker import budgets
from worker.context import Context
from worker.engines import kind_of, make_engine, within_memory
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.loaded import Base
from worker.projection import PROJECTION_VERSION
from worker.reading import Rows, read


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Compute what is missing of the questions' features, search the pools, and return the commit of the result."""
    began = time.monotonic()
    request = AttributionRequest.model_validate(claim.request)
    recipe = AttributionRecipe.model_validate(claim.plan["recipe"])
    if recipe.projection_version not in {None, PROJECTION_VERSION}:
        raise InvalidInput(
            f"the pool's features have version {recipe.projection_version} of the projections and this worker has "
            f"version {PROJECTION_VERSION}: bring service and workers to the same version"
        )
    context.ahead.drop()
    answered, computed = _answer(claim, context, heartbeat, request, recipe)
    found = time.monotonic()
    asked = len(request.rows) * len(recipe.checkpoints)
    data, searches = context.attributions.search(
        request, claim.plan, answered, on_rows=lambda done: heartbeat.report(asked + done)
    )
    heartbeat.check()
    result = AttributionResult(
        recipe=recipe,
        data=data,
        searches=searches,
        computed_rows=computed,
        gradient_seconds=found - began,
        seconds=claim.worked + time.monotonic() - began,
    )
    return partial(context.jobs.succeed, claim, result=result.model_dump(mode="json"))


def _answer(
    claim: Claim, context: Context, heartbeat: Heartbeat, request: AttributionRequest, recipe: AttributionRecipe
) -> tuple[list[Answered], int]:
    """The questions' features, kept or computed now, and how many were computed."""
    questions = context.attributions.questions
    keys: list[list[str]] = claim.plan["questions"]
    kept = [[questions.get(key) for key in own] for own in keys]
    reasons: dict[int, str] = {}
    computed = 0
    for number, checkpoint in enumerate(recipe.checkpoints):
        missing = [row for row, own in enumerate(kept) if own[number] is None and row not in reasons]
        if missing:
            found = _compute(context, recipe, checkpoint, [request.rows[row] for row in missing], heartbeat)
            for row, each in zip(missing, found, strict=True):
                if isinstance(each, str):
                    reasons[row] = each
                    continue
                questions.put(keys[row][number], each)
                kept[row][number] = each
                computed += 1
        heartbeat.report((number + 1) * len(keys))
    return [
        Answered([each for each in own if each is not None], reasons.get(row)) for row, own in enumerate(kept)
    ], computed


def _compute(
    context: Context,
    recipe: AttributionRecipe,
    checkpoint_id: str,
    rows: Sequence[dict[str, Any]],
    heartbeat: Heartbeat,
) -> list[QuestionFeature | str]:
    """The rows' features at a checkpoint, or the reasons why they have none."""
    checkpoint = context.catalog.checkpoint(checkpoint_id)
    tokenizer = context.loaded.tokenizer(checkpoint.model, checkpoint.revision)
    encoded = read(
        map(question, rows), tokenizer=tokenizer, template=recipe.template, max_length=recipe.max_length,
        check=heartbeat.check,
    )  # fmt: skip
    found: list[QuestionFeature | str] = [reason or "" for reason in encoded.reasons]
    if encoded.encoded:
        for position, each in zip(
            encoded.positions, _features(context, recipe, checkpoint_id, encoded, int(tokenizer.pad_token_id)),
            strict=True,
        ):  # fmt: skip
            found[position] = each
    return found


def _features(
    context: Context, recipe: AttributionRecipe, checkpoint_id: str, rows: Rows, pad_id: int
) -> list[QuestionFeature | str]:
    checkpoint = context.catalog.checkpoint(checkpoint_id)
    base = Base(
        model=checkpoint.model,
        revision=checkpoint.revision,
        precision=recipe.precision,
        quantisation=recipe.quantisation,
    )
    output = recipe.model_dump(include={"adam", "logodds_form", "dim"}) | {"kind": recipe.query_kind}
    plan = recipe.model_dump(include={"reduction", "projection", "seed", "weights"})
    engine = make_engine(context, base, checkpoint, plan, [output])
    kind = kind_of(output)
    found = within_memory(
        lambda tokens: engine.features(rows.encoded, pad_id=pad_id, token_budget=tokens)[kind],
        budget=budgets.range_of(engine.device).usual,
        least=max(len(row.input_ids) for row in rows.encoded),
        device=engine.device,
    )
    return [
        reason or QuestionFeature(feature, float(loss), int(tokens))
        for feature, loss, tokens, reason in zip(
            found.by_dim[recipe.dim], found.losses, found.tokens, found.reasons, strict=True
        )
    ]
