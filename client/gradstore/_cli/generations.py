"""The commands of generations: what a model answers, and how a mixture's experts share its tokens."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, print_outcome, started
from gradstore._cli.nouns import group_of
from gradstore._cli.options import AS_TRAINED, Json, Reference, Wait, given, takes
from gradstore._cli.output import Columns, print_table, say
from gradstore._cli.session import session
from gradstore.types import GenerationRequest, GenerationResult

LOADS: Columns = {
    "layer": lambda load: load.layer,
    "balance": lambda load: load.balance,
    "load of each expert": lambda load: "  ".join(f"{share:.1%}" for share in load.load),
}

generations = group_of("generations", listed, help="What a model answers, and its experts' load.", own_show=True)


@generations.command("create")
@takes(
    endpoints.generations_create,
    request=GenerationRequest,
    without=["prompts"],
    texts={**AS_TRAINED, "checkpoint": "Checkpoint by id or name."},
)
def create_generation(
    ctx: typer.Context,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What a user says.")],
    *,
    wait: Wait = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Let a checkpoint's model answer prompts, always with the likeliest next token.

    With --trace, of a mixture: which experts the tokens go to. Prints the job's id, or with --wait the answers.
    """
    with session(ctx) as store:
        job = store.generations.create(prompts=prompts, **given(fields))
        started(store, "generations", job, wait=wait, as_json=as_json, show=print_answers)


@generations.command("show")
def show_generation(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print the answers, and the experts' load. With --json the trace of each token, too."""
    with session(ctx) as store:
        print_outcome(store.generations.get(reference), print_answers, as_json=as_json)


def print_answers(result: GenerationResult) -> None:
    """Print the answers one after another, and a row for each layer of a traced mixture."""
    for answer in result.data:
        typer.echo(answer.text)
    if result.loads:
        say("Tokens of prompts and answers, by layer and expert:")
        print_table(result.loads, LOADS)
