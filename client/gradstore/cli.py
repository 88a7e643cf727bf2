"""The command line: `gradstore …`.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done, 1 refused or not reached, 2 wrong usage, 3 the
job failed, 130 interrupted, 141 the reader of stdout went away. The client itself is imported when a command runs, so
`--help` is quick; `serve` and `worker` come from the server's distribution, by entry points of the group
"gradstore.commands", and are imported only when they are called.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import gradstore
from gradstore import _cli_attributions as attributions
from gradstore import _endpoints as endpoints
from gradstore import errors, recipes, types
from gradstore._cli_options import given, takes
from gradstore._cli_output import (
    Columns,
    ago,
    is_terminal,
    print_json,
    print_lines,
    print_list,
    print_object,
    print_table,
    say,
    say_lost_rows,
    shortened,
)
from gradstore._cli_validations import JUDGED, SCORES_HELP, TEXTS, read_scores
from gradstore._cli_words import in_commands
from gradstore.types import (
    Checkpoint,
    ConversionRequest,
    EvaluationRequest,
    ExportFormat,
    FinetuneRequest,
    GradientsRequest,
    ImportRequest,
    Interval,
    Job,
    JobKind,
    JobStatus,
    Task,
    Turn,
    ValidationRequest,
)

if TYPE_CHECKING:
    from gradstore import GradientStore

SERVER_COMMANDS = {
    "serve": "Serve the API, with a worker beside it.",
    "worker": "Do the jobs of a store, beside other workers.",
}
ORDER = (
    *("less", "datasets", "tasks", "finetunes", "gradients", "select", "scores", "distribution", "overlaps"),
    *("selections", "why", "attributions", "evaluations", "validations", "conversions", "checkpoints", "runs"),
    *("imports", "jobs", "usage", "health"),
)
VERBS = (
    *("upload", "register", "create", "list", "show", "rows", "explain", "lengths", "features", "content"),
    *("export", "provenance", "download"),
    *("wait", "watch", "cancel", "retry", "rename", "delete"),
)
MISSING = "Missing: pip install 'gradstore-server[service,worker]'"
REFUSED, USAGE, FAILED, INTERRUPTED, UNREAD = 1, 2, 3, 130, 141


class Commands(TyperGroup):
    """The commands of this distribution, and those of the server where it is installed."""

    def make_context(self, *args: Any, **settings: Any) -> Any:
        """Read the command line; `--help` is printed here."""
        with _unread_output():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was called."""
        with _unread_output():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of their use."""
        names = super().list_commands(ctx)
        return [*SERVER_COMMANDS, *sorted(names, key=ORDER.index)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command; one of the server as a note of what it does."""
        return _noted(cmd_name) if cmd_name in SERVER_COMMANDS else super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called; one of the server is imported here."""
        if args and args[0] in SERVER_COMMANDS:
            return args[0], _loaded(args[0]), args[1:]
        return super().resolve_command(ctx, args)


class Verbs(TyperGroup):
    """The commands of a noun, in the order of their use."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return sorted(super().list_commands(ctx), key=VERBS.index)


@contextmanager
def _unread_output() -> Iterator[None]:
    """End quietly when the reader of stdout has read enough (`| head -1`), with the status a shell gives to SIGPIPE.

    The signal itself stays ignored, as Python leaves it: a connection that breaks would raise it, too.
    """
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered is not tried again
        raise typer.Exit(UNREAD) from None


def _entry_points(name: str) -> Iterable[Any]:
    return entry_points(group="gradstore.commands", name=name)


def _noted(name: str) -> Any:
    """A command that is described and not imported."""
    return _command(name, lambda: None, help=SERVER_COMMANDS[name] if _entry_points(name) else MISSING)


def _loaded(name: str) -> Any:
    for entry_point in _entry_points(name):
        return _command(name, entry_point.load())

    def missing() -> None:
        say(MISSING)
        raise typer.Exit(REFUSED)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return _command(name, missing, help=MISSING, context_settings=settings)


def _command(name: str, function: Callable[..., Any], **settings: Any) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, **settings)(function)
    return typer.main.get_command(app)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they would print the key
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 refused, 2 wrong usage, 3 the job failed, 130 interrupted, 141 the reader of stdout "
    "went away.",
)


@dataclass(frozen=True)
class Target:
    """The server a command is for."""

    url: str | None
    api_key: str | None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(gradstore.__version__)
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    *,
    url: Annotated[
        str | None, typer.Option(envvar="GRADSTORE_URL", help="Address of the server; else http://localhost:8000.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="GRADSTORE_API_KEY", help="Key of the server; better as a variable.")
    ] = None,
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find the training examples that help a task, by their gradients.

    The usual way: datasets upload, tasks upload, finetunes create (warm-up), gradients create for both, select,
    finetunes create on the selection, evaluations create. Or all of it at once: less.
    """
    ctx.obj = Target(url, api_key)


@contextmanager
def _session(ctx: typer.Context) -> Iterator[GradientStore]:
    """A client for a command; its errors become messages and exit codes."""
    target: Target = ctx.find_root().obj
    try:
        with gradstore.GradientStore(target.url, api_key=target.api_key) as store:
            yield store
    except errors.JobFailed as error:
        _end(FAILED, in_commands(error), error)
    except errors.ServerError as error:
        _end(REFUSED, f"{in_commands(error)}\n(request {error.request_id})", error)
    except errors.GradstoreError as error:
        _end(REFUSED, in_commands(error), error)
    except (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _end(REFUSED, in_commands(error), error)
    except ValueError as error:
        _end(USAGE, in_commands(error), error)
    except KeyboardInterrupt as error:
        _end(INTERRUPTED, "interrupted", error)


def _end(code: int, message: str, error: BaseException) -> None:
    say(message)
    raise typer.Exit(code) from error


# Options and arguments that several commands have -------------------------------------------------------------------

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until the job is done; Ctrl-C leaves it at work.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and start nothing.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait at most; the job goes on.")]
Limit = Annotated[int | None, typer.Option(min=1, help="How many to print; else all.")]
Rows = Annotated[int, typer.Option("--limit", min=0, help="How many rows to print; 0 prints all.")]
Reference = Annotated[str, typer.Argument(metavar="ID", help="Id or name.")]
JobReference = Annotated[str, typer.Argument(metavar="JOB", help="Id or name of the job.")]
FeaturesReference = Annotated[
    str, typer.Argument(metavar="JOB", help="Id or name of gradients, an import or a conversion.")
]
LocalPath = Annotated[Path, typer.Argument(metavar="PATH", exists=True, help="File, zip or folder of this machine.")]
ServerPath = Annotated[str, typer.Argument(metavar="PATH", help="Path on the server, inside an allowed root.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print the sorted table (file, row, score) as CSV.")]
AsLines = Annotated[bool, typer.Option("--lines", help="Print the chosen original rows.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Save the original rows there; a path in .csv gets the table.")
]


FeatureSetOption = Annotated[
    str | None, typer.Option("--feature-set", help="Feature set by id; may be left out where the job has one.")
]
AS_TRAINED = {
    "max_length": "Tokens kept of a row; by default as the run was trained.",
    "precision": "Number type of the base model while it computes; by default as the run was trained.",
    "template": "How a conversation is written as text; by default as the run was trained.",
}
CONVERTED = {
    "dtype": "Number type that is wanted.",
    "run": "Run by id or name: of a dataset or task, its checkpoints only.",
}
SCORING = {
    "method": "What a row's score is: its influence on the task (the default), its likeness by hidden states (rds), a "
    "sentence encoder (embedding) or words (bm25), or a number drawn for it (random).",
    "task": "Task by id or name; repeat for several.",
}
ADAM = "Adam's direction as LESS's code has it (less), with bias correction (exact), or both of them."
IMPORTED = {
    "checkpoint": "Checkpoint that the gradients were taken at.",
    "dim": "Numbers of a row; needed where a folder has several dims.",
    "kind": "Kind of the features; by default adam for a dataset and sgd for a task.",
    "on_error": "What to do with rows that are not finite: refuse the files, or store them without a feature.",
    "precision": "Number type of the base model while it computed; by default the checkpoint's.",
    "task": "Task by id or name: the features are those of its validation rows.",
}
KINDS = "What the files hold: mmlu, bbh, tydiqa, gsm8k, scienceqa, jsonl, or what else the server can read."


# What every noun has ------------------------------------------------------------------------------------------------


def _progress(job: Job[Any, Any]) -> str:
    return f"{job.progress.done:,}/{job.progress.total:,} {job.progress.unit}"


JOBS: Columns = {
    "id": lambda job: job.id,
    "name": lambda job: job.name,
    "status": lambda job: job.status,
    "progress": _progress,
    "age": lambda job: ago(job.created_at),
}
COLUMNS: dict[str, Columns] = {
    "datasets": {
        "id": lambda dataset: dataset.id,
        "name": lambda dataset: dataset.name,
        "rows": lambda dataset: dataset.rows,
        "bytes": lambda dataset: dataset.bytes,
        "age": lambda dataset: ago(dataset.created_at),
    },
    "tasks": {
        "id": lambda task: task.id,
        "name": lambda task: task.name,
        "kind": lambda task: task.kind,
        "subtasks": lambda task: len(task.subtasks),
        "validation": lambda task: task.validation,
        "test": lambda task: task.test,
        "age": lambda task: ago(task.created_at),
    },
    "checkpoints": {
        "id": lambda checkpoint: checkpoint.id,
        "name": lambda checkpoint: checkpoint.name,
        "model": lambda checkpoint: checkpoint.model,
        "run": lambda checkpoint: checkpoint.run,
        "epoch": lambda checkpoint: checkpoint.epoch,
        "learning rate": lambda checkpoint: checkpoint.learning_rate,
        "moments": lambda checkpoint: checkpoint.has_moments,
    },
    "runs": {
        "id": lambda run: run.id,
        "name": lambda run: run.name,
        "model": lambda run: run.model,
        "checkpoints": lambda run: len(run.checkpoints),
        "fine-tune": lambda run: run.finetune,
        "age": lambda run: ago(run.created_at),
    },
    "gradients": JOBS,
    "conversions": JOBS,
    "selections": {
        "id": lambda selection: selection.id,
        "name": lambda selection: selection.name,
        "tasks": lambda selection: ", ".join(selection.recipe.tasks),
        "rows": lambda selection: selection.count,
        "of": lambda selection: selection.pool,
        "age": lambda selection: ago(selection.created_at),
    },
    "finetunes": JOBS,
    "evaluations": JOBS,
    "validations": JOBS,
    "attributions": JOBS,
    "imports": JOBS,
    "jobs": {"kind": lambda job: job.kind, **JOBS},
}
HELP = {
    "datasets": "Pools of examples to choose from.",
    "tasks": "What a model should get better at, by a few rows.",
    "checkpoints": "Adapters and models: from fine-tunes, or your own.",
    "runs": "The checkpoints of one training, in order.",
    "gradients": "Projected gradients of datasets and tasks.",
    "conversions": "Stored features made narrower: float16 to int8, say.",
    "selections": "What select has answered.",
    "finetunes": "Trainings: the warm-up, and those on selections.",
    "evaluations": "Models measured on tasks.",
    "validations": "How well scores predict what training does.",
    "attributions": "Training examples behind what a model said.",
    "imports": "Features that another program has computed.",
    "jobs": "Work of all kinds: look, wait, cancel, go on.",
}
SELECTED: Columns = {
    "rank": lambda row: row.rank,
    "score": lambda row: row.score,
    "dataset": lambda row: row.dataset,
    "row": lambda row: row.row,
    "id": lambda row: row.id,
    "origin": lambda row: row.origin,
    "task": lambda row: row.task,
    "subtask": lambda row: row.subtask,
}
SCORED: Columns = {name: SELECTED[name] for name in ("dataset", "row", "score", "id", "origin", "task", "subtask")}
EXPLAINED: Columns = {
    "rank": lambda row: row.rank,
    "score": lambda row: row.score,
    "origin": lambda row: row.origin,
    "text": lambda row: _text(row.turns, 60),
    "best subtask": lambda row: max(row.subtasks, key=lambda one: one.score).subtask,
    "nearest": lambda row: _text(row.nearest.turns, 60),
    "influence": lambda row: row.nearest.influence,
}
SHARED: Columns = {
    "task": lambda pair: pair.tasks[0],
    "and": lambda pair: pair.tasks[1],
    "shared rows": lambda pair: pair.shared,
    "jaccard": lambda pair: pair.jaccard,
    "rank correlation": lambda pair: pair.rank_correlation,
}
CUTS: Columns = {
    "fraction": lambda cut: cut[0],
    "rows": lambda cut: cut[1],
    "score": lambda cut: cut[2],
    "origins": lambda cut: ", ".join(f"{name} {count:,}" for name, count in cut[3] if count),
}
COMPUTED: Columns = {
    "row": lambda row: row.row,
    "norm": lambda row: row.norm,
    "gradient": lambda row: row.raw_norm,
    "loss": lambda row: row.loss,
    "tokens": lambda row: row.tokens,
    "no feature": lambda row: row.reason,
}
READ: Columns = {
    "row": lambda row: row.row,
    "id": lambda row: row.id,
    "origin": lambda row: row.origin,
    "text": lambda row: _text(row.turns, 80),
}
LENGTHS: Columns = {
    "origin": lambda origin: origin[0],
    "rows": lambda origin: origin[1].rows,
    "shortest": lambda origin: origin[1].shortest,
    "median": lambda origin: origin[1].median,
    "longest": lambda origin: origin[1].longest,
}
MEASURED: Columns = {
    "model": lambda row: row.model,
    "task": lambda row: row.task_name,
    "subtask": lambda row: row.subtask or "(all)",
    "examples": lambda row: row.examples,
    "loss": lambda row: row.loss,
    "95 %": lambda row: _interval(row.loss_interval),
    "metric": lambda row: row.metric,
    "value": lambda row: row.value,
    "95 % ": lambda row: _interval(row.interval),
}


def _text(turns: Iterable[Turn], length: int) -> str:
    return shortened(" ⏎ ".join(turn.prefix + turn.content for turn in turns), length)


def _interval(interval: Interval | None) -> str | None:
    return None if interval is None else f"{interval.low:.4g} to {interval.high:.4g}"


def _groups() -> dict[str, typer.Typer]:
    """A group of commands for each noun, with those that all nouns have."""
    made = {}
    for noun, text in HELP.items():
        made[noun] = typer.Typer(cls=Verbs, no_args_is_help=True, help=text)
        app.add_typer(made[noun], name=noun)
        if noun != "jobs":
            _add_list(made[noun], noun)
            _add_rename(made[noun], noun)
        _add_delete(made[noun], noun)
        if noun not in {"selections", "evaluations", "validations", "attributions"}:
            _add_show(made[noun], noun)
    return made


def _add_list(group: typer.Typer, noun: str) -> None:
    @group.command("list", help=f"List the {noun}, the newest first.")
    def list_all(ctx: typer.Context, *, limit: Limit = None, as_json: Json = False) -> None:
        with _session(ctx) as store:
            print_list(islice(getattr(store, noun).list(), limit), COLUMNS[noun], as_json=as_json)


def _add_show(group: typer.Typer, noun: str) -> None:
    @group.command("show", help="Print everything known about one.")
    def show(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
        with _session(ctx) as store:
            print_object(getattr(store, noun).get(reference), as_json=as_json)


def _add_rename(group: typer.Typer, noun: str) -> None:
    @group.command("rename", help="Give one another name; without a new name, take its name away.")
    def rename(
        ctx: typer.Context,
        reference: Reference,
        name: Annotated[str | None, typer.Argument(metavar="NAME", help="The new name.")] = None,
    ) -> None:
        with _session(ctx) as store:
            typer.echo(getattr(store, noun).rename(reference, name).id)


def _add_delete(group: typer.Typer, noun: str) -> None:
    text = "Delete some; refused while something else needs them."
    if noun == "jobs":
        text = "Delete finished scoring jobs; their scores stay. Other jobs are deleted as what they are."

    @group.command("delete", help=text)
    def delete(
        ctx: typer.Context,
        references: Annotated[list[str], typer.Argument(metavar="ID", help="Ids or names.")],
    ) -> None:
        with _session(ctx) as store:
            for reference in references:
                getattr(store, noun).delete(reference)


groups = _groups()


def _started(store: GradientStore, noun: str, job: Job[Any, Any], *, wait: bool, as_json: bool) -> None:
    """Print a job that was started, or, with `wait`, as it ended."""
    if wait:
        try:
            job = getattr(store, noun).wait(job, progress=is_terminal())
        except KeyboardInterrupt:
            say(f"the job goes on: gradstore jobs wait {job.id}")
            raise
    elif not job.finished:
        say(f"{job.kind} {job.id} is {job.status}: gradstore jobs wait {job.id}")
    say_lost_rows(job.result)
    if as_json:
        print_json(job)
    elif noun == "evaluations" and job.result is not None:
        print_table(job.result.rows, MEASURED)
    elif noun == "validations" and job.result is not None:
        print_table(job.result.scores, JUDGED)
    elif noun == "attributions" and job.result is not None:
        attributions.print_result(job.result)
    else:
        typer.echo(job.id)


attributions.add(app, groups["attributions"], session=_session, started=_started)


# Datasets and tasks -------------------------------------------------------------------------------------------------


@groups["datasets"].command("upload")
@takes(endpoints.datasets_upload, without=["filename", "progress"])
def upload_dataset(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, JSON or Parquet; - is stdin.")],
    *,
    filename: Annotated[str | None, typer.Option(help="Name to know the file by, needed for stdin.")] = None,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Upload a pool of examples and print its id. The same rows again give the same id."""
    piped = str(file) == "-"
    if piped and filename is None:
        raise typer.BadParameter("stdin needs a name, such as --filename pool.jsonl")
    if not piped and not file.is_file():
        raise typer.BadParameter(f"{file} is a folder: name a file in it" if file.is_dir() else f"there is no {file}")
    sent = sys.stdin.buffer if piped else file
    with _session(ctx) as store:
        stored = store.datasets.upload(sent, filename=filename, progress=is_terminal(), **given(fields))
        report = stored.report
        say(f"{stored.rows:,} rows, {report.skipped:,} left out" + ("" if stored.created else "; stored before"))
        for remark in (*report.problems, *report.notes):
            say(f"  line {remark.line}: {remark.detail}")
        if report.total_notes > len(report.notes):
            say(f"  … and {report.total_notes - len(report.notes):,} more remarks")
        if as_json:
            print_json(stored)
        else:
            typer.echo(stored.id)


@groups["datasets"].command("rows")
@takes(endpoints.datasets_rows, without=["limit", "after"])
def dataset_rows(
    ctx: typer.Context, reference: Reference, *, limit: Rows = 20, as_json: Json = False, **fields: Any
) -> None:
    """Print rows with the beginning of their text; with --json all of it."""
    with _session(ctx) as store:
        print_list(islice(store.datasets.rows(reference, **given(fields)), limit or None), READ, as_json=as_json)


@groups["datasets"].command("lengths")
def dataset_lengths(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print how long the rows of each origin are, in bytes; with --json their histograms, too."""
    with _session(ctx) as store:
        found = store.datasets.lengths(reference)
        print_json(found) if as_json else print_table(found.origins.items(), LENGTHS)


@groups["datasets"].command("content")
def dataset_content(
    ctx: typer.Context,
    reference: Reference,
    *,
    source: Annotated[str | None, typer.Option(help="SHA-256 of an upload, to get it byte for byte.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save it there.")] = None,
) -> None:
    """Print the original rows, one per line."""
    if source is not None and output is None:
        raise typer.BadParameter("an upload is saved byte for byte: say where, with --output")
    with _session(ctx) as store:
        if output is None:
            print_lines(store.datasets.lines(reference))
        else:
            store.datasets.download(reference, output, source=source, progress=is_terminal())


@groups["tasks"].command("upload")
@takes(endpoints.tasks_upload, without=["progress"], texts={"kind": KINDS})
def upload_task(ctx: typer.Context, path: LocalPath, *, as_json: Json = False, **fields: Any) -> None:
    """Upload a task's files and print its id. A folder is sent as a zip."""
    with _session(ctx) as store:
        _stored_task(store.tasks.upload(path, progress=is_terminal(), **given(fields)), as_json=as_json)


@groups["tasks"].command("register")
@takes(endpoints.tasks_register, texts={"kind": KINDS})
def register_task(ctx: typer.Context, path: ServerPath, *, as_json: Json = False, **fields: Any) -> None:
    """Register a task that lies on the server. Prints its id."""
    with _session(ctx) as store:
        _stored_task(store.tasks.register(path, **given(fields)), as_json=as_json)


def _stored_task(task: Task, *, as_json: bool) -> None:
    say(f"{task.validation:,} validation and {task.test:,} test rows in {len(task.subtasks):,} subtasks")
    for note in task.notes:
        say(f"  {note}")
    if as_json:
        print_json(task)
    else:
        typer.echo(task.id)


# Checkpoints and runs -----------------------------------------------------------------------------------------------


@groups["checkpoints"].command("upload")
@takes(endpoints.checkpoints_upload, without=["progress"])
def upload_checkpoint(ctx: typer.Context, path: LocalPath, *, as_json: Json = False, **fields: Any) -> None:
    """Upload an adapter folder, or a zip of one. PEFT, HF Trainer or LESS layout; prints its id."""
    with _session(ctx) as store:
        _stored_checkpoint(store.checkpoints.upload(path, progress=is_terminal(), **given(fields)), as_json=as_json)


@groups["checkpoints"].command("register")
@takes(endpoints.checkpoints_register)
def register_checkpoint(
    ctx: typer.Context,
    path: Annotated[
        str | None, typer.Argument(metavar="PATH", help="Path on the server; left out, the model itself is registered.")
    ] = None,
    *,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Register an adapter folder of the server, or a base model itself. Prints its id."""
    with _session(ctx) as store:
        _stored_checkpoint(store.checkpoints.register(path, **given(fields)), as_json=as_json)


def _stored_checkpoint(checkpoint: Checkpoint, *, as_json: bool) -> None:
    if checkpoint.moments_note:
        say(checkpoint.moments_note)
    if as_json:
        print_json(checkpoint)
    else:
        typer.echo(checkpoint.id)


@groups["checkpoints"].command("download")
def download_checkpoint(
    ctx: typer.Context,
    reference: Reference,
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to make; a path in .zip gets the zip.")],
) -> None:
    """Save the adapter as a PEFT folder."""
    with _session(ctx) as store:
        typer.echo(store.checkpoints.download(reference, path, progress=is_terminal()))


@groups["runs"].command("create")
@takes(endpoints.runs_create)
def create_run(
    ctx: typer.Context,
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT", help="Checkpoints by id, in order.")],
    *,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Group checkpoints of one base model into a run and print its id."""
    with _session(ctx) as store:
        run = store.runs.create(checkpoints, **given(fields))
        if as_json:
            print_json(run)
        else:
            typer.echo(run.id)


# Jobs ---------------------------------------------------------------------------------------------------------------


@groups["gradients"].command("create")
@takes(endpoints.gradients_create, request=GradientsRequest, texts={**AS_TRAINED, "adam": ADAM})
def create_gradients(
    ctx: typer.Context, *, wait: Wait = False, dry_run: DryRun = False, as_json: Json = False, **fields: Any
) -> None:
    """Compute the gradients of a dataset, or of a task's rows.

    Prints the job's id. Of a task these are the validation rows. Name a dataset or a task, and a run or checkpoints;
    of models without an adapter, which weights are meant.
    What exists already is not computed again.
    """
    with _session(ctx) as store:
        if dry_run:
            print_object(store.gradients.estimate(**given(fields)), as_json=as_json)
        else:
            _started(store, "gradients", store.gradients.create(**given(fields)), wait=wait, as_json=as_json)


@groups["gradients"].command("rows")
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
    with _session(ctx) as store:
        if output is not None:
            store.gradients.save_rows(reference, output, feature_set=feature_set, progress=is_terminal())
            return
        rows = store.gradients.rows(reference, feature_set=feature_set)
        print_list(islice(rows, limit or None), COMPUTED, as_json=as_json)


@groups["gradients"].command("features")
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
    with _session(ctx) as store:
        saved = store.gradients.save_features(
            reference, output, feature_set=feature_set, start=start, stop=stop, progress=is_terminal()
        )
        typer.echo(saved)


@groups["conversions"].command("create")
@takes(endpoints.conversions_create, request=ConversionRequest, texts=CONVERTED)
def create_conversion(ctx: typer.Context, *, wait: Wait = False, as_json: Json = False, **fields: Any) -> None:
    """Make feature sets of a narrower dtype from stored ones, without a model.

    Prints the job's id. Name feature sets, the job that made them, a dataset or a task.
    What exists is not converted again.
    """
    with _session(ctx) as store:
        _started(store, "conversions", store.conversions.create(**given(fields)), wait=wait, as_json=as_json)


@groups["imports"].command("create")
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
    with _session(ctx) as store:
        job = (
            store.imports.register(path, **given(fields))
            if on_server
            else store.imports.upload(path, progress=is_terminal(), **given(fields))
        )
        _started(store, "imports", job, wait=wait, as_json=as_json)


@groups["finetunes"].command("create")
@takes(endpoints.finetunes_create, request=FinetuneRequest)
def create_finetune(
    ctx: typer.Context, *, wait: Wait = False, dry_run: DryRun = False, as_json: Json = False, **fields: Any
) -> None:
    """Train a model on a dataset, a random part, or a selection.

    Prints the job's id. The defaults are LESS's recipe. The checkpoints of all epochs form a run, which gradients are
    computed for.
    """
    with _session(ctx) as store:
        if dry_run:
            print_object(store.finetunes.estimate(**given(fields)), as_json=as_json)
        else:
            _started(store, "finetunes", store.finetunes.create(**given(fields)), wait=wait, as_json=as_json)


@groups["finetunes"].command("download")
def download_finetune(
    ctx: typer.Context,
    reference: Reference,
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to make; a path in .zip gets the zip.")],
) -> None:
    """Save the last checkpoint as a PEFT folder. Of a full fine-tune, the model."""
    with _session(ctx) as store:
        typer.echo(store.finetunes.download(reference, path, progress=is_terminal()))


@groups["evaluations"].command("create")
@takes(
    endpoints.evaluations_create,
    request=EvaluationRequest,
    texts={**AS_TRAINED, "checkpoint": "Checkpoint by id or name."},
)
def create_evaluation(ctx: typer.Context, *, wait: Wait = False, as_json: Json = False, **fields: Any) -> None:
    """Measure a model on the test rows of tasks.

    The model is a fine-tune, a checkpoint or a base model. Prints the job's id, or with --wait what was measured.
    """
    with _session(ctx) as store:
        _started(store, "evaluations", store.evaluations.create(**given(fields)), wait=wait, as_json=as_json)


@groups["evaluations"].command("show")
def show_evaluation(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print what was measured. Before that, everything known about the job."""
    with _session(ctx) as store:
        job = store.evaluations.get(reference)
        if as_json or job.result is None:
            print_object(job, as_json=as_json)
        else:
            print_table(job.result.rows, MEASURED)


@groups["validations"].command("create")
@takes(endpoints.validations_create, request=ValidationRequest, without=["scores"], texts=TEXTS)
def create_validation(
    ctx: typer.Context,
    *,
    scores: Annotated[list[str] | None, typer.Option(metavar="<name=value,…>", help=SCORES_HELP)] = None,
    wait: Wait = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Train on parts of a pool; see how well scores predict it.

    Prints the job's id, or with --wait a value for each of the scores: more is better. The trainings are the cost, and
    those that exist are not done again, so other scores can be judged later.
    """
    with _session(ctx) as store:
        asked = given({**fields, "scores": read_scores(scores or [])})
        if dry_run:
            print_object(store.validations.estimate(**asked), as_json=as_json)
        else:
            _started(store, "validations", store.validations.create(**asked), wait=wait, as_json=as_json)


@groups["validations"].command("show")
def show_validation(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print how well scores predict. Before that, everything known about the job."""
    with _session(ctx) as store:
        job = store.validations.get(reference)
        if as_json or job.result is None:
            print_object(job, as_json=as_json)
        else:
            print_table(job.result.scores, JUDGED)


@groups["jobs"].command("list")
def list_jobs(
    ctx: typer.Context,
    *,
    kind: Annotated[JobKind | None, typer.Option(help="Only jobs of this kind.")] = None,
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """List the jobs, the newest first."""
    with _session(ctx) as store:
        print_list(islice(store.jobs.list(kind=kind, status=status), limit), COLUMNS["jobs"], as_json=as_json)


@groups["jobs"].command("wait")
def wait_for_job(ctx: typer.Context, job: JobReference, *, timeout: Timeout = None, as_json: Json = False) -> None:
    """Wait until a job has succeeded. Prints its id; exit code 3 where it fails."""
    with _session(ctx) as store:
        done = store.jobs.wait(job, progress=is_terminal(), timeout=timeout)
        if as_json:
            print_json(done)
        else:
            typer.echo(done.id)


@groups["jobs"].command("watch")
def watch_job(ctx: typer.Context, job: JobReference, *, as_json: Json = False) -> None:
    """Print a line whenever a job changes. Ends when it is finished; exit code 3 where it fails."""
    with _session(ctx) as store:
        for state in store.jobs.events(job):
            if as_json:
                print_json(state)
            else:
                typer.echo(f"{state.status:<9}  {_progress(state)}")
            if state.finished and state.status != "succeeded":
                raise errors.JobFailed(state)


@groups["jobs"].command("cancel")
def cancel_job(ctx: typer.Context, job: JobReference, *, as_json: Json = False) -> None:
    """Stop a job; what it finished stays."""
    with _session(ctx) as store:
        print_object(store.jobs.cancel(job), as_json=True) if as_json else typer.echo(store.jobs.cancel(job).id)


@groups["jobs"].command("retry")
def retry_job(ctx: typer.Context, job: JobReference, *, wait: Wait = False, as_json: Json = False) -> None:
    """Go on with a failed or cancelled job from where it stopped."""
    with _session(ctx) as store:
        _started(store, "jobs", store.jobs.retry(job), wait=wait, as_json=as_json)


# Selection ----------------------------------------------------------------------------------------------------------


@app.command()
@takes(endpoints.select, without=["limit", "wait"], texts=SCORING)
def select(
    ctx: typer.Context,
    *,
    recipe: Annotated[
        str | None, typer.Option(help="Selection whose recipe is used again, or a JSON file with one; alone.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name to give the selection.")] = None,
    limit: Rows = 20,
    output: Output = None,
    as_lines: AsLines = False,
    as_csv: AsCsv = False,
    as_json: Json = False,
    timeout: Timeout = None,
    **fields: Any,
) -> None:
    """Choose the examples that help a task most.

    Prints the first of them; the selection's id, for finetunes create --selection, goes to stderr. Options that are
    left out must have one candidate in the store; with several, they are listed.
    """
    if sum((as_lines, as_csv, as_json)) > 1:
        raise typer.BadParameter("choose one of --lines, --csv and --json")
    with _session(ctx) as store:
        chosen = store.select(
            **given(fields),
            recipe=_recipe(recipe),
            limit=None if limit == 0 else limit,
            progress=is_terminal(),
            timeout=timeout,
        )
        if name is not None:
            store.selections.rename(chosen.id, name)
        say(f"{chosen.id}: {chosen.count:,} of {chosen.pool:,} rows")
        for reason, count in chosen.left_out.items():
            say(f"  {count:,} rows left out: {reason}")
        _say_what_to_know(chosen)
        if output is not None:
            store.selections.save(chosen.id, output, progress=is_terminal())
        if as_lines or as_csv:
            print_lines(store.selections.lines(chosen.id, format="csv" if as_csv else "ndjson"))
        elif as_json:
            print_json(chosen)
        elif output is None:
            print_table(chosen.data, SELECTED)


def _recipe(said: str | None) -> dict[str, Any] | str | None:
    """A recipe of a file, as `selections show --json` prints it or as it is; what is no file is a selection."""
    if said is None or not Path(said).is_file():
        return said
    try:
        found = json.loads(Path(said).read_bytes())
    except ValueError as error:
        raise typer.BadParameter(f"{said} is no JSON: {error}") from error
    recipe: dict[str, Any] = found.get("recipe", found) if isinstance(found, dict) else {}
    return recipe


def _say_what_to_know(chosen: types.Selection) -> None:
    """Tell what did not go as asked, and what the chosen rows share with tasks' rows."""
    for note in chosen.notes:
        say(f"  {note}")
    found = chosen.contamination
    if found is not None and found.chosen:
        share = f"share {found.ngram} words in a row with a task's"
        say(f"  {found.chosen:,} rows {share}; --exclude-contaminated drops them:")
        for one in found.overlaps[:3]:
            say(f"    row {one.row} and {one.split} row {one.task_row} of {one.task}: {one.text[:80]}")
    if found is not None and found.dropped:
        say(f"  {found.dropped:,} rows passed over that share {found.ngram} words in a row with a task's")


@app.command()
@takes(endpoints.scores, without=["limit", "after", "wait"], texts=SCORING)
def scores(
    ctx: typer.Context,
    *,
    limit: Rows = 20,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save all scores there, as .npy, .safetensors or .parquet.")
    ] = None,
    as_json: Json = False,
    timeout: Timeout = None,
    **fields: Any,
) -> None:
    """Print or save the scores of a pool's rows."""
    with _session(ctx) as store:
        if output is not None:
            store.save_scores(output, progress=is_terminal(), timeout=timeout, **given(fields))
            return
        rows = store.scores(progress=is_terminal(), timeout=timeout, **given(fields))
        print_list(islice(rows, limit or None), SCORED, as_json=as_json)


@app.command()
@takes(
    endpoints.score_distribution,
    without=["bins", "steps", "wait"],
    texts={"task": "Task by id or name; repeat for several."},
)
def distribution(
    ctx: typer.Context,
    *,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Cuts to print, at equal steps.")] = 20,
    as_json: Json = False,
    timeout: Timeout = None,
    **fields: Any,
) -> None:
    """Print what each fraction of a pool would take: rows, the last score, rows of each origin."""
    with _session(ctx) as store:
        found = store.score_distribution(steps=steps, progress=is_terminal(), timeout=timeout, **given(fields))
        cuts = found.cuts
        origins = [[(name, own[step]) for name, own in cuts.origins.items()] for step in range(len(cuts.rows))]
        print_json(found) if as_json else print_table(zip(cuts.pct, cuts.rows, cuts.scores, origins, strict=True), CUTS)


@app.command()
@takes(endpoints.overlaps, without=["wait"], texts={"task": "Task by id or name; repeat for several."})
def overlaps(ctx: typer.Context, *, as_json: Json = False, timeout: Timeout = None, **fields: Any) -> None:
    """Print what the selections of several tasks share, and how far the tasks agree on the whole pool."""
    with _session(ctx) as store:
        found = store.overlaps(progress=is_terminal(), timeout=timeout, **given(fields))
        print_json(found) if as_json else print_table(found.pairs, SHARED)


@groups["selections"].command("explain")
@takes(endpoints.selections_explanations, without=["limit", "after"])
def explain_selection(
    ctx: typer.Context, reference: Reference, *, limit: Rows = 10, as_json: Json = False, **fields: Any
) -> None:
    """Print chosen rows with their best subtask and the validation example nearest to each; with --json all scores."""
    with _session(ctx) as store:
        rows = store.selections.explanations(reference, **given(fields))
        print_list(islice(rows, limit or None), EXPLAINED, as_json=as_json)


@groups["selections"].command("show")
def show_selection(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print a selection without its rows."""
    with _session(ctx) as store:
        print_object(store.selections.get(reference, limit=0), as_json=as_json)


@groups["selections"].command("rows")
def selection_rows(ctx: typer.Context, reference: Reference, *, limit: Rows = 20, as_json: Json = False) -> None:
    """Print the chosen rows' places and scores, best first."""
    with _session(ctx) as store:
        print_list(islice(store.selections.rows(reference), limit or None), SELECTED, as_json=as_json)


@groups["selections"].command("content")
def selection_content(
    ctx: typer.Context, reference: Reference, *, as_csv: AsCsv = False, output: Output = None
) -> None:
    """Print the chosen original rows, best first."""
    with _session(ctx) as store:
        if output is not None:
            store.selections.save(reference, output, progress=is_terminal())
        else:
            print_lines(store.selections.lines(reference, format="csv" if as_csv else "ndjson"))


@groups["selections"].command("export")
def export_selection(
    ctx: typer.Context,
    reference: Reference,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File in .jsonl, .csv or .parquet; a trainer's folder, or its .zip.")
    ],
    format: Annotated[ExportFormat | None, typer.Option(help="By default by the path's ending.")] = None,
    scores: Annotated[bool, typer.Option(help="Say rank, score and place of each row, too.")] = True,
) -> None:
    """Save the chosen rows for other programs.

    As a table, or as a folder that TRL, Axolotl or LLaMA-Factory works with: data, configuration and provenance card.
    """
    with _session(ctx) as store:
        typer.echo(store.selections.export(reference, output, format=format, scores=scores, progress=is_terminal()))


@groups["selections"].command("provenance")
def selection_provenance(
    ctx: typer.Context,
    reference: Reference,
    *,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page to read.")] = False,
    as_json: Json = False,
) -> None:
    """Print what selected these rows, from what, when and how."""
    with _session(ctx) as store:
        if markdown:
            typer.echo(store.selections.card(reference), nl=False)
        else:
            print_object(store.selections.provenance(reference), as_json=as_json)


# The service, and the whole flow --------------------------------------------------------------------------------------


@app.command()
def usage(ctx: typer.Context, *, as_json: Json = False) -> None:
    """Print how much of everything the store holds, and the bytes that its parts take on the server's disk."""
    with _session(ctx) as store:
        print_object(store.usage(), as_json=as_json)


@app.command()
def health(ctx: typer.Context, *, as_json: Json = False) -> None:
    """Say whether the service can work; exit code 1 if not."""
    with _session(ctx) as store:
        state = store.health()
        print_object(state, as_json=as_json)
        if state.status != "ok":
            raise typer.Exit(REFUSED)


@app.command()
@takes(
    recipes.less,
    request=FinetuneRequest,
    without=["pool", "progress", "say"],
    texts={"task": "Task by id or name, or a file or folder to upload.", "task_kind": f"{KINDS} Needed for a path."},
)
def less(
    ctx: typer.Context,
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Dataset by id or name, or a file to upload.")],
    *,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Run the whole flow: warm-up, gradients, selection, training.

    Follows LESS (arXiv 2402.04333), and measures the gain on the task's test rows in the end. Interrupted or failed,
    the same command goes on where it stopped. Prints what was measured; the ids of all that was made go to stderr.
    """
    with _session(ctx) as store:
        done = recipes.less(store, pool=pool, progress=is_terminal(), say=say, **given(fields))
        for job in (done.warmup, done.pool_gradients, done.task_gradients, done.tuned):
            say_lost_rows(job.result)
        say(f"warm-up {done.warmup.id} (run {done.warmup.result.run})")
        say(f"selection {done.selection.id}, tuned model {done.tuned.id}")
        if as_json:
            print_json(done)
        elif done.evaluation is not None:
            print_table(done.evaluation.result.rows, MEASURED)
        else:
            typer.echo(done.tuned.id)


def main() -> None:
    """Run the command line."""
    app()
