"""Projectors: networks that place rows in an ability space, and the embeddings that they give."""

from __future__ import annotations

from pydantic import Field, model_validator

from gradstore.types.base import Basis, Body, Fraction, Name, Named, Request
from gradstore.types.jobs import Job

MOST_HELD_OUT = 0.9
MAX_WEIGHTS = 1 << 27
"""Of a matrix in each of the residual blocks, which have two: training takes 16 bytes a weight."""


class ProjectorStreams(Request):
    """The streams of a dataset or of a task's validation rows that a projector reads, by id or name."""

    gradients: Named
    routing: Named | None = None
    """Routing weights; without them the network has no branch for them."""
    hidden: Named | None = None
    """Hidden states, which are put behind the gradients."""


class ProjectorConfig(Request):
    """The network and its training; the defaults are those of CODS."""

    width: int = Field(256, ge=8, le=4096)
    """Of the streams' branches and of the residual blocks."""
    blocks: int = Field(4, ge=0, le=64)
    dim: int = Field(64, ge=2, le=4096)
    """Of the ability space."""
    heads: int = Field(8, ge=1, le=64)
    dropout: float = Field(0.2, ge=0, lt=1)
    batch_size: int = Field(32, ge=2, le=4096)
    epochs: int = Field(20, ge=1, le=1000)
    """Of stage 1, in which all but base vectors and temperature learn to tell the capabilities."""
    learning_rate: float = Field(2e-3, gt=0, le=1)
    """Of stage 1; both fall along a cosine to a tenth."""
    adjustment_epochs: int = Field(6, ge=0, le=1000)
    """Of stage 2, in which the encoder stays and the space is adjusted."""
    adjustment_learning_rate: float = Field(5e-4, gt=0, le=1)
    weight_decay: float = Field(1e-4, ge=0, le=1)
    alpha: float = Field(0.25, gt=0, lt=1)
    """Weight of a capability that a row calls for, beside 1 − alpha of one that it does not, in the focal loss."""
    contrastive_weight: float = Field(0.1, ge=0, le=100)
    """Stage 2: of the contrastive loss."""
    repulsion_weight: float = Field(0.05, ge=0, le=100)
    """Stage 2: of the repulsion of base vectors."""
    gradient_noise: float = Field(0.01, ge=0, le=10)
    """Standard deviation of the noise on standardised gradients in training."""
    routing_noise: float = Field(0.005, ge=0, le=10)
    validation_fraction: Fraction = 0.2
    """Part of the labelled rows that is not trained on."""

    @model_validator(mode="after")
    def _consistent(self) -> ProjectorConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim is a multiple of heads: {self.dim} is none of {self.heads}")
        if self.validation_fraction > MOST_HELD_OUT:
            raise ValueError(f"validation_fraction is at most {MOST_HELD_OUT}: the other rows are trained on")
        if self.blocks * self.width**2 > MAX_WEIGHTS:
            raise ValueError(
                f"blocks times width times width is at most {MAX_WEIGHTS:,}: ask for fewer or narrower ones"
            )
        return self


class ProjectorRequest(Request):
    """Train a projector on rows whose capabilities are known."""

    streams: ProjectorStreams
    annotations: Named
    """Which capabilities each row calls for."""
    config: ProjectorConfig = ProjectorConfig()
    seed: int = Field(42, ge=0, lt=1 << 32)
    name: Name | None = None
    dry_run: bool = False


class ProjectorEstimate(Body):
    """What a projector would cost (`dry_run=true`)."""

    done: bool
    """Whether the same has been done before: its result is answered, and nothing else happens."""
    training_rows: int
    """Rows that are trained on; fewer where some are not labelled, or a stream has not all of them."""
    validation_rows: int
    steps: int
    """Batches of all epochs of both stages."""
    read_bytes: int
    """Bytes of the streams in a worker's memory."""
    seconds: float | None
    """How long it takes; null while no projector of such a network, batch and streams has finished."""
    basis: Basis | None


class ProjectorEpoch(Body):
    """An epoch of training, and what the rows that are not trained on say after it."""

    stage: int
    epoch: int
    """Within the stage, from 1."""
    loss: float
    """Mean over the epoch's rows, as trained on: with dropout and noise."""
    classification_loss: float
    contrastive_loss: float | None
    """Of stage 2."""
    repulsion_loss: float | None
    """Of stage 2."""
    validation_loss: float
    """The classification loss of the validation rows."""
    exact_match: float
    """Part of the validation rows of which all capabilities are told right."""
    precision: float
    """Of a row's capabilities, the mean over the validation rows; so are recall and f1."""
    recall: float
    f1: float
    gram_error: float
    """Frobenius norm of the base vectors' cosines less the identity."""
    temperature: float


class ProjectorEpochs(Body):
    """The epochs of a projector that have ended so far."""

    data: list[ProjectorEpoch]


class CapabilityScore(Body):
    """How well a capability is told, on the validation rows."""

    name: str
    training_rows: int
    """Rows trained on that call for it."""
    rows: int
    """Validation rows that call for it."""
    predicted: int
    precision: float | None
    """Null where it is never predicted."""
    recall: float | None
    """Null where no validation row calls for it; so is f1."""
    f1: float | None


class ProjectorResult(Body):
    """A trained projector, and how well it tells capabilities apart."""

    parameters: int
    """Numbers in the network."""
    gradient_columns: int
    """Columns of the gradients, with those of the hidden states."""
    routing_columns: int
    training_rows: int
    validation_rows: int
    unlabelled_rows: int
    """Rows without an annotation, left out."""
    absent_rows: int
    """Labelled rows that a stream does not have, left out."""
    zero_rows: int
    """Rows trained on whose gradients are all zero: they are not counted by the standardisation."""
    epochs: list[ProjectorEpoch]
    capabilities: list[CapabilityScore]
    exact_match: float
    """This and the following are of the last epoch, which is what is kept."""
    precision: float
    recall: float
    f1: float
    macro_f1: float | None
    """Mean over the capabilities that a validation row calls for."""
    gram: list[list[float]]
    """Cosines of the base vectors with each other."""
    gram_error: float
    temperature: float
    seconds: float


class EmbeddingRequest(Request):
    """Place the rows of a dataset, or of a task, in a projector's ability space."""

    projector: Named
    streams: ProjectorStreams
    """Of the dataset or task, as the projector's own were made."""
    name: Name | None = None
    dry_run: bool = False


class EmbeddingEstimate(Body):
    """What an embedding would cost (`dry_run=true`)."""

    done: bool
    """Whether the same has been done before: its result is answered, and nothing else happens."""
    rows: int
    read_bytes: int
    """Bytes of the streams in a worker's memory."""
    bytes: int
    """Bytes it would add to the store."""
    seconds: float | None
    """How long it takes; null while no embedding by this projector has finished."""
    basis: Basis | None


class EmbeddingResult(Body):
    """Where the rows are: GET /embeddings/{id}/rows reads them."""

    projector: str
    dataset: str | None
    task: str | None
    """The task whose validation rows they are; null for a dataset's."""
    rows: int
    absent_rows: int
    """Rows that a stream does not have; they have no place."""
    dim: int
    capabilities: list[str]
    counts: list[int]
    """Rows that call for each capability, by a probability over 0.5."""
    seconds: float


class EmbeddedRow(Body):
    """A row's place in an ability space."""

    row: int
    """Position in the dataset or among the task's validation rows, from 0."""
    embedding: list[float] | None
    """Unit vector; null for a row that a stream does not have; so are the others."""
    probabilities: list[float] | None
    """That the row calls for each capability."""
    similarities: list[float] | None
    """⟨v, b̂⟩ with each base vector."""


class EmbeddedRows(Body):
    """A page of an embedding, in the order of the rows."""

    rows: int
    capabilities: list[str]
    data: list[EmbeddedRow]
    has_more: bool


class CapabilityCount(Body):
    """How many rows of a pool and of a selection call for a capability, by a probability over 0.5."""

    name: str
    pool: int
    selected: int
    pool_share: float
    """Part of the pool's rows."""
    selected_share: float
    enrichment: float | None
    """The second over the first; null where no row of the pool calls for it."""
    pool_mean: float
    """Mean probability over the pool."""
    selected_mean: float


class CapabilityHistogram(Body):
    """The capabilities of a pool and of what was selected from it."""

    projector: str
    selection: str
    pool: int
    """Rows of the pool that have a place."""
    selected: int
    capabilities: list[CapabilityCount]


ProjectorJob = Job[ProjectorRequest, ProjectorResult]
EmbeddingJob = Job[EmbeddingRequest, EmbeddingResult]
