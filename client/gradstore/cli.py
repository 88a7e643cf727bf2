"""The command line: `gradstore …`.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done, 1 refused or not reached, 2 wrong usage, 3 the
job failed, 130 interrupted, 141 the reader of stdout went away. The client itself is imported when a command runs, so
`--help` is quick; those of `SERVER_COMMANDS` come from the server's distribution, by entry points of the group
"gradstore.commands", and are imported only when they are called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import gradstore
from gradstore import recipes
from gradstore._cli.adapters import adapters, choices
from gradstore._cli.allocations import allocations
from gradstore._cli.attributions import attributions, why
from gradstore._cli.checkpoints import checkpoints, runs
from gradstore._cli.comparisons import compare, comparisons
from gradstore._cli.datasets import datasets
from gradstore._cli.estimates import estimate_validations, estimates
from gradstore._cli.evaluations import evaluations, print_measured
from gradstore._cli.finetunes import finetunes
from gradstore._cli.generations import generations
from gradstore._cli.gradients import conversions, gradients, imports
from gradstore._cli.jobs import jobs
from gradstore._cli.once import App, Once, refuse_repeated
from gradstore._cli.options import Json, given, takes
from gradstore._cli.output import Columns, is_terminal, print_json, print_list, print_object, say, say_lost_rows
from gradstore._cli.predictors import cascades, predictors
from gradstore._cli.projectors import embeddings, projectors
from gradstore._cli.scores import distribution, overlaps, scores
from gradstore._cli.selections import select, selections
from gradstore._cli.session import REFUSED, UNREAD, Server, session
from gradstore._cli.streams import labels, streams, taxonomies
from gradstore._cli.tasks import KINDS, tasks
from gradstore._cli.validations import validations
from gradstore._cli.workers import workers
from gradstore.types import FinetuneRequest

SERVER_COMMANDS = {
    "serve": "Serve the API, with a worker beside it.",
    "worker": "Do the jobs of a store, beside other workers.",
    "keys": "Make, list and revoke the API keys of a store, on its server.",
    "audit": "Print who changed what, or was refused, on the store's server.",
    "doctor": "Compare a store with its catalog, and mend it.",
    "gc": "Remove what nothing refers to any more.",
    "backup": "Back up a store into a folder.",
    "restore": "Fill an empty store from a backup.",
}
Pool = Annotated[str, typer.Argument(metavar="POOL", help="Dataset by id or name, or a file to upload.")]
ORDER = (
    *("less", "rocket", "datasets", "tasks", "finetunes", "gradients", "select", "scores", "distribution", "overlaps"),
    *("selections", "why", "attributions", "evaluations", "generations", "validations"),
    *("predictors", "cascades", "estimates", "estimate-validations"),
    *("conversions", "checkpoints", "adapters", "adapter-choices", "allocations", "runs"),
    *("compare", "comparisons", "streams", "annotations", "taxonomies", "projectors", "embeddings"),
    *("imports", "jobs", "workers", "usage", "health"),
)
CHECKS: Columns = {
    "part": lambda check: check.name,
    "state": lambda check: "ok" if check.ok else "missing",
    "detail": lambda check: check.detail,
}
MISSING = "Needs pip install 'gradstore-server[service,worker]'"


class Commands(TyperGroup):
    """The commands of this distribution, and those of the server where it is installed."""

    def make_context(self, *args: Any, **settings: Any) -> Any:
        """Read the command line; `--help` is printed here."""
        with _unread_output():
            return super().make_context(*args, **settings)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what stands before the command's name."""
        refuse_repeated(self, ctx, args)
        return super().parse_args(ctx, args)

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


def _command(name: str, function: Callable[..., Any] | typer.Typer, **settings: Any) -> Any:
    if isinstance(function, typer.Typer):
        for command in function.registered_commands:
            command.cls = Once
        return typer.main.get_command(function)
    app = App(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, **settings)(function)
    return typer.main.get_command(app)


app = App(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they would print the key
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 refused, 2 wrong usage, 3 the job failed, 130 interrupted, 141 the reader of stdout "
    "went away.",
)


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
    From a few shots of a task and a bank of adapters: rocket.
    """
    ctx.obj = Server(url, api_key)


@app.command()
def usage(ctx: typer.Context, *, as_json: Json = False) -> None:
    """Print how much of everything the store holds, and the bytes that its parts take on the server's disk."""
    with session(ctx) as store:
        print_object(store.usage(), as_json=as_json)


@app.command()
def health(ctx: typer.Context, *, as_json: Json = False) -> None:
    """Say whether the service can work, and what each of its parts is at; exit code 1 if something is missing."""
    with session(ctx) as store:
        state = store.ready()
        if as_json:
            print_json(state)
        else:
            print_list(state.checks, CHECKS, as_json=False)
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
    pool: Pool,
    *,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Run the whole flow: warm-up, gradients, selection, training.

    Follows LESS (arXiv 2402.04333), and measures the gain on the task's test rows in the end. Interrupted or failed,
    the same command goes on where it stopped. Prints what was measured; the ids of all that was made go to stderr.
    """
    with session(ctx) as store:
        done = recipes.less(store, pool=pool, progress=is_terminal(), say=say, **given(fields))
        for job in (done.warmup, done.pool_gradients, done.task_gradients, done.tuned):
            say_lost_rows(job.result)
        say(f"warm-up {done.warmup.id} (run {done.warmup.result.run})")
        say(f"selection {done.selection.id}, tuned model {done.tuned.id}")
        _print_flow(done, as_json=as_json)


@app.command()
@takes(
    recipes.rocket,
    request=FinetuneRequest,
    without=["pool", "progress", "say", "lora", "quantisation"],
    texts={
        "task": "Task by id or name, or a file or folder to upload; its validation rows are the shots.",
        "task_kind": f"{KINDS} Needed for a path.",
        "encoder": "Sentence encoder: hub id, or a folder of the server inside an allowed root.",
        "adapters": "Adapter of the bank by id or name, in place of all of the model; repeat for several.",
        "candidates": "Adapters with the smallest sums of ranks that sets are made of.",
        "size": "Adapters that are chosen: the experts.",
        "similarity": "How alike adapters are: by their tensors A and B, or by their product.",
        "k": "Rows of the pool nearest to the shots.",
        "top_k": "Experts of a token.",
        "router_only": "Train the routers, and leave the adapters as they are.",
    },
)
def rocket(
    ctx: typer.Context,
    pool: Pool,
    *,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Run the whole flow from a few shots: adapters of the bank, data, a mixture of both.

    Follows ROCKET (arXiv 2408.15915), and measures the gain on the task's test rows in the end. Interrupted or failed,
    the same command goes on where it stopped. Prints what was measured; the ids of all that was made go to stderr.
    """
    with session(ctx) as store:
        done = recipes.rocket(store, pool=pool, progress=is_terminal(), say=say, **given(fields))
        for job in (done.pool_embeddings, done.task_embeddings, done.tuned):
            say_lost_rows(job.result)
        say(f"choice {done.choice.id}: {', '.join(done.choice.result.chosen.members)}")
        say(f"selection {done.selection.id}, tuned mixture {done.tuned.id}")
        _print_flow(done, as_json=as_json)


def _print_flow(done: recipes.LessResult | recipes.RocketResult, *, as_json: bool) -> None:
    """Print what a flow has measured, or the id of what it has trained."""
    if as_json:
        print_json(done)
    elif done.evaluation is not None:
        print_measured(done.evaluation.result)
    else:
        typer.echo(done.tuned.id)


for command in (select, scores, distribution, overlaps, why, compare):
    app.command()(command)
for noun in (
    *(datasets, tasks, finetunes, gradients, selections, attributions, evaluations, generations, validations),
    *(predictors, cascades, estimates, estimate_validations, comparisons, streams, labels, taxonomies),
    *(conversions, projectors, embeddings),
    *(checkpoints, adapters, choices, allocations, runs, imports, jobs, workers),
):
    app.add_typer(noun)


def main() -> None:
    """Run the command line."""
    app()
