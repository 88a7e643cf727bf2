"""The commands of projectors and of the embeddings that they give."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, print_outcome, start, started
from gradstore._cli.nouns import group_of
from gradstore._cli.options import DryRun, Json, Limit, Reference, Wait, given, takes
from gradstore._cli.output import Columns, is_terminal, print_json, print_list, print_object, print_table, say
from gradstore._cli.session import session
from gradstore.types import CapabilityHistogram, EmbeddingResult, ProjectorRequest, ProjectorResult

Gradients = Annotated[str, typer.Option("--gradients", help="Stream of gradients, by id or name.")]
Routing = Annotated[str | None, typer.Option("--routing", help="Stream of routing weights.")]
Hidden = Annotated[str | None, typer.Option("--hidden", help="Stream of hidden states, put behind the gradients.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--config", metavar="<name=value>", help="Of network or training, as epochs=40; repeat for several."),
]
Out = Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")]
TEXTS = {"annotations": "Labels of the streams' rows, by id or name.", "seed": "Seed of split, weights and noise."}
CAPABILITIES: Columns = {
    "capability": lambda row: row.name,
    "rows": lambda row: row.training_rows + row.rows,
    "judged": lambda row: row.rows,
    "precision": lambda row: _share(row.precision),
    "recall": lambda row: _share(row.recall),
    "f1": lambda row: _share(row.f1),
}
EPOCHS: Columns = {
    "stage": lambda row: row.stage,
    "epoch": lambda row: row.epoch,
    "loss": lambda row: f"{row.loss:.4f}",
    "validation": lambda row: f"{row.validation_loss:.4f}",
    "exact": lambda row: _share(row.exact_match),
    "f1": lambda row: _share(row.f1),
    "gram error": lambda row: f"{row.gram_error:.3f}",
    "temperature": lambda row: f"{row.temperature:.3f}",
}
COUNTED: Columns = {
    "capability": lambda row: row.name,
    "pool": lambda row: row.pool,
    "part": lambda row: _share(row.pool_share),
    "selected": lambda row: row.selected,
    "part ": lambda row: _share(row.selected_share),
    "enrichment": lambda row: None if row.enrichment is None else f"{row.enrichment:.2f}",
}
CALLED_FOR: Columns = {"capability": lambda pair: pair[0], "rows": lambda pair: pair[1]}
PLACED: Columns = {
    "row": lambda row: row.row,
    "capabilities": lambda row: None if row.probabilities is None else " ".join(f"{p:.2f}" for p in row.probabilities),
}

projectors = group_of("projectors", listed, help="Networks that place rows in an ability space.", own_show=True)
embeddings = group_of("embeddings", listed, help="Where projectors place rows.", own_show=True)


@projectors.command("create")
@takes(endpoints.projectors_create, request=ProjectorRequest, without=["streams", "config"], texts=TEXTS)
def create_projector(
    ctx: typer.Context,
    *,
    gradients: Gradients,
    routing: Routing = None,
    hidden: Hidden = None,
    config: Setting = None,
    wait: Wait = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Train a projector on labelled rows.

    Prints the job's id, or with --wait how well each capability is told, on rows that were not trained on.
    """
    streams = given({"gradients": gradients, "routing": routing, "hidden": hidden})
    with session(ctx) as store:
        asked = {"streams": streams, "config": _config(config or []), **given(fields)}
        start(store, "projectors", asked, wait=wait, dry_run=dry_run, as_json=as_json, show=print_trained)


@projectors.command("show")
def show_projector(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print how well capabilities are told. Before that, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.projectors.get(reference), print_trained, as_json=as_json)


@projectors.command("epochs")
def projector_epochs(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print the epochs that have ended, also of a projector at work."""
    with session(ctx) as store:
        print_list(store.projectors.epochs(reference).data, EPOCHS, as_json=as_json)


@projectors.command("histogram")
def projector_histogram(
    ctx: typer.Context,
    reference: Reference,
    selection: Annotated[str, typer.Argument(metavar="SELECTION", help="Selection, by id or name.")],
    *,
    as_json: Json = False,
) -> None:
    """Count the capabilities of a selection and of its pool."""
    with session(ctx) as store:
        found = store.projectors.histogram(reference, selection=selection)
        print_json(found) if as_json else _print_histogram(found)


@projectors.command("download")
def download_projector(ctx: typer.Context, reference: Reference, path: Out) -> None:
    """Save the network as safetensors."""
    with session(ctx) as store:
        typer.echo(store.projectors.download(reference, path, progress=is_terminal()))


@embeddings.command("create")
def create_embedding(
    ctx: typer.Context,
    *,
    projector: Annotated[str, typer.Option("--projector", help="Projector, by id or name.")],
    gradients: Gradients,
    routing: Routing = None,
    hidden: Hidden = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the embedding.")] = None,
    wait: Wait = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Place the rows of a dataset, or of a task.

    Their streams are made as those were that the projector was trained on. Prints the job's id, or with --wait how
    many rows call for each capability.
    """
    streams = given({"gradients": gradients, "routing": routing, "hidden": hidden})
    with session(ctx) as store:
        if dry_run:
            print_object(store.embeddings.estimate(projector=projector, streams=streams), as_json=as_json)
        else:
            job = store.embeddings.create(projector=projector, streams=streams, name=name)
            started(store, "embeddings", job, wait=wait, as_json=as_json, show=_print_placed)


@embeddings.command("show")
def show_embedding(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print how many rows call for each capability. Before that, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.embeddings.get(reference), _print_placed, as_json=as_json)


@embeddings.command("rows")
def embedding_rows(ctx: typer.Context, reference: Reference, *, limit: Limit = None, as_json: Json = False) -> None:
    """Print the probabilities of rows; with --json their places, too."""
    with session(ctx) as store:
        print_list(islice(store.embeddings.rows(reference), limit), PLACED, as_json=as_json)


@embeddings.command("download")
def download_embedding(ctx: typer.Context, reference: Reference, path: Out) -> None:
    """Save the rows' places as .npy or .safetensors."""
    with session(ctx) as store:
        typer.echo(store.embeddings.save(reference, path, progress=is_terminal()))


def print_trained(result: ProjectorResult) -> None:
    """Print how well each capability is told; what is of all together goes to stderr."""
    say(
        f"{result.parameters:,} parameters, {result.training_rows:,} rows trained on and {result.validation_rows:,} "
        f"that judge: F1 {result.f1:.3f}, all capabilities right {result.exact_match:.1%}, "
        f"Gram error {result.gram_error:.3f} ({result.seconds:.0f} s)"
    )
    print_table(result.capabilities, CAPABILITIES)


def _print_placed(result: EmbeddingResult) -> None:
    print_table(list(zip(result.capabilities, result.counts, strict=True)), CALLED_FOR)


def _print_histogram(found: CapabilityHistogram) -> None:
    say(f"{found.selected:,} of {found.pool:,} rows")
    print_table(found.capabilities, COUNTED)


def _config(settings: list[str]) -> dict[str, str] | None:
    """What is named of network and training. Raises `ValueError` for what names none.

    >>> _config(["epochs=40", "alpha=0.5"])
    {'epochs': '40', 'alpha': '0.5'}
    """
    pairs = [setting.partition("=") for setting in settings]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--config {name}: say name=value")
    return {name.strip().replace("-", "_"): value.strip() for name, _, value in pairs} or None


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
