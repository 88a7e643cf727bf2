"""The commands of features: gradients computed here, converted, or imported from another program."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, start, started
from gradstore._cli.nouns import group_of
from gradstore._cli.options import AS_TRAINED, DryRun, Json, Rows, Wait, given, takes
from gradstore._cli.output import Columns, is_terminal, print_list
from gradstore._cli.session import session
from gradstore.types import ConversionRequest, GradientsRequest, ImportRequest

FeaturesReference = Annotated[
    str, typer.Argument(metavar="JOB", help="Id or name of gradients, an import or a conversion.")
]

FeatureSetOption = Annotated[
    str | None, typer.Option("--feature-set", help="Feature set by id; may be left out where the job has one.")
]

ADAM = "Adam's direction as LESS's code has it (less), with bias correction (exact), or both of them."

CONVERTED = {
    "dtype": "Number type that is wanted.",
    "run": "Run by id or name: of a dataset or task, its checkpoints only.",
}

IMPORTED = {
    "checkpoint": "Checkpoint that the gradients were taken at.",
    "dim": "Numbers of a row; needed where a folder has several dims.",
    "kind": "Kind of the features; by default adam for a dataset and sgd for a task.",
    "on_error": "What to do with rows that are not finite: refuse the files, or store them without a feature.",
    "precision": "Number type of the base model while it computed; by default the checkpoint's.",
    "task": "Task by id or name: the features are those of its validation rows.",
}

COMPUTED: Columns = {
    "row": lambda row: row.row,
    "norm": lambda row: row.norm,
    "gradient": lambda row: row.raw_norm,
    "loss": lambda row: row.loss,
    "log-odds": lambda row: row.logodds,
    "tokens": lambda row: row.tokens,
    "no feature": lambda row: row.reason,
}

gradients = group_of("gradients", listed, help="Projected gradients of datasets and tasks.")
conversions = group_of("conversions", listed, help="Stored features made narrower: float16 to int8, say.")
imports = group_of("imports", listed, help="Features that another program has computed.")


@gradients.command("create")
@takes(endpoints.gradients_create, request=GradientsRequest, texts={**AS_TRAINED, "adam": ADAM})
def create_gradients(
    ctx: typer.Context, *, wait: Wait = False, dry_run: DryRun = False, as_json: Json = False, **fields: Any
) -> None:
    """Compute the gradients of a dataset, or of a task's rows.

    Prints the job's id. Of a task these are the validation rows. Name a dataset or a task, and a run or checkpoints;
    of models without an adapter, which weights are meant.
    What exists already is not computed again.
    """
    with session(ctx) as store:
        start(store, "gradients", given(fields), wait=wait, dry_run=dry_run, as_json=as_json)


@gradients.command("rows")
def gradients_rows(
    ctx: typer.Context,
    reference: FeaturesReference,
    *,
    feature_set: FeatureSetOption = None,
    limit: Rows = 20,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save all rows there, as .npy, .safetensors or .parquet.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print or save the length of each row's gradient, its loss and tokens, and why a row has no feature."""
    with session(ctx) as store:
        if output is not None:
            store.gradients.save_rows(reference, output, feature_set=feature_set, progress=is_terminal())
            return
        rows = store.gradients.rows(reference, feature_set=feature_set)
        print_list(islice(rows, limit or None), COMPUTED, as_json=as_json)


@gradients.command("features")
def gradients_features(
    ctx: typer.Context,
    reference: FeaturesReference,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to save them, as .npy or .safetensors.")],
    feature_set: FeatureSetOption = None,
    start: Annotated[int | None, typer.Option(min=0, help="The first row.")] = None,
    stop: Annotated[int | None, typer.Option(min=0, help="The row after the last one.")] = None,
) -> None:
    """Save the features themselves: float32, one row an example. A row without a feature is NaN."""
    with session(ctx) as store:
        saved = store.gradients.save_features(
            reference, output, feature_set=feature_set, start=start, stop=stop, progress=is_terminal()
        )
        typer.echo(saved)


@conversions.command("create")
@takes(endpoints.conversions_create, request=ConversionRequest, texts=CONVERTED)
def create_conversion(ctx: typer.Context, *, wait: Wait = False, as_json: Json = False, **fields: Any) -> None:
    """Make feature sets of a narrower dtype from stored ones, without a model.

    Prints the job's id. Name feature sets, the job that made them, a dataset or a task.
    What exists is not converted again.
    """
    with session(ctx) as store:
        started(store, "conversions", store.conversions.create(**given(fields)), wait=wait, as_json=as_json)


@imports.command("create")
@takes(endpoints.imports_upload, request=ImportRequest, without=["progress"], texts=IMPORTED)
def create_import(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="LESS's folder, a zip of it, or a file of features.")],
    *,
    on_server: Annotated[bool, typer.Option("--on-server", help="The path is one of the server's.")] = False,
    wait: Wait = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Import features that another program has computed.

    LESS's gradient folder (dim8192/all_unormalized.pt and the like), .npy, .pt or .safetensors with a row an example.
    Prints the job's id. They are compared only with features of the same --projection-id.
    """
    with session(ctx) as store:
        job = (
            store.imports.register(path, **given(fields))
            if on_server
            else store.imports.upload(path, progress=is_terminal(), **given(fields))
        )
        started(store, "imports", job, wait=wait, as_json=as_json)
