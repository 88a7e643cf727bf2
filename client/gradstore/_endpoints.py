"""Each call of the API once, as a pure function: arguments → request. Nothing is sent here.

A function returns a `Call`: method, path, parameters, body, and the type of the answer. Arguments that are left out
are not sent, so that every default is the server's. What takes several requests (waiting, pages, downloads) is in
`_flows.py`; `client.py` puts the functions under their names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, Required, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from pydantic import BaseModel

from gradstore._uploads import PathOrFile, Upload, source
from gradstore.results import (
    AdapterChoiceJob,
    AttributionJob,
    ComparisonJob,
    EstimatesJob,
    EstimateValidationJob,
    EvaluationJob,
    FinetuneJob,
    ProjectorJob,
    Selection,
    ValidationJob,
)
from gradstore.types import (
    AdamForm,
    Adapter,
    AdapterChoiceEstimate,
    AdapterSets,
    AdapterShots,
    AdapterSimilarity,
    Aggregate,
    Allocation,
    AnnotatedRows,
    AnnotationEstimate,
    AnnotationJob,
    AnyJob,
    Attention,
    AuditEntry,
    Capability,
    CapabilityHistogram,
    CascadeEstimate,
    CascadeJob,
    Checkpoint,
    Combination,
    Combine,
    ComparisonEstimate,
    Contestant,
    ConversionJob,
    DedupeBy,
    EmbeddedRows,
    EmbeddingEstimate,
    EmbeddingJob,
    Estimate,
    EstimatedSubsets,
    EstimateMetric,
    EstimateMode,
    EstimatesCost,
    ExampleRows,
    Explanations,
    ExportFormat,
    FeatureDtype,
    FeatureKind,
    FeatureRows,
    GenerationJob,
    GradientKind,
    GradientsJob,
    GroupBy,
    Health,
    ImportJob,
    JobKind,
    JobStatus,
    Labeller,
    Lengths,
    LogoddsForm,
    LoraSettings,
    Method,
    MixtureSettings,
    Overlaps,
    Page,
    Precision,
    PredictorEstimate,
    PredictorInput,
    PredictorJob,
    PredictorModel,
    ProjectionName,
    ProjectorConfig,
    ProjectorEpochs,
    ProjectorEstimate,
    ProjectorStreams,
    Provenance,
    Quantisation,
    Readiness,
    Reduction,
    RouterSettings,
    Run,
    ScoreDistribution,
    Scores,
    Search,
    SelectionMethod,
    SelectionRecipe,
    ShotNearness,
    Split,
    StoredProjection,
    Strategy,
    StreamJob,
    SubsetSearch,
    Task,
    TaskKind,
    Taxonomy,
    TemplateName,
    UploadedDataset,
    Usage,
    ValidatedRecipe,
    ValidationEstimate,
    ValidationKind,
    ValidationTargets,
)

AnswerT = TypeVar("AnswerT")
BodyT = TypeVar("BodyT", bound=BaseModel)

ANSWERING = 60.0  # seconds a server may take over an answer, beside the waiting it was asked for
INGESTING = 3600.0  # seconds a server may take to read through an upload after its last byte


@dataclass(frozen=True, kw_only=True)
class Call(Generic[AnswerT]):
    """One request, and the type of its answer."""

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    answer: type[AnswerT] | None
    """Model of the JSON answer; None where there is no body, or one that is not JSON."""
    params: tuple[tuple[str, str], ...] = ()
    json: Mapping[str, Any] | None = None
    upload: Upload | None = None
    accept: str = "application/json"
    timeout: float | None = None
    """Seconds the server may take between two bytes; None: what the client was made with."""


# The same for every noun ------------------------------------------------------------------------------------------


def getter(collection: str, body: type[BodyT]) -> Callable[[str], Call[BodyT]]:
    """Make the call that gets one resource."""

    def get(name: str, /) -> Call[BodyT]:
        """Get the one with this id or name."""
        return Call(method="GET", path=_path(collection, name), answer=body)

    return get


def renamer(collection: str, body: type[BodyT]) -> Callable[[str, str | None], Call[BodyT]]:
    """Make the call that renames one resource."""

    def rename(name: str, new: str | None, /) -> Call[BodyT]:
        """Give the one with this id or name another name; None takes its name away."""
        return Call(method="PATCH", path=_path(collection, name), json={"name": new}, answer=body)

    return rename


def deleter(collection: str) -> Callable[[str], Call[None]]:
    """Make the call that deletes one resource."""

    def delete(name: str, /) -> Call[None]:
        """Delete the one with this id or name; Conflict while something else needs it."""
        return Call(method="DELETE", path=_path(collection, name), answer=None)

    return delete


def lister(collection: str, page: type[Page[BodyT]]) -> Callable[[], Call[Page[BodyT]]]:
    """Make the call that gets a page of a collection."""

    def list_all() -> Call[Page[BodyT]]:
        """Iterate over all of them, the newest first."""
        return Call(method="GET", path=_path(collection), answer=page)

    return list_all


# Datasets ---------------------------------------------------------------------------------------------------------


def datasets_upload(
    file: PathOrFile,
    *,
    name: str | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    append_to: str | None = None,
    replace: bool = False,
    filename: str | None = None,
    progress: bool = False,
) -> Call[UploadedDataset]:
    """Upload a JSONL, JSON or Parquet file, streamed; the same rows again give the same dataset.

    `on_error="skip"` takes the good rows and reports the others. `append_to` names a dataset whose rows come first.
    `replace` moves a name that other rows have. `filename` is the name an open file is known by; a row without a
    `dataset` field has it as its origin. Raises `Invalid` with the bad lines, and then nothing is stored.
    """
    form = _form(name=name, on_error=on_error, append_to=append_to, replace=replace)
    return _uploading("datasets", UploadedDataset, file, "file", form, filename=filename, progress=progress)


def datasets_content(dataset: str, /, *, source: str | None = None) -> Call[None]:
    """Get the original rows, one per line; with `source` one uploaded file, byte for byte, by its SHA-256."""
    return _content(_path("datasets", dataset, "content"), _params(source=source))


def datasets_rows(
    dataset: str,
    /,
    *,
    origin: str | None = None,
    q: str | None = None,
    limit: int | None = None,
    after: str | None = None,
) -> Call[ExampleRows]:
    """Get a page of a dataset's rows with their text."""
    params = _params(origin=origin, q=q, limit=limit, after=after)
    return Call(method="GET", path=_path("datasets", dataset, "rows"), params=params, answer=ExampleRows)


def datasets_lengths(dataset: str, /, *, bins: int | None = None) -> Call[Lengths]:
    """Get how long a dataset's rows are, in bytes: a histogram of at most so many `bins` for each origin."""
    return Call(method="GET", path=_path("datasets", dataset, "lengths"), params=_params(bins=bins), answer=Lengths)


# Tasks ------------------------------------------------------------------------------------------------------------


def tasks_upload(
    path: PathOrFile, *, name: str, kind: TaskKind, replace: bool = False, progress: bool = False
) -> Call[Task]:
    """Upload a task's files: one file, a zip, or a folder, which is zipped while it is sent."""
    form = _form(name=name, kind=kind, replace=replace)
    return _uploading("tasks", Task, path, "files", form, progress=progress)


def tasks_register(path: str | os.PathLike[str], *, name: str, kind: TaskKind, replace: bool = False) -> Call[Task]:
    """Register a task that lies in a folder or file of the server, inside an allowed root."""
    return _post("tasks", Task, path=os.fspath(path), name=name, kind=kind, replace=replace)


def tasks_content(name: str, /, *, split: Split | None = None, rows: int | None = None) -> Call[None]:
    """Get a task's rows as a dataset takes them."""
    return _content(_path("tasks", name, "content"), _params(split=split, rows=rows))


# Checkpoints, adapters and runs --------------------------------------------------------------------------------------


class CheckpointFields(TypedDict, total=False):
    """What the adapter's own files do not say, see `gradstore.types.CheckpointRegister`."""

    name: str | None
    model: str | None
    revision: str | None
    learning_rate: float | None
    step: int | None
    precision: Precision | None


def checkpoints_upload(
    folder: PathOrFile, *, progress: bool = False, **fields: Unpack[CheckpointFields]
) -> Call[Checkpoint]:
    """Upload an adapter folder (PEFT, HF Trainer or LESS layout) or a zip of one."""
    form = _form(**fields)
    return _uploading("checkpoints", Checkpoint, folder, "files", form, progress=progress)


def checkpoints_register(
    path: str | os.PathLike[str] | None = None, **fields: Unpack[CheckpointFields]
) -> Call[Checkpoint]:
    """Register an adapter folder that lies on the server, inside an allowed root; without one the `model` itself."""
    return _post("checkpoints", Checkpoint, path=None if path is None else os.fspath(path), **fields)


class AdapterFields(TypedDict, total=False):
    """What is said of an adapter beside where it is, see `gradstore.types.AdapterRegister`."""

    name: str | None
    base_model: str | None
    revision: str | None
    dataset: str | None
    trained_on: str | None


def adapters_upload(folder: PathOrFile, *, progress: bool = False, **fields: Unpack[AdapterFields]) -> Call[Adapter]:
    """Put an adapter into the bank: upload its PEFT folder, or a zip of one."""
    return _uploading("adapters", Adapter, folder, "files", _form(**fields), progress=progress)


def adapters_register(
    path: str | os.PathLike[str] | None = None,
    *,
    finetune: str | None = None,
    checkpoint: str | None = None,
    **fields: Unpack[AdapterFields],
) -> Call[Adapter]:
    """Put an adapter into the bank of a fine-tune, a checkpoint, or a PEFT folder that lies on the server."""
    source = {"finetune": finetune, "checkpoint": checkpoint, "path": None if path is None else os.fspath(path)}
    return _post("adapters", Adapter, **source, **fields)


def adapters_list(
    *,
    base_model: str | None = None,
    revision: str | None = None,
    rank: int | None = None,
    target: str | Sequence[str] | None = None,
    dataset: str | None = None,
) -> Call[Page[Adapter]]:
    """Iterate over the adapters, the newest first: of a base model, a rank, a dataset, and on all of some targets."""
    asked = _params(base_model=base_model, revision=revision, rank=rank, target=target, dataset=dataset)
    return Call(method="GET", path="/adapters", params=asked, answer=Page[Adapter])


class AdapterChoiceFields(TypedDict, total=False):
    """The fields of `gradstore.types.AdapterChoiceRequest`, which describes them and has their defaults."""

    task: Required[str]
    shots: int | None
    seed: int | None
    adapters: str | Sequence[str] | None
    base_model: str | None
    revision: str | None
    rank: int | None
    target: str | Sequence[str] | None
    dataset: str | None
    candidates: int | None
    size: int | None
    similarity: AdapterSimilarity | None
    template: TemplateName | None
    max_length: int | None
    max_new_tokens: int | None
    precision: Precision | None
    name: str | None


def adapter_choices_create(**fields: Unpack[AdapterChoiceFields]) -> Call[AdapterChoiceJob]:
    """Choose adapters of the bank for a task, from a few of its validation rows."""
    return _post("adapters/choices", AdapterChoiceJob, **_lists(fields))


def adapter_choices_estimate(**fields: Unpack[AdapterChoiceFields]) -> Call[AdapterChoiceEstimate]:
    """Say how many adapters `create` with the same arguments would score, and start nothing."""
    return _post("adapters/choices", AdapterChoiceEstimate, **_lists(fields), dry_run=True)


def adapter_choices_sets(name: str, /, *, limit: int | None = None, after: str | None = None) -> Call[AdapterSets]:
    """Get a page of the sets of a choice, the best first."""
    params = _params(limit=limit, after=after)
    return Call(method="GET", path=_path("adapters/choices", name, "sets"), params=params, answer=AdapterSets)


def adapter_choices_shots(name: str, /, *, limit: int | None = None, after: str | None = None) -> Call[AdapterShots]:
    """Get a page of the shots of a choice, in the order of the task's rows."""
    params = _params(limit=limit, after=after)
    return Call(method="GET", path=_path("adapters/choices", name, "shots"), params=params, answer=AdapterShots)


class MixtureFields(TypedDict, total=False):
    """A mixture of LoRA experts, see `gradstore.types.MixtureSettings`."""

    experts: int | str | Sequence[int] | None
    top_k: int | str | Sequence[int] | None
    rank: int | Sequence[int] | None
    alpha: float | None
    modules: Sequence[str] | None
    router: RouterSettings | Mapping[str, Any] | None
    router_only: bool | None


def allocations_preview(
    model: str, *, revision: str | None = None, precision: Precision | None = None, **mixture: Unpack[MixtureFields]
) -> Call[Allocation]:
    """What a mixture would take in a model: layers, numbers and bytes; nothing is kept."""
    settings = {name: value for name, value in mixture.items() if value is not None}
    router = settings.get("router")
    if isinstance(router, BaseModel):
        settings["router"] = router.model_dump(mode="json")
    body = {"model": model, "revision": revision, "precision": precision, "mixture": settings}
    return _post("allocations/preview", Allocation, **body)


def runs_create(checkpoints: Sequence[str], *, name: str | None = None) -> Call[Run]:
    """Group checkpoints of one base model into a run, in this order."""
    return _post("runs", Run, checkpoints=_many(checkpoints), **_given(name=name))


# Gradients --------------------------------------------------------------------------------------------------------


class GradientsFields(TypedDict, total=False):
    """The fields of `gradstore.types.GradientsRequest`, which describes them and has their defaults."""

    dataset: str | None
    task: str | None
    run: str | None
    checkpoints: str | Sequence[str] | None
    weights: str | Sequence[str] | None
    kinds: FeatureKind | Sequence[FeatureKind] | None
    adam: AdamForm | Literal["both"] | None
    logodds_form: LogoddsForm | None
    reduction: Reduction | None
    dims: int | Sequence[int] | None
    projection: ProjectionName | None
    seed: int | None
    dtype: FeatureDtype | None
    template: TemplateName | None
    max_length: int | None
    precision: Precision | None
    quantisation: Quantisation | None
    attention: Attention | None
    gradient_checkpointing: bool | None
    token_budget: int | None
    name: str | None


def gradients_create(**fields: Unpack[GradientsFields]) -> Call[GradientsJob]:
    """Compute the projected gradient of every row of a dataset, or of a task's validation rows, in several kinds and
    dims from one pass; rows that have one already are not computed again."""
    return _post("gradients", GradientsJob, **_lists(fields))


def gradients_estimate(**fields: Unpack[GradientsFields]) -> Call[Estimate]:
    """Say what `create` with the same arguments would cost, and start nothing."""
    return _post("gradients", Estimate, **_lists(fields), dry_run=True)


def gradients_rows(
    name: str, /, *, feature_set: str | None = None, limit: int | None = None, after: str | None = None
) -> Call[FeatureRows]:
    """Get a page of what is known of a feature set's rows."""
    params = _params(feature_set=feature_set, limit=limit, after=after)
    return Call(method="GET", path=_path("gradients", name, "rows"), params=params, answer=FeatureRows)


def gradients_features(
    name: str, /, *, accept: str, feature_set: str | None = None, start: int | None = None, stop: int | None = None
) -> Call[None]:
    """Get the features of a feature set, as an array of float32."""
    params = _params(feature_set=feature_set, start=start, stop=stop)
    return _content(_path("gradients", name, "features"), params, accept=accept)


# Conversions ------------------------------------------------------------------------------------------------------


class ConversionFields(TypedDict, total=False):
    """The fields of `gradstore.types.ConversionRequest`, which describes them and has their defaults."""

    feature_sets: str | Sequence[str] | None
    gradients: str | None
    dataset: str | None
    task: str | None
    run: str | None
    dtype: Required[FeatureDtype]
    name: str | None


def conversions_create(**fields: Unpack[ConversionFields]) -> Call[ConversionJob]:
    """Make feature sets of a narrower dtype from stored ones, without a model; what exists is not made again."""
    return _post("conversions", ConversionJob, **_lists(fields))


# Imports ----------------------------------------------------------------------------------------------------------


class ImportFields(TypedDict, total=False):
    """The fields of `gradstore.types.ImportRequest`, which describes them and has their defaults."""

    dataset: str | None
    task: str | None
    checkpoint: Required[str]
    projection_id: Required[str]
    kind: GradientKind | None
    adam: AdamForm | None
    reduction: Reduction | None
    dim: int | None
    dtype: FeatureDtype | None
    template: TemplateName | None
    max_length: int | None
    precision: Precision | None
    on_error: Literal["fail", "skip"] | None
    name: str | None


def imports_upload(path: PathOrFile, *, progress: bool = False, **fields: Unpack[ImportFields]) -> Call[ImportJob]:
    """Import features that another program has computed: a LESS gradient folder, which is zipped while it is sent, or
    a .pt, .npy or .safetensors file with a row an example.
    """
    return _uploading("imports", ImportJob, path, "files", _form(**fields), progress=progress)


def imports_register(path: str | os.PathLike[str], **fields: Unpack[ImportFields]) -> Call[ImportJob]:
    """Import features that lie in a folder or file of the server, inside an allowed root."""
    return _post("imports", ImportJob, path=os.fspath(path), **fields)


# Selection --------------------------------------------------------------------------------------------------------


class Question(TypedDict, total=False):
    """Which scores are meant; with one candidate in the store the rest may be left out, with several `Conflict` lists
    them."""

    task: str | Sequence[str] | None
    dataset: str | Sequence[str] | None
    run: str | None
    checkpoint: str | Sequence[str] | None
    weights: str | Sequence[str] | None
    kind: FeatureKind | None
    adam: AdamForm | None
    logodds_form: LogoddsForm | None
    reduction: Reduction | None
    dim: int | None
    dtype: FeatureDtype | None
    converted_from: FeatureDtype | Literal["none"] | None
    projection: StoredProjection | None
    projection_id: str | None
    seed: int | None
    template: TemplateName | None
    max_length: int | None
    precision: Precision | None
    quantisation: Quantisation | Literal["none"] | None
    aggregate: Aggregate | None
    combine: Combine | None
    method: SelectionMethod | None
    by: str | None
    budget: float | None
    strategy: Strategy | None
    neighbours: int | None
    beta: float | None
    capabilities: str | Sequence[str] | None
    nearness: ShotNearness | None
    bandwidth: float | None
    selection_seed: int | None


class Choice(TypedDict, total=False):
    """How rows are chosen by their scores, see docs/selection.md."""

    pct: float | None
    k: int | None
    exclude: str | Sequence[str] | None
    exclude_ids: str | Sequence[str] | None
    among: int | None
    clusters: int | None
    tau: float | None
    quota: str | Sequence[str] | Mapping[str, float] | None
    dedupe: float | None
    dedupe_by: DedupeBy | None
    match: str | None
    decontaminate: str | Sequence[str] | None
    exclude_contaminated: bool | None
    ngram: int | None


class Chosen(Question, Choice, total=False):
    """What is selected: the scores, and how rows are chosen by them."""


def select(*, limit: int | None = None, wait: float = 0.0, **fields: Unpack[Chosen]) -> Call[Selection]:
    """Choose the rows that help the task most; 202 and a scoring job where scores take longer than `wait` seconds."""
    quota = fields.pop("quota", None)
    shares = [f"{origin}:{share}" for origin, share in quota.items()] if isinstance(quota, Mapping) else quota
    params = _params(**fields, quota=shares, limit=limit, wait=wait)
    return Call(method="GET", path="/select", params=params, answer=Selection, timeout=wait + ANSWERING)


def scores(
    *, limit: int | None = None, after: str | None = None, wait: float = 0.0, **question: Unpack[Question]
) -> Call[Scores]:
    """Get a page of the score vector, in the order of the pool."""
    return Call(
        method="GET",
        path="/scores",
        params=_params(**question, limit=limit, after=after, wait=wait),
        answer=Scores,
        timeout=wait + ANSWERING,
    )


def score_distribution(
    *, bins: int | None = None, steps: int | None = None, wait: float = 0.0, **question: Unpack[Question]
) -> Call[ScoreDistribution]:
    """Get the histogram of a pool's scores by origin, and what the fractions 1/steps, 2/steps, … of the pool take."""
    return Call(
        method="GET",
        path="/scores/distribution",
        params=_params(**question, bins=bins, steps=steps, wait=wait),
        answer=ScoreDistribution,
        timeout=wait + ANSWERING,
    )


def overlaps(
    *, pct: float | None = None, k: int | None = None, wait: float = 0.0, **question: Unpack[Question]
) -> Call[Overlaps]:
    """Get what the selections of several tasks share, and how far the tasks agree on the pool, for each pair."""
    params = _params(**question, pct=pct, k=k, wait=wait)
    return Call(method="GET", path="/overlaps", params=params, answer=Overlaps, timeout=wait + ANSWERING)


def selections_explanations(
    name: str,
    /,
    *,
    origin: str | None = None,
    q: str | None = None,
    limit: int | None = None,
    after: str | None = None,
) -> Call[Explanations]:
    """Get a page of chosen rows with their text, their score for every subtask, and the nearest validation example."""
    params = _params(origin=origin, q=q, limit=limit, after=after)
    return Call(method="GET", path=_path("selections", name, "explanations"), params=params, answer=Explanations)


def selections_create(recipe: SelectionRecipe | Mapping[str, Any]) -> Call[Selection]:
    """Choose by a whole recipe; 202 and a scoring job where its scores are not ready."""
    whole = recipe if isinstance(recipe, SelectionRecipe) else SelectionRecipe.model_validate(recipe)
    return _post("selections", Selection, recipe=whole.model_dump(mode="json"))


def selections_get(name: str, /, *, limit: int | None = None, after: str | None = None) -> Call[Selection]:
    """Get a selection and a page of its rows."""
    return Call(
        method="GET", path=_path("selections", name), params=_params(limit=limit, after=after), answer=Selection
    )


def selections_content(name: str, /, *, format: Literal["ndjson", "csv"] = "ndjson") -> Call[None]:
    """Get the chosen original rows, best first; or, as CSV, the sorted table (file, row, score)."""
    accept = "text/csv" if format == "csv" else "application/x-ndjson"
    return _content(_path("selections", name, "content"), accept=accept)


def selections_export(name: str, /, *, format: ExportFormat, scores: bool | None = None) -> Call[None]:
    """Get the chosen rows in a format of tables or of a trainer."""
    return _content(_path("selections", name, "export"), _params(format=format, scores=scores))


def selections_provenance(name: str, /) -> Call[Provenance]:
    """Get what selected these rows, from what, for what, when and how, with the request that does it again."""
    return Call(method="GET", path=_path("selections", name, "provenance"), answer=Provenance)


def selections_card(name: str, /) -> Call[None]:
    """Get the provenance as a page."""
    return _content(_path("selections", name, "provenance"), accept="text/markdown")


# Fine-tunes -------------------------------------------------------------------------------------------------------


class Training(TypedDict, total=False):
    """How a model is trained, see `gradstore.types.FinetuneRequest`; the defaults are LESS's recipe."""

    revision: str | None
    lora: LoraSettings | Mapping[str, Any] | None
    learning_rate: float | None
    scheduler: Literal["linear", "cosine", "constant"] | None
    warmup_ratio: float | None
    weight_decay: float | None
    epochs: int | None
    batch_size: int | None
    device_batch_size: int | None
    max_length: int | None
    template: TemplateName | None
    precision: Precision | Literal["auto"] | None
    quantisation: Quantisation | None
    gradient_checkpointing: bool | None
    seed: int | None


class Trained(TypedDict, total=False):
    """What is trained on what."""

    dataset: str | None
    selection: str | None
    fraction: float | None
    rows: int | None
    model: Required[str]
    method: Method | None


class FinetuneFields(Trained, Training, total=False):
    """The fields of `gradstore.types.FinetuneRequest`, which describes them and has their defaults."""

    mixture: MixtureSettings | Mapping[str, Any] | None
    experts_from: str | Sequence[str] | None
    name: str | None


def finetunes_create(**fields: Unpack[FinetuneFields]) -> Call[FinetuneJob]:
    """Fine-tune a model on a selection, a dataset, or a random part of one; the defaults are LESS's recipe."""
    return _post("finetunes", FinetuneJob, **_lists(fields))


def finetunes_estimate(**fields: Unpack[FinetuneFields]) -> Call[Estimate]:
    """Say what `create` with the same arguments would cost, and start nothing."""
    return _post("finetunes", Estimate, **_lists(fields), dry_run=True)


# Evaluations ------------------------------------------------------------------------------------------------------


class EvaluationFields(TypedDict, total=False):
    """The fields of `gradstore.types.EvaluationRequest`, which describes them and has their defaults."""

    finetune: str | None
    checkpoint: str | None
    adapter: str | None
    adapters: Sequence[str] | None
    model: str | None
    revision: str | None
    combine: Combination | None
    merge_weights: Sequence[float] | None
    merge_rank: int | None
    merge_density: float | None
    arrow_top_k: int | None
    arrow_temperature: float | None
    tasks: Required[str | Sequence[str]]
    baseline: bool | None
    max_rows: int | None
    max_new_tokens: int | None
    template: TemplateName | None
    max_length: int | None
    precision: Precision | None
    quantisation: Quantisation | None
    bootstrap_samples: int | None
    seed: int | None
    name: str | None


def evaluations_create(**fields: Unpack[EvaluationFields]) -> Call[EvaluationJob]:
    """Measure a model on the test rows of tasks: loss and the task's metric, with confidence intervals."""
    return _post("evaluations", EvaluationJob, **_lists(fields))


# Generations ------------------------------------------------------------------------------------------------------


class GenerationFields(TypedDict, total=False):
    """The fields of `gradstore.types.GenerationRequest`, which describes them and has their defaults."""

    finetune: str | None
    checkpoint: str | None
    prompts: Required[str | Sequence[str | Sequence[Mapping[str, str]]]]
    max_new_tokens: int | None
    trace: bool | None
    trace_tokens: int | None
    template: TemplateName | None
    max_length: int | None
    precision: Precision | None
    name: str | None


def generations_create(**fields: Unpack[GenerationFields]) -> Call[GenerationJob]:
    """Let a model answer prompts greedily, and of a mixture of experts say which of them the tokens went to."""
    return _post("generations", GenerationJob, **_lists(fields))


# Validations ------------------------------------------------------------------------------------------------------


class ValidationFields(Training, total=False):
    """The fields of `gradstore.types.ValidationRequest`, which describes them and has their defaults."""

    dataset: Required[str]
    task: Required[str]
    model: Required[str]
    method: Method | None
    kind: ValidationKind | None
    scores: Sequence[ValidatedRecipe | Mapping[str, Any]] | None
    split: Split | None
    targets: ValidationTargets | None
    subsets: int | None
    fraction: float | None
    pct: float | None
    k: int | None
    repeats: int | None
    bootstrap_samples: int | None
    name: str | None


def validations_create(**fields: Unpack[ValidationFields]) -> Call[ValidationJob]:
    """Train on parts of a pool and compare what scores predict with what comes of it; trainings that exist are not
    done again."""
    return _post("validations", ValidationJob, **fields)


def validations_estimate(**fields: Unpack[ValidationFields]) -> Call[ValidationEstimate]:
    """Say how many trainings `create` with the same arguments would do and how long, and start nothing."""
    return _post("validations", ValidationEstimate, **fields, dry_run=True)


# Predictors and cascades ------------------------------------------------------------------------------------------


class Predicting(TypedDict, total=False):
    """What predictors and cascades have in common: `gradstore.types.PredictorSettings`."""

    dataset: Required[str]
    task: Required[str]
    run: str | None
    checkpoints: Sequence[str] | None
    weights: str | Sequence[str] | None
    kind: FeatureKind | None
    adam: AdamForm | None
    logodds_form: LogoddsForm | None
    reduction: Reduction | None
    dim: int | None
    dtype: FeatureDtype | None
    converted_from: FeatureDtype | Literal["none"] | None
    projection: ProjectionName | None
    seed: int | None
    template: TemplateName | None
    max_length: int | None
    precision: Precision | None
    quantisation: Quantisation | Literal["none"] | None
    aggregate: Aggregate | None
    features: Sequence[PredictorInput] | None
    input_checkpoint: str | None
    encoder: str | None
    model: PredictorModel | Literal["auto"] | None
    folds: int | None
    predictor_seed: int | None
    name: str | None


class PredictorFields(Predicting, total=False):
    """The fields of `gradstore.types.PredictorRequest`, which describes them and has their defaults."""

    sample: str | None
    fraction: float | None
    rows: int | None
    levels: int | None
    controls: bool | None


class CascadeFields(Predicting, total=False):
    """The fields of `gradstore.types.CascadeRequest`, which describes them and has their defaults."""

    budget: Required[float]
    sample_share: float | None
    rounds: int | None


def predictors_create(**fields: Unpack[PredictorFields]) -> Call[PredictorJob]:
    """Learn to predict a task's influence from a sample of a pool, measure how well that goes, and predict all rows."""
    return _post("predictors", PredictorJob, **_lists(fields))


def predictors_estimate(**fields: Unpack[PredictorFields]) -> Call[PredictorEstimate]:
    """Say what `create` with the same arguments would read and fit, and start nothing."""
    return _post("predictors", PredictorEstimate, **_lists(fields), dry_run=True)


def cascades_create(**fields: Unpack[CascadeFields]) -> Call[CascadeJob]:
    """Compute gradients of a random sample of a pool and of the rows predicted best from it, and of no others."""
    return _post("cascades", CascadeJob, **_lists(fields))


def cascades_estimate(**fields: Unpack[CascadeFields]) -> Call[CascadeEstimate]:
    """Say what `create` with the same arguments would compute, and start nothing."""
    return _post("cascades", CascadeEstimate, **_lists(fields), dry_run=True)


# Comparisons ------------------------------------------------------------------------------------------------------


class ComparisonFields(Training, total=False):
    """The fields of `gradstore.types.ComparisonRequest`, which describes them and has their defaults."""

    dataset: Required[str]
    tasks: Required[str | Sequence[str]]
    pct: float | None
    k: int | None
    contestants: Sequence[Contestant | Mapping[str, Any]] | None
    train: bool | None
    model: str | None
    method: Method | None
    split: Split | None
    repeats: int | None
    bootstrap_samples: int | None
    name: str | None


def comparisons_create(**fields: Unpack[ComparisonFields]) -> Call[ComparisonJob]:
    """Select in several ways from one pool, and compare what is selected, what it costs and what training on it
    gives."""
    return _post("comparisons", ComparisonJob, **_lists(fields))


def comparisons_estimate(**fields: Unpack[ComparisonFields]) -> Call[ComparisonEstimate]:
    """Say what `create` with the same arguments would compare, how many trainings it would do and how long, and start
    nothing."""
    return _post("comparisons", ComparisonEstimate, **_lists(fields), dry_run=True)


# Attributions -----------------------------------------------------------------------------------------------------


class AttributionFields(TypedDict, total=False):
    """The fields of `gradstore.types.AttributionRequest`, which describes them and has their defaults."""

    datasets: str | Sequence[str] | None
    origins: str | Sequence[str] | None
    k: int | None
    search: Search | None
    text: bool | None
    run: str | None
    checkpoints: str | Sequence[str] | None
    weights: str | Sequence[str] | None
    kind: FeatureKind | None
    query_kind: Literal["sgd", "adam", "sign"] | None
    adam: AdamForm | None
    logodds_form: LogoddsForm | None
    reduction: Reduction | None
    dim: int | None
    dtype: FeatureDtype | None
    converted_from: FeatureDtype | Literal["none"] | None
    projection: ProjectionName | None
    seed: int | None
    template: TemplateName | None
    max_length: int | None
    precision: Precision | None
    quantisation: Quantisation | Literal["none"] | None
    name: str | None


def attributions_create(
    rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], /, **fields: Unpack[AttributionFields]
) -> Call[AttributionJob]:
    """Find the training examples with the most and the least influence on what a model has said.

    `rows`: what it said, one row or several as datasets take them, `{"prompt": …, "completion": …}` or
    `{"messages": […]}`.
    """
    listed = [rows] if isinstance(rows, Mapping) else list(rows)
    return _post("attributions", AttributionJob, rows=[dict(row) for row in listed], **_lists(fields))


# Estimates --------------------------------------------------------------------------------------------------------


class EstimatesFields(TypedDict, total=False):
    """The fields of `gradstore.types.EstimatesRequest`, which describes them and has their defaults."""

    dataset: Required[str]
    tasks: Required[str | Sequence[str]]
    checkpoint: str | None
    logodds_form: LogoddsForm | None
    dim: int | None
    dtype: FeatureDtype | None
    projection: ProjectionName | None
    seed: int | None
    template: TemplateName | None
    max_length: int | None
    precision: Precision | None
    quantisation: Quantisation | Literal["none"] | None
    group_by: GroupBy | None
    labels: Mapping[str, str] | None
    annotations: str | None
    clusters: int | None
    search: SubsetSearch | None
    subsets: Sequence[Sequence[str]] | None
    count: int | None
    fraction: float | None
    draw_seed: int | None
    metric: EstimateMetric | None
    c: float | None
    scale: float | None
    abs_scale: float | None
    rescale: bool | None
    mode: EstimateMode | None
    keep_adapters: bool | None
    max_new_tokens: int | None
    name: str | None


def estimates_create(**fields: Unpack[EstimatesFields]) -> Call[EstimatesJob]:
    """Estimate what training on each of many subsets of a pool would do for tasks, from stored features alone."""
    return _post("estimates", EstimatesJob, **_lists(fields))


def estimates_estimate(**fields: Unpack[EstimatesFields]) -> Call[EstimatesCost]:
    """Say how many subsets `create` with the same arguments would estimate and how long, and start nothing."""
    return _post("estimates", EstimatesCost, **_lists(fields), dry_run=True)


def estimates_subsets(name: str, /, *, limit: int | None = None, after: str | None = None) -> Call[EstimatedSubsets]:
    """Get a page of the subsets of estimates."""
    params = _params(limit=limit, after=after)
    return Call(method="GET", path=_path("estimates", name, "subsets"), params=params, answer=EstimatedSubsets)


class EstimateValidationFields(Training, total=False):
    """The fields of `gradstore.types.EstimateValidationRequest`, which describes them and has their defaults."""

    estimates: Required[str]
    task: str | None
    model: Required[str]
    method: Method | None
    split: Split | None
    subsets: int | None
    scales: Sequence[float] | None
    bootstrap_samples: int | None
    name: str | None


def estimate_validations_create(**fields: Unpack[EstimateValidationFields]) -> Call[EstimateValidationJob]:
    """Train on some of the subsets of estimates, and compare the losses that come of it with those estimated."""
    return _post("estimates/validations", EstimateValidationJob, **fields)


def estimate_validations_estimate(**fields: Unpack[EstimateValidationFields]) -> Call[ValidationEstimate]:
    """Say how many trainings `create` with the same arguments would do and how long, and start nothing."""
    return _post("estimates/validations", ValidationEstimate, **fields, dry_run=True)


# Projectors and embeddings ----------------------------------------------------------------------------------------


class ProjectorFields(TypedDict, total=False):
    """The fields of `gradstore.types.ProjectorRequest`, which describes them and has their defaults."""

    streams: Required[ProjectorStreams | Mapping[str, str]]
    annotations: Required[str]
    config: ProjectorConfig | Mapping[str, Any] | None
    seed: int | None
    name: str | None


def projectors_create(**fields: Unpack[ProjectorFields]) -> Call[ProjectorJob]:
    """Train a network that tells from its streams which capabilities a row calls for."""
    return _post("projectors", ProjectorJob, **fields)


def projectors_estimate(**fields: Unpack[ProjectorFields]) -> Call[ProjectorEstimate]:
    """Say how long `create` with the same arguments would train, and start nothing."""
    return _post("projectors", ProjectorEstimate, **fields, dry_run=True)


def projectors_epochs(name: str, /) -> Call[ProjectorEpochs]:
    """Get the epochs of a projector that have ended so far, also while it is at work."""
    return Call(method="GET", path=_path("projectors", name, "epochs"), answer=ProjectorEpochs)


def projectors_content(name: str, /) -> Call[None]:
    """Get the network as safetensors, with what its rows are standardised with."""
    return _content(_path("projectors", name, "content"))


def projectors_histogram(name: str, /, *, selection: str) -> Call[CapabilityHistogram]:
    """Count the capabilities of a selection, of whatever method, and of the datasets that it was chosen from."""
    path, params = _path("projectors", name, "histogram"), _params(selection=selection)
    return Call(method="GET", path=path, params=params, answer=CapabilityHistogram)


def embeddings_create(
    *, projector: str, streams: ProjectorStreams | Mapping[str, str], name: str | None = None
) -> Call[EmbeddingJob]:
    """Place the rows of a dataset, or of a task, in a projector's ability space, by streams made as its own were."""
    return _post("embeddings", EmbeddingJob, projector=projector, streams=streams, name=name)


def embeddings_estimate(
    *, projector: str, streams: ProjectorStreams | Mapping[str, str], name: str | None = None
) -> Call[EmbeddingEstimate]:
    """Say what `create` with the same arguments would place and keep, and start nothing."""
    return _post("embeddings", EmbeddingEstimate, projector=projector, streams=streams, name=name, dry_run=True)


def embeddings_rows(
    name: str, /, *, limit: int | None = None, after: str | None = None, accept: str = "application/json"
) -> Call[EmbeddedRows]:
    """Get a page of an embedding's rows."""
    params = _params(limit=limit, after=after)
    return Call(method="GET", path=_path("embeddings", name, "rows"), params=params, answer=EmbeddedRows, accept=accept)


# Streams, annotations and taxonomies ----------------------------------------------------------------------------------


class StreamFields(TypedDict, total=False):
    """The fields of `gradstore.types.StreamRequest`, which describes them and has their defaults."""

    kind: Required[Literal["gradients", "hidden", "routing"]]
    dataset: str | None
    task: str | None
    gradients: str | None
    feature_set: str | None
    checkpoint: str | None
    layers: int | Sequence[int] | None
    template: TemplateName | None
    max_length: int | None
    precision: Precision | None
    quantisation: Quantisation | None
    token_budget: int | None
    name: str | None


def streams_create(**fields: Unpack[StreamFields]) -> Call[StreamJob]:
    """Name gradients of the store as a stream, or compute hidden states or routing weights of a dataset's rows, or of a
    task's validation rows."""
    return _post("streams", StreamJob, **_lists(fields))


def streams_upload(
    path: PathOrFile,
    *,
    dataset: str | None = None,
    task: str | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    name: str | None = None,
    progress: bool = False,
) -> Call[StreamJob]:
    """Upload rows of numbers, joined by id: a folder (or zip) with one .npy and `ids.json`, or a .safetensors file with
    ids in its metadata.

    `on_error="skip"` leaves out rows that are not finite and ids that no row has, and says so; else they are refused.
    """
    form = _form(dataset=dataset, task=task, on_error=on_error, name=name)
    return _uploading("streams", StreamJob, path, "files", form, progress=progress)


class AnnotationFields(TypedDict, total=False):
    """The fields of `gradstore.types.AnnotationRequest`, which describes them and has their defaults."""

    dataset: str | None
    task: str | None
    by: Literal["origin", "labeller"] | None
    taxonomy: str | None
    on_error: Literal["fail", "skip"] | None
    labeller: Labeller | Mapping[str, Any] | None
    again: str | None
    name: str | None


def streams_content(name: str, /, *, accept: str, start: int | None = None, stop: int | None = None) -> Call[None]:
    """Get the rows of a stream, as an array of float32."""
    return _content(_path("streams", name, "content"), _params(start=start, stop=stop), accept=accept)


def annotations_create(**fields: Unpack[AnnotationFields]) -> Call[AnnotationJob]:
    """Label rows by their origin, or by a chat model that the server's operator allows; or ask `again` about the rows
    whose replies could not be read."""
    return _post("annotations", AnnotationJob, **fields)


def annotations_estimate(**fields: Unpack[AnnotationFields]) -> Call[AnnotationEstimate]:
    """Say how many rows `create` with the same arguments would ask a labeller about, and ask nobody."""
    return _post("annotations", AnnotationEstimate, **fields, dry_run=True)


def annotations_upload(
    file: PathOrFile,
    *,
    dataset: str | None = None,
    task: str | None = None,
    taxonomy: str | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    name: str | None = None,
    progress: bool = False,
) -> Call[AnnotationJob]:
    """Upload labels, joined by id: JSONL, a JSON array or Parquet of `{id, categories}` (or `category`).

    `on_error="skip"` leaves out entries with unknown ids or names, and says so; else they are refused by line.
    """
    form = _form(dataset=dataset, task=task, taxonomy=taxonomy, on_error=on_error, name=name)
    return _uploading("annotations", AnnotationJob, file, "file", form, progress=progress)


def annotations_rows(
    name: str, /, *, unparsed: bool | None = None, limit: int | None = None, after: str | None = None
) -> Call[AnnotatedRows]:
    """Get a page of an annotation's rows with their labels."""
    params = _params(unparsed=unparsed, limit=limit, after=after)
    return Call(method="GET", path=_path("annotations", name, "rows"), params=params, answer=AnnotatedRows)


def taxonomies_create(
    capabilities: Sequence[Capability | Mapping[str, Any]] | None = None, *, name: str | None = None
) -> Call[Taxonomy]:
    """Record capabilities (`name`, `definition`) that rows can be labelled with; by default the thirteen of CODS."""
    return _post("taxonomies", Taxonomy, capabilities=capabilities, name=name)


# Jobs and the service -----------------------------------------------------------------------------------------------


def jobs_list(*, kind: JobKind | None = None, status: JobStatus | None = None) -> Call[Page[AnyJob]]:
    """Iterate over the jobs, the newest first."""
    return Call(method="GET", path="/jobs", params=_params(kind=kind, status=status), answer=Page[AnyJob])


def jobs_events(job: str, /) -> Call[None]:
    """Follow a job's state as server-sent events."""
    return Call(method="GET", path=_path("jobs", job, "events"), answer=None, accept="text/event-stream")


def canceller(job: type[BodyT]) -> Callable[[str], Call[BodyT]]:
    """Make the call that cancels a job of one kind."""

    def cancel(name: str, /) -> Call[BodyT]:
        """Cancel the job with this id; what it finished stays."""
        return Call(method="POST", path=_path("jobs", name, "cancel"), answer=job)

    return cancel


def retrier(job: type[BodyT]) -> Callable[[str], Call[BodyT]]:
    """Make the call that retries a job of one kind."""

    def retry(name: str, /) -> Call[BodyT]:
        """Go on with a failed or cancelled job from where it stopped."""
        return Call(method="POST", path=_path("jobs", name, "retry"), answer=job)

    return retry


def jobs_prioritise(name: str, priority: int, /) -> Call[AnyJob]:
    """Have the shards of the job with this id done before those of jobs with a lower priority (-10 to 10, at first 0),
    from the next one on."""
    return Call(method="PATCH", path=_path("jobs", name), json={"priority": priority}, answer=AnyJob)


def checkpoints_content(name: str, /) -> Call[None]:
    """Get the adapter as a zip of a PEFT folder."""
    return _content(_path("checkpoints", name, "content"), accept="application/zip")


def adapters_content(name: str, /) -> Call[None]:
    """Get an adapter of the bank as a zip of a PEFT folder."""
    return _content(_path("adapters", name, "content"), accept="application/zip")


def finetunes_content(name: str, /) -> Call[None]:
    """Get the last checkpoint as a zip of a PEFT folder, or of the model after a full fine-tune."""
    return _content(_path("finetunes", name, "content"), accept="application/zip")


def health() -> Call[Health]:
    """Say that the service lives, and its version."""
    return Call(method="GET", path="/health", answer=Health)


def audit(*, key: str | None = None, since: datetime | None = None) -> Call[Page[AuditEntry]]:
    """Iterate over who changed what, or was refused, the newest first; for keys with the scope `admin`.

    `key`: only of this API key, by id or name. `since`: only from this (aware) time on.
    """
    params = _params(key=key, since=since.isoformat() if since else None)
    return Call(method="GET", path="/audit", params=params, answer=Page[AuditEntry])


def ready() -> Call[Readiness]:
    """Say whether the service can work, what each part of it is at, and which workers it has seen.

    Raises `Unavailable` with the reasons where it cannot.
    """
    return Call(method="GET", path="/ready", answer=Readiness)


def usage() -> Call[Usage]:
    """Say how much of everything the store holds, and how many bytes its parts take on the server's disk."""
    return Call(method="GET", path="/usage", answer=Usage)


# Parts of a request -------------------------------------------------------------------------------------------------


def _path(collection: str, *parts: str) -> str:
    if "" in parts:
        raise ValueError("an id or name is empty")
    return f"/{collection}" + "".join(f"/{quote(part, safe='')}" for part in parts)


def _post(collection: str, answer: type[BodyT], /, **fields: Any) -> Call[BodyT]:
    body = {key: _plain(value) for key, value in fields.items()}
    return Call(method="POST", path=_path(collection), json=_given(**body), answer=answer)


def _content(path: str, params: tuple[tuple[str, str], ...] = (), *, accept: str = "*/*") -> Call[None]:
    return Call(method="GET", path=path, params=params, answer=None, accept=accept)


def _uploading(
    collection: str,
    answer: type[BodyT],
    file: PathOrFile,
    field: str,
    form: Mapping[str, str],
    *,
    filename: str | None = None,
    progress: bool,
) -> Call[BodyT]:
    upload = Upload(source=source(file, filename=filename), field=field, form=form, progress=progress)
    return Call(method="POST", path=_path(collection), upload=upload, answer=answer, timeout=INGESTING)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _form(**values: Any) -> dict[str, str]:
    return {key: _text(value) for key, value in _given(**values).items()}


def _params(**values: Any) -> tuple[tuple[str, str], ...]:
    return tuple((key, _text(item)) for key, value in _given(**values).items() for item in _many(value))


def _many(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    several = {
        *("adapters", "checkpoints", "datasets", "dims", "experts_from", "kinds", "layers", "origins", "prompts"),
        *("target", "tasks", "weights"),
    }
    return {key: _many(value) if key in several and value is not None else value for key, value in fields.items()}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
