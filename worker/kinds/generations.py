"""The one shard of a generation: prompts answered greedily, and the answers traced through a mixture's routers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from gradstore.types import Generated, GenerationRequest, GenerationResult, PromptMessage
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore.errors import refusal
from datastore.leases import Claim
from datastore.rows import Example, Message
from worker.batches import Unsupervised, encode_prompt
from worker.context import Context
from worker.engines import load, within_memory
from worker.evaluate import LEAST_TOKENS, TOKENS, write
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.loaded import Base
from worker.mixtures.layer import MixtureLinear
from worker.mixtures.traces import Loads, trace

MOST_TRACED = 100_000
"""Choices of experts in a result: some megabytes of JSON."""


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Answer the prompts, and trace the answers where that was asked for."""
    began = time.monotonic()
    context.ahead.drop()
    request, plan = GenerationRequest.model_validate(claim.request), claim.plan
    tokenizer = context.loaded.tokenizer(plan["model"], plan["revision"])
    base = Base(plan["model"], plan["revision"], precision=plan["precision"])
    loaded = load(context, base, context.catalog.checkpoint(plan["checkpoint"]))
    model = cast("PreTrainedModel", loaded.get_base_model()) if isinstance(loaded, PeftModel) else loaded
    if request.trace:
        _refuse_large(model, request)
    prompts = [_prompt(number, each, tokenizer, plan) for number, each in enumerate(request.prompts)]
    answers = within_memory(
        lambda tokens: write(
            model,
            tokenizer,
            prompts,
            max_new_tokens=request.max_new_tokens,
            token_budget=tokens,
            on_rows=heartbeat.report,
        ),
        budget=TOKENS,
        least=LEAST_TOKENS,
        device=context.device,
    )
    loads = Loads()
    data = [
        Generated(
            text=tokenizer.decode(answer, skip_special_tokens=True),
            prompt_tokens=len(prompt),
            tokens=len(answer),
            trace=trace(model, tokenizer, [*prompt, *answer], last=request.trace_tokens, loads=loads)
            if request.trace
            else None,
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    result = GenerationResult(
        checkpoint=plan["checkpoint"],
        data=data,
        loads=loads.layers() if request.trace else None,
        seconds=claim.worked + time.monotonic() - began,
    )
    return partial(context.jobs.succeed, claim, result=result.model_dump(mode="json"))


def _prompt(
    number: int, prompt: str | Sequence[PromptMessage], tokenizer: PreTrainedTokenizerBase, plan: dict[str, Any]
) -> tuple[int, ...]:
    """The tokens that the model goes on from. Raises `InvalidInput` where the template refuses the conversation."""
    said = [PromptMessage(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    turns = [Message(each.role, each.content) for each in said]
    asked = Example(id=None, origin="prompt", messages=(*turns, Message("assistant", "An answer.")))
    try:
        return encode_prompt(asked, tokenizer=tokenizer, template=plan["template"], max_length=plan["max_length"])
    except Unsupervised as error:
        raise refusal(f"the model's template does not take it: {error.reason}", f"/prompts/{number}") from error


def _refuse_large(model: PreTrainedModel, request: GenerationRequest) -> None:
    """Raise `InvalidInput` where the trace would not fit a result."""
    choices = sum(module.shape.top_k for module in model.modules() if isinstance(module, MixtureLinear))
    most = MOST_TRACED // max(choices * len(request.prompts), 1)
    if request.trace_tokens > most:
        raise refusal(
            f"{len(request.prompts)} prompts of {request.trace_tokens} traced tokens, each of which makes {choices:,} "
            f"choices, are more than the {MOST_TRACED:,} of a result: "
            + (f"ask for trace_tokens={most}" if most else "send fewer prompts at a time"),
            "/trace_tokens",
        )
