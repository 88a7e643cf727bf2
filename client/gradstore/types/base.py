"""What all bodies are made of: the words that are chosen from, names, fractions, and the two base classes."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

JobKind = Literal[
    "gradients", "conversion", "finetune", "evaluation", "import", "scoring", "validation", "attribution", "comparison",
    "predictor", "cascade", "estimates", "estimate-validation", "annotation", "stream", "projector", "embedding",
    "generation", "adapter-choice",
]  # fmt: skip
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
GradientKind = Literal["adam", "sgd", "sign"]
FeatureKind = Literal[GradientKind, "logodds", "output", "hidden", "rds", "embedding"]
AdamForm = Literal["less", "exact"]
LogoddsForm = Literal["exact", "reference"]
"""`exact`: log(p / (1 - p)) from logits; `reference`: with p moved away from 0 and 1, as GradEx's code has it."""
Reduction = Literal["mean", "sum"]
ProjectionName = Literal["blocks", "sjlt", "fft", "rademacher", "reference", "none"]
StoredProjection = Literal[ProjectionName, "foreign"]
"""`foreign`: of imported features, told apart by their projection_id."""
FeatureDtype = Literal["float16", "float32", "bfloat16", "int8", "int4", "binary"]
Precision = Literal["float32", "bfloat16", "float16"]
Quantisation = Literal["int8", "nf4"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
TemplateName = Literal["tulu", "chat"]
Aggregate = Literal["less", "avg", "max", "min"]
TaskKind = str  # the server has a reader for each: mmlu, bbh, tydiqa, gsm8k, scienceqa, scienceqa-written, jsonl
Metric = Literal["choice", "exact_match", "token_f1", "none"]
Split = Literal["validation", "test"]
Method = Literal["lora", "full"]
CheckpointMethod = Literal[Method, "mixture", "none"]
Basis = Literal["measured", "estimated"]
TableFormat = Literal["jsonl", "csv", "parquet"]
Trainer = Literal["trl", "axolotl", "llama-factory"]
ExportFormat = Literal[TableFormat, Trainer]

FINISHED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


def _fraction(value: float) -> float:
    if value > 1:
        raise ValueError(f"a fraction lies between 0 and 1: {value:g} % is {value / 100:g}")
    if value <= 0:
        raise ValueError("a fraction lies between 0 and 1, and 0 selects nothing")
    return value


Fraction = Annotated[
    float,
    AfterValidator(_fraction),  # whose message is better than pydantic's for bounds, so these are in the schema only
    Field(description="A fraction: 0.05 is 5 %.", json_schema_extra={"exclusiveMinimum": 0, "maximum": 1}),
]

_NOT_IN_NAMES = frozenset({"Cc", "Cs", "Zl", "Zp"})  # Unicode's control characters, lone surrogates, line separators
_AN_ID = re.compile(r"[a-z]+_[0-9a-f]{24}")


def _name(value: str) -> str:
    if value in {".", ".."}:
        raise ValueError(f"{value!r} is no name: an address would lose it")
    if any(letter in "/\\" or unicodedata.category(letter) in _NOT_IN_NAMES for letter in value):
        raise ValueError("a name has no slash, backslash, line break or other control character")
    if value != value.strip():
        raise ValueError("a name neither begins nor ends with a space")
    if _AN_ID.fullmatch(value):
        raise ValueError("this looks like an id, and could be another thing's: choose a name that does not")
    return value


Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=200,
        description="Any text without slashes, control characters and spaces around it that does not look like an id.",
    ),
    AfterValidator(_name),
]


ProjectionId = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_name)]
"""What a user calls a projection that is not this store's."""
Named = Annotated[str, Field(max_length=255)]
"""An id or a name."""
RowCount = Annotated[int, Field(ge=1, le=10**12)]
"""A number of rows."""
RepeatedRowCount = Annotated[int, Field(ge=1, le=1_000_000)]
"""A number of rows that a task's few are repeated to."""
ServerPath = Annotated[str, Field(max_length=4096)]
ModelName = Annotated[str, Field(max_length=4096)]
"""Hub id, or a folder of the server inside an allowed root."""
Revision = Annotated[str, Field(max_length=200)]


def _patterns(value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(value)))


Weights = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=255)], ...],
    Field(
        min_length=1,
        max_length=100,
        description="Patterns over the names of a model's parameters: `*.q_proj.weight`, `model.layers.0.mlp.*`. A "
        "`*` stands for any text, dots included.",
    ),
    AfterValidator(_patterns),
]
"""In order and each once, so that the same patterns name the same features."""


class Body(BaseModel):
    """Base of every answer: unknown keys are kept out of sight, so that an older client reads a newer server."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Request(BaseModel):
    """Base of every request: unknown fields are refused, so that a typing error never silently does nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
