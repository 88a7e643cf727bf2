"""Choosing adapters of the bank for a task, from a few of its rows (ROCKET, algorithm 1)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gradstore.types.adapters import AdaptersWanted
from gradstore.types.base import Basis, Body, Name, Named, Precision, Request, Revision, TemplateName
from gradstore.types.jobs import Job

AdapterSimilarity = Literal["cosine_ab", "cosine_delta"]
"""`cosine_ab`: mean cosine of the tensors A and B, as the paper has it; `cosine_delta`: of ΔW = BA, whatever its
basis."""
MAX_ADAPTERS = 500
"""That are scored for a choice: each is a line of its result."""
AdapterCount = Annotated[int, Field(ge=1, le=MAX_ADAPTERS)]


class AdapterChoiceRequest(AdaptersWanted, Request):
    """Choose adapters of one base model for a task: those named, or all of the bank that are as is said."""

    task: Named
    """Its validation rows are the shots."""
    shots: int | None = Field(None, ge=1, le=10_000)
    """At most so many of them, drawn by the seed from all subtasks alike; null: all."""
    seed: int = Field(0, ge=0, lt=1 << 32)
    """Of the shots that are drawn."""
    adapters: list[Named] | None = Field(None, min_length=1, max_length=MAX_ADAPTERS)
    """By id or name, in place of what they are asked for by."""
    candidates: AdapterCount = 8
    """So many with the smallest sums of ranks are candidates."""
    size: AdapterCount = 4
    """Adapters of a set that is chosen."""
    similarity: AdapterSimilarity = "cosine_ab"
    template: TemplateName | None = None
    """By default that of the adapters, where they share one."""
    max_length: int | None = Field(None, ge=2, le=1 << 20)
    max_new_tokens: int = Field(256, ge=1, le=8192)
    precision: Precision | None = None
    """Of the base model; by default that which the adapters were trained in, where they share one."""
    dry_run: bool = False
    """Answer with what it would take, and start nothing."""
    name: Name | None = None

    @model_validator(mode="after")
    def _consistent(self) -> AdapterChoiceRequest:
        asked = sorted(self.model_dump(include=set(AdaptersWanted.model_fields), exclude_defaults=True))
        if self.adapters is not None and asked:
            raise ValueError(f"adapters are named: leave {', '.join(asked)} out")
        if self.candidates < self.size:
            raise ValueError("sets are made of candidates: candidates is at least size")
        return self


class ChosenAdapter(Body):
    """An adapter among all that were scored."""

    adapter: str
    name: str | None
    """What the adapter was called when it was scored."""
    perplexity: float | None
    """Mean over the shots of exp(mean negative log-likelihood of an answer's tokens); null where that is not finite."""
    accuracy: float
    """Mean over the shots of the task's metric: the share answered exactly, where that is `exact_match` or `choice`."""
    perplexity_rank: int
    """1 for the lowest perplexity of all adapters."""
    accuracy_rank: int
    """1 for the highest accuracy."""
    candidate: bool
    chosen: bool


class AdapterSet(Body):
    """Some candidates together."""

    members: list[str]
    """Ids of the adapters, the one with the smallest sum of ranks first."""
    similarity: float
    """Mean over the pairs of members."""
    omega: float | None
    """The paper's diversity, 1 / similarity; null where that is not positive, and the set is more diverse still."""
    diversity_rank: int
    """1 for the least alike of all sets."""
    total: int
    """All ranks of the members, and that of the set's diversity: the set with the smallest is chosen."""


class AdapterSets(Body):
    """A page of sets, the best first."""

    data: list[AdapterSet]
    has_more: bool


class ShotScore(Body):
    """What an adapter makes of a shot."""

    adapter: str
    perplexity: float | None
    """Null where it is not finite, or truncation leaves nothing of the answer."""
    value: float | None
    """The task's metric: 1 where the answer is right; null where the shot has no prompt."""


class AdapterShot(Body):
    """A shot, and what every adapter makes of it."""

    row: int
    """Number of the task's validation row, from 0."""
    id: str | None
    subtask: str
    rationale: bool
    """Whether the perplexity is that of a rationale, and not of the bare answer."""
    scores: list[ShotScore]
    """In the order of the result's adapters."""


class AdapterShots(Body):
    """A page of shots, in the order of the task's rows."""

    data: list[AdapterShot]
    has_more: bool


class AdapterChoiceResult(Body):
    """Which adapters were chosen, and why."""

    chosen: AdapterSet
    adapters: list[ChosenAdapter]
    """All that were scored, those with the smallest sums of ranks first."""
    candidates: list[str]
    """Ids of those that sets are made of, in this order."""
    similarities: list[list[float]]
    """Of the candidates with each other, in their order."""
    sets: int
    """How many sets there are: `GET /adapters/choices/{id}/sets` has them."""
    shots: int
    shots_sha256: str
    """Of the shots as they are stored."""
    base_model: str
    revision: Revision | None
    template: TemplateName
    max_length: int
    precision: Precision
    scored_adapters: int
    """Of them, scored for this choice; of the others the scores of an earlier one were taken."""
    seconds: float
    """Working time of the scoring."""


class AdapterChoiceEstimate(Body):
    """What a choice would take."""

    adapters: int
    reused_adapters: int
    """Of them, scored before on the same shots in the same way."""
    shots: int
    sets: int
    passes: int
    """Passes over shots that are missing: one of each adapter for the perplexity, and one for the metric."""
    seconds: float | None
    """Null until a choice on this base model has been made."""
    basis: Basis | None


AdapterChoiceJob = Job[AdapterChoiceRequest, AdapterChoiceResult]
