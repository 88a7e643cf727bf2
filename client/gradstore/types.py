"""Every JSON body of the API, defined once: the service validates with these models and the client returns them.

Conventions (docs/api.md): ids are prefixed strings, times are RFC 3339 UTC and end in `_at`, durations are seconds,
fractions lie between 0 and 1, and every key is present in an answer.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

JobKind = Literal["gradients", "finetune", "evaluation", "scoring"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FeatureKind = Literal["adam", "sgd", "sign", "hidden"]
AdamForm = Literal["less", "exact"]
Reduction = Literal["mean", "sum"]
ProjectionName = Literal["blocks", "sjlt", "fft", "rademacher", "none"]
FeatureDtype = Literal["float16", "float32"]
Precision = Literal["float32", "bfloat16", "float16"]
Quantisation = Literal["int8", "nf4"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
TemplateName = Literal["tulu", "chat"]
Aggregate = Literal["less", "avg", "max", "min"]
TaskKind = str  # the server has a reader for each: mmlu, bbh, tydiqa, gsm8k, scienceqa, jsonl
Metric = Literal["choice", "exact_match", "token_f1", "none"]
Split = Literal["validation", "test"]
Method = Literal["lora", "full"]
CheckpointMethod = Literal[Method, "none"]
Basis = Literal["measured", "estimated"]

FINISHED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


def _fraction(value: float) -> float:
    if value > 1:
        raise ValueError(f"a fraction lies between 0 and 1: {value:g} % is {value / 100:g}")
    if value <= 0:
        raise ValueError("a fraction lies between 0 and 1, and 0 selects nothing")
    return value


Fraction = Annotated[float, AfterValidator(_fraction), Field(description="A fraction: 0.05 is 5 %.")]

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


Named = Annotated[str, Field(max_length=255)]
"""An id or a name."""
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


# Errors -----------------------------------------------------------------------------------------------------------


class ProblemItem(Body):
    """One place where the input is wrong."""

    detail: str
    pointer: str | None = None
    """JSON pointer into the request body."""
    parameter: str | None = None
    """Name of the query, path or form parameter."""
    line: int | None = None
    """Line of the uploaded file, counted from 1."""


class Problem(Body):
    """An error as RFC 9457 `application/problem+json`; `detail` says what to do next."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    """The request's id (or the log's, for a failed job): quote it when asking for help."""
    errors: list[ProblemItem] = []
    total_errors: int = 0
    """How many places are wrong; `errors` holds the first of them."""


# Jobs -------------------------------------------------------------------------------------------------------------


class Progress(Body):
    """How far a job is."""

    done: int
    total: int
    unit: str
    """What is counted: rows, steps or examples."""
    rate: float | None
    """Units per second over the last minute; null until known."""
    eta_seconds: float | None


RequestT = TypeVar("RequestT", bound=BaseModel)
ResultT = TypeVar("ResultT", bound=BaseModel)


class Job(Body, Generic[RequestT, ResultT]):
    """Work that outlives the request which started it."""

    id: str
    kind: JobKind
    name: str | None
    status: JobStatus
    progress: Progress
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: Problem | None
    request: RequestT
    result: ResultT | None

    @property
    def finished(self) -> bool:
        """Whether the job has reached a state that it will not leave by itself."""
        return self.status in FINISHED


class AnyObject(Body):
    """A JSON object whose keys depend on the kind of the job."""

    model_config = ConfigDict(extra="allow")


AnyJob = Job[AnyObject, AnyObject]

ItemT = TypeVar("ItemT", bound=BaseModel)


class Page(Body, Generic[ItemT]):
    """A page of a list: ask for the next one with `after` = the last item's id."""

    data: list[ItemT]
    has_more: bool


class Rename(Request):
    """Give a resource another name; null takes its name away."""

    name: Name | None


class Estimate(Body):
    """What a job would cost (`dry_run=true`)."""

    rows: int
    tokens: int
    bytes: int
    """Bytes the job would add to the store."""
    free_bytes: int
    """Bytes free where the store lies."""
    seconds: float | None
    """How long it takes; null while no job like it has finished and no worker has been seen, or where the base model's
    weights are no safetensors or cannot be found."""
    basis: Basis | None = None
    """What `seconds` come from: `measured`, the rate of the last finished job of this model; `estimated`, the model's
    operations and the rate at which workers multiply matrices."""
    memory_bytes: int | None
    """Estimated peak memory of one worker; null where the base model's size is not known."""
    reused_rows: int = 0
    """Rows whose features exist already, summed over checkpoints."""


# Datasets ---------------------------------------------------------------------------------------------------------


class DatasetSource(Body):
    """A file that was uploaded, kept byte for byte under its own hash."""

    sha256: str
    filename: str
    format: Literal["jsonl", "json", "parquet"]
    bytes: int
    rows: int
    """Rows taken from the file."""
    skipped: int
    """Rows left out by `on_error=skip`."""
    created_at: datetime


class RowProblem(Body):
    """A row that could not be taken, or was taken with a remark."""

    line: int
    """Line of a JSONL file, or position in a JSON array or Parquet file, counted from 1."""
    detail: str


class UploadReport(Body):
    """What became of the rows of an upload."""

    rows: int
    skipped: int
    problems: list[RowProblem]
    """The first rows that were left out, with reasons."""
    notes: list[RowProblem]
    """Remarks on rows that were taken: repeated ids, missing ids and the like."""
    total_notes: int


class Dataset(Body):
    """A pool of examples to select from, named by the hash of its canonical rows."""

    id: str
    name: str | None
    rows: int
    bytes: int
    origins: dict[str, int]
    """Rows per origin: the `dataset` field of the rows, else the file's name."""
    prefix: str | None
    """The longest stored dataset whose rows begin this one: its features are reused."""
    sources: list[DatasetSource]
    created_at: datetime


class UploadedDataset(Dataset):
    """A dataset and what became of the upload."""

    created: bool
    """False where the same rows were already stored."""
    report: UploadReport


# Tasks ------------------------------------------------------------------------------------------------------------


class Subtask(Body):
    """A part of a task: a subject of MMLU, a language of TyDiQA."""

    name: str
    validation: int
    """Rows used for selection."""
    test: int
    """Rows used for evaluation only."""
    metric: Metric


class Task(Body):
    """What the model should get better at, given by a few validation rows."""

    id: str
    name: str
    kind: TaskKind
    validation: int
    test: int
    subtasks: list[Subtask]
    notes: list[str]
    created_at: datetime


class TaskRegister(Request):
    """Register a task from a folder or file of the server, inside an allowed root."""

    name: Name
    kind: TaskKind
    path: ServerPath
    replace: bool = False


# Checkpoints and runs -----------------------------------------------------------------------------------------------


class LoraSettings(Request):
    """The adapter's shape; the defaults are LESS's recipe."""

    r: int = Field(128, ge=1, le=4096)
    alpha: float = Field(512, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Checkpoint(Body):
    """An adapter or a whole model, its Adam moments and the mean learning rate of its epoch; or a base model alone."""

    id: str
    name: str | None
    run: str | None
    model: str
    revision: str | None
    method: CheckpointMethod
    """What was trained: an adapter (`lora`), the whole model (`full`) or nothing (`none`: the base model itself)."""
    epoch: int | None
    step: int | None
    learning_rate: float | None
    """Mean learning rate of the epoch: the checkpoint's weight in the influence."""
    has_moments: bool
    """Without Adam's moments a checkpoint gives `sgd` and `sign` features only."""
    moments_note: str | None
    """Why there are no moments, where there are none."""
    parameters: int
    """Parameters that were trained."""
    precision: Precision
    template: TemplateName | None
    max_length: int | None
    bytes: int
    created_at: datetime


class CheckpointRegister(Request):
    """Register an adapter folder of the server (inside an allowed root): PEFT, HF Trainer or LESS layout.

    Without a path: the base model itself, as it is before any training.
    """

    path: ServerPath | None = None
    name: Name | None = None
    model: ModelName | None = None
    """Base model; by default the one named in the adapter's own configuration."""
    revision: Revision | None = None
    learning_rate: float | None = Field(None, gt=0)
    step: int | None = Field(None, ge=0, lt=1 << 53)
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _something(self) -> CheckpointRegister:
        if self.path is None and self.model is None:
            raise ValueError("name the path of an adapter, or a model to register as it is")
        if self.path is None and self.step is not None:
            raise ValueError("a base model itself has no step: leave it out, or name the path of what was trained")
        return self


class Run(Body):
    """The checkpoints of one training, in order."""

    id: str
    name: str | None
    model: str
    revision: str | None
    finetune: str | None
    checkpoints: list[Checkpoint]
    created_at: datetime


class RunCreate(Request):
    """Group registered checkpoints of one base model into a run."""

    checkpoints: list[Named] = Field(min_length=1)
    name: Name | None = None


# Gradients --------------------------------------------------------------------------------------------------------


class GradientsRequest(Request):
    """Compute the projected gradient of every example of a dataset or of a task's validation rows.

    At a LoRA checkpoint it is the gradient of the adapter's parameters, at any other that of the `weights` named.

    Every checkpoint, kind (`adam` in each form) and dim is a feature set of its own; all of them come from one pass.
    """

    dataset: Named | None = None
    task: Named | None = None
    run: Named | None = None
    checkpoints: list[Named] | None = None
    weights: Weights | None = None
    """Whose gradient it is, at checkpoints without an adapter; hidden states have none."""
    kinds: list[FeatureKind] | None = Field(None, min_length=1)
    """`adam` for a dataset and `sgd` for a task, unless said otherwise. `hidden` is the mean of the hidden states that
    the output layer gets: no gradient, and as wide as the model."""
    adam: AdamForm | Literal["both"] = "less"
    reduction: Reduction = "mean"
    """Whose gradient it is: of the mean of the supervised tokens' losses, or of their sum."""
    dims: list[Annotated[int, Field(ge=1, le=1 << 20)]] = Field(default=[8192], min_length=1, max_length=8)
    projection: ProjectionName = "blocks"
    seed: int = Field(0, ge=0, lt=1 << 32)
    dtype: FeatureDtype = "float16"
    template: TemplateName | None = None
    """Chat format; by default the one the run was trained with, else `tulu`."""
    max_length: int | None = Field(None, ge=2, le=1 << 20)
    """Tokens kept of an example; by default the run's, else 2048."""
    precision: Precision | None = None
    """Precision of the base model; by default the one the run was trained in."""
    quantisation: Quantisation | None = None
    attention: Attention | None = None
    """How the base model computes attention; by default as transformers chooses, `sdpa` where the model has it. With
    `flash_attention_2` rows share a batch without padding."""
    gradient_checkpointing: bool = False
    token_budget: int | None = Field(None, ge=1, le=1 << 30)
    """Tokens per batch, padding included. Left out, the job's first worker finds what its device does best; either way
    it is recorded, since it fixes the batch plan."""
    name: Name | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _one_of_each(self) -> GradientsRequest:
        if (self.dataset is None) == (self.task is None):
            raise ValueError("name either a dataset or a task")
        if (self.run is None) == (not self.checkpoints):
            raise ValueError("name either a run or a list of checkpoints")
        if len(set(self.dims)) != len(self.dims):
            raise ValueError("dims holds a number twice")
        if len(set(self.kinds or [])) != len(self.kinds or []):
            raise ValueError("kinds holds a kind twice")
        if self.weights and self.quantisation:
            raise ValueError("the weights of a quantised model have no gradients: leave quantisation out")
        return self


class ExcludedRow(Body):
    """A row without a feature, kept out of every answer."""

    row: int
    checkpoint: str
    kinds: list[FeatureKind]
    """Which kinds of features it lacks for this reason."""
    reason: str


class FeatureSet(Body):
    """The features of one dataset or task at one checkpoint: rows × dim.

    What hidden states do without is null: `weights`, `reduction`, `projection`, `seed` and `projection_version`.
    """

    id: str
    dataset: str | None
    task: str | None
    checkpoint: str
    weights: Weights | None
    """The patterns of the weights whose gradient it is; null at a LoRA checkpoint."""
    kind: FeatureKind
    adam: AdamForm | None
    reduction: Reduction | None
    projection: ProjectionName | None
    seed: int | None
    dim: int
    dtype: FeatureDtype
    template: TemplateName
    max_length: int
    precision: Precision
    """Precision of the base model while it computed."""
    quantisation: Quantisation | None
    projection_version: int | None
    """Version of the projection's random numbers."""
    rows: int
    excluded: int
    """Rows without a feature."""
    bytes: int


class FeatureRow(Body):
    """What is known of one row beside its feature."""

    row: int
    """Position in the dataset, or among the task's validation rows, from 0."""
    norm: float | None
    """Length of what was projected: Adam's step, the gradient, its sign; null for a row without a feature."""
    raw_norm: float | None
    """Length of the gradient itself; of kind `hidden` the same as `norm`."""
    loss: float | None
    """Mean cross-entropy per supervised token."""
    tokens: int
    """Supervised tokens."""
    reason: str | None
    """Why the row has no feature."""


class FeatureRows(Body):
    """A page of the rows of a feature set, in their order."""

    feature_set: FeatureSet
    data: list[FeatureRow]
    has_more: bool


class GradientsResult(Body):
    """What a gradients job left in the store."""

    feature_sets: list[FeatureSet]
    rows: int
    computed_rows: int
    """Rows that this job went through the model with, summed over checkpoints; of the others all existed."""
    excluded: list[ExcludedRow]
    """The first rows without a feature, with reasons."""
    total_excluded: int
    tokens: int
    token_budget: int | None
    """Tokens per batch, padding included, asked for or found; null where nothing had to be computed."""
    seconds: float


GradientsJob = Job[GradientsRequest, GradientsResult]


# Selection --------------------------------------------------------------------------------------------------------


class SelectionRecipe(Body):
    """Everything an answer depends on, resolved to ids: the same recipe gives the same selection."""

    datasets: list[str]
    tasks: list[str]
    checkpoints: list[str]
    checkpoint_weights: list[float]
    """Weight of each checkpoint: its mean learning rate over the sum."""
    run: str | None
    weights: Weights | None
    """The patterns of the weights whose gradients are compared; null for those of an adapter."""
    kind: FeatureKind
    task_kind: FeatureKind
    adam: AdamForm | None
    reduction: Reduction | None
    projection: ProjectionName | None
    seed: int | None
    dim: int
    dtype: FeatureDtype
    template: TemplateName
    max_length: int
    precision: Precision
    quantisation: Quantisation | None
    projection_version: int | None
    aggregate: Aggregate
    combine: Literal["max", "mean"]
    """How the scores of several tasks become one."""
    pct: float | None
    k: int | None
    exclude: list[str]
    """Datasets and selections whose examples are left out."""


class SelectedRow(Body):
    """A chosen example."""

    rank: int
    dataset: str
    row: int
    """Position in the dataset, from 0."""
    id: str | None
    """The example's own id, as uploaded."""
    origin: str
    score: float
    task: str
    """The task that gave the score."""
    subtask: str | None
    """The subtask that gave the score (`aggregate=less`)."""


class Selection(Body):
    """The answer of /select: the examples that help the task most, best first."""

    id: str
    name: str | None
    recipe: SelectionRecipe
    count: int
    pool: int
    """Rows of the pool, less those that are excluded: `pct` is a fraction of these."""
    left_out: dict[str, int]
    """Rows that could not: by reason."""
    origins: dict[str, int]
    """Chosen rows per origin."""
    pool_origins: dict[str, int]
    data: list[SelectedRow]
    """The first rows (`limit`, `after`)."""
    has_more: bool
    created_at: datetime


class ScoredRow(Body):
    """The score of one example of the pool."""

    dataset: str
    row: int
    id: str | None
    origin: str
    score: float | None
    """Null for a row without a feature."""
    task: str | None
    subtask: str | None


class Scores(Body):
    """A page of the score vector, in the order of the pool."""

    recipe: SelectionRecipe
    rows: int
    data: list[ScoredRow]
    has_more: bool


class ScoringRequest(Request):
    """The scores a /select or /scores is waiting for."""

    recipe: dict[str, Any]


class ScoringResult(Body):
    """Where the scores are: ask again for what was asked."""

    scores: str
    rows: int
    seconds: float


ScoringJob = Job[ScoringRequest, ScoringResult]


# Fine-tunes -------------------------------------------------------------------------------------------------------


class FinetuneRequest(Request):
    """Fine-tune a model on a selection, a dataset or a random fraction of it; the defaults are LESS's recipe."""

    dataset: Named | None = None
    selection: Named | None = None
    fraction: Fraction | None = None
    """Random fraction of the dataset's rows, drawn with `seed`."""
    rows: int | None = Field(None, ge=1)
    """Random number of the dataset's rows, drawn with `seed`."""
    model: ModelName
    """Hub id, or a folder of the server inside an allowed root."""
    revision: Revision | None = None
    method: Method = "lora"
    lora: LoraSettings = LoraSettings()
    learning_rate: float = Field(2e-5, gt=0)
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    epochs: int = Field(4, ge=1, le=1000)
    batch_size: int = Field(128, ge=1)
    """Examples per optimizer step."""
    device_batch_size: int = Field(8, ge=1)
    """Examples per forward pass; the rest is accumulated."""
    max_length: int = Field(2048, ge=2, le=1 << 20)
    template: TemplateName = "tulu"
    precision: Precision | Literal["auto"] = "auto"
    """`auto`: bfloat16 on a GPU, float32 on a CPU; what was used is recorded with the run."""
    quantisation: Quantisation | None = None
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0, lt=1 << 32)
    name: Name | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneRequest:
        if (self.dataset is None) == (self.selection is None):
            raise ValueError("name either a dataset or a selection")
        if self.fraction is not None and self.rows is not None:
            raise ValueError("name either a fraction or a number of rows")
        if self.selection is not None and (self.fraction or self.rows):
            raise ValueError("fraction and rows draw from a dataset; a selection is taken whole")
        if self.method == "full" and self.quantisation:
            raise ValueError("a quantised model cannot be trained in full; use method=lora")
        if self.batch_size % min(self.device_batch_size, self.batch_size):
            raise ValueError("batch_size must be a multiple of device_batch_size")
        return self


class LossPoint(Body):
    """A point of the loss curve."""

    step: int
    epoch: float
    loss: float
    learning_rate: float


class FinetuneResult(Body):
    """What a fine-tune left behind."""

    run: str
    checkpoints: list[str]
    rows: int
    """Rows trained on."""
    skipped_rows: int
    """Rows that left no supervised token after truncation."""
    steps: int
    tokens: int
    """Tokens of one epoch."""
    precision: Precision
    loss_curve: list[LossPoint]
    seconds: float
    """Working time of all its attempts: interruptions do not count, what was done twice does."""


FinetuneJob = Job[FinetuneRequest, FinetuneResult]


# Evaluations ------------------------------------------------------------------------------------------------------


class EvaluationRequest(Request):
    """Measure a model on the test rows of tasks."""

    finetune: Named | None = None
    checkpoint: Named | None = None
    model: ModelName | None = None
    revision: Revision | None = None
    tasks: list[Named] = Field(min_length=1)
    baseline: bool = True
    """Measure the base model beside it."""
    max_rows: int | None = Field(None, ge=1)
    """At most so many test rows per subtask, the first ones."""
    max_new_tokens: int = Field(256, ge=1, le=8192)
    template: TemplateName | None = None
    max_length: int | None = Field(None, ge=2, le=1 << 20)
    precision: Precision | None = None
    quantisation: Quantisation | None = None
    bootstrap_samples: int = Field(1000, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=1 << 32)
    name: Name | None = None

    @model_validator(mode="after")
    def _one_model(self) -> EvaluationRequest:
        if sum(part is not None for part in (self.finetune, self.checkpoint, self.model)) != 1:
            raise ValueError("name one of finetune, checkpoint and model")
        return self


class Interval(Body):
    """A percentile bootstrap confidence interval of 95 %."""

    low: float
    high: float


class EvaluationRow(Body):
    """One model on one subtask, or on a whole task where `subtask` is null (mean over its subtasks)."""

    model: Literal["base", "tuned"]
    task: str
    task_name: str
    """What the task was called when it was measured."""
    subtask: str | None
    examples: int
    loss: float | None
    """Mean cross-entropy per supervised token, averaged over examples."""
    loss_interval: Interval | None
    metric: Metric
    value: float | None
    interval: Interval | None
    unparsed: int
    """Answers in which no answer was found (exact match)."""


class EvaluationResult(Body):
    """The measured rows."""

    rows: list[EvaluationRow]
    seconds: float
    """Working time of all its attempts."""


EvaluationJob = Job[EvaluationRequest, EvaluationResult]


# The service itself -----------------------------------------------------------------------------------------------


class Worker(Body):
    """A worker seen lately."""

    id: str
    device: str
    job: str | None
    seen_at: datetime
    flops: dict[Precision, float] = {}
    """Operations a second (FLOP/s) of a matrix product, by precision, measured when the worker started."""


class Health(Body):
    """Whether the service can work."""

    status: Literal["ok", "degraded"]
    version: str
    catalog: bool
    dispatch: bool
    workers: list[Worker]
    free_bytes: int
