"""Generations: what a model writes, and which experts of a mixture its tokens went to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gradstore.types.base import Body, Name, Named, Precision, Request, TemplateName
from gradstore.types.jobs import Job

PromptText = Annotated[str, Field(min_length=1, max_length=100_000)]


class PromptMessage(Request):
    """A turn of the conversation that the model answers."""

    role: Literal["system", "user", "assistant"]
    content: PromptText


Prompt = PromptText | Annotated[list[PromptMessage], Field(min_length=1, max_length=100)]
"""What a user says, or the turns of a conversation so far."""


class GenerationRequest(Request):
    """Let a model answer prompts, always with the likeliest next token."""

    finetune: Named | None = None
    """Its last checkpoint is meant."""
    checkpoint: Named | None = None
    prompts: list[Prompt] = Field(min_length=1, max_length=100)
    max_new_tokens: int = Field(128, ge=1, le=2048)
    trace: bool = False
    """Of a mixture: say which experts the tokens went to, too."""
    trace_tokens: int = Field(32, ge=1, le=512)
    """How many of the last tokens of each row, prompt and answer, are traced one by one; the load is of all of them."""
    template: TemplateName | None = None
    max_length: int | None = Field(None, ge=2, le=1 << 20)
    precision: Precision | None = None
    name: Name | None = None

    @model_validator(mode="after")
    def _one_model(self) -> GenerationRequest:
        if (self.finetune is None) == (self.checkpoint is None):
            raise ValueError("name one of finetune and checkpoint")
        return self


class TracedModule(Body):
    """What the router of one adapted linear layer did with the traced tokens, one after the other."""

    module: str
    """Its path in the base model, such as `model.layers.0.self_attn.q_proj`."""
    layer: int
    experts: list[list[int]]
    """Of each token the `top_k` experts that it went to, the one with the largest weight first."""
    weights: list[list[float]]
    """Of these experts; 1 in sum."""
    sub_routers: list[list[float]] | None
    """Of each token the weights of the sub-routers; null of a single router."""


class Trace(Body):
    """Where the last tokens of a row went."""

    first: int
    """Place of the first traced token in the row, prompt and answer; the first token of a row is 0."""
    tokens: list[str]
    modules: list[TracedModule]


class LayerLoad(Body):
    """How the tokens of all rows were shared among the experts of a layer, over all its adapted modules."""

    layer: int
    load: list[float]
    """Of each expert the part of all choices that fell on it; 1 in sum."""
    balance: float
    """The load-balance loss of these tokens: 1 where all experts get as many."""


class Generated(Body):
    """What was written after a prompt."""

    text: str
    prompt_tokens: int
    tokens: int
    """Tokens that were written, the end of the sequence included."""
    trace: Trace | None


class GenerationResult(Body):
    """The answers, in the order of the prompts."""

    checkpoint: str
    data: list[Generated]
    loads: list[LayerLoad] | None
    """Of each layer with experts, where a trace was asked for."""
    seconds: float
    """Working time of all its attempts."""


GenerationJob = Job[GenerationRequest, GenerationResult]
