"""The command of mixtures of LoRA experts: what one would take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gradstore._cli.nouns import bare_group
from gradstore._cli.options import Json, given
from gradstore._cli.output import Columns, print_json, print_table, say
from gradstore._cli.session import session
from gradstore.types import Allocation, GateScope, Precision, RouterKind

LAYERS: Columns = {
    "layers": lambda part: part[0],
    "experts": lambda part: part[1].experts,
    "top_k": lambda part: part[1].top_k,
    "rank": lambda part: part[1].rank,
}
EACH = "a digit for each block of layers (2468), or with commas a number for each layer."

allocations = bare_group("allocations", help="What a mixture of LoRA experts would take in a model.")


@allocations.command("preview")
def preview(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, or a folder of the server.")],
    *,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the hub.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Number type of the base model.")] = None,
    experts: Annotated[str | None, typer.Option(help=f"Experts of a layer, by default 4: {EACH}")] = None,
    top_k: Annotated[str | None, typer.Option(help=f"Experts that a token goes to, by default 2: {EACH}")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of each expert, by default 16.")] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(help="Linear layer with experts (q_proj), by default the attention's; repeatable."),
    ] = None,
    router: Annotated[RouterKind | None, typer.Option(help="One router, or a router of routers.")] = None,
    sub_routers: Annotated[int | None, typer.Option(min=2, help="Of mor: how many, by default 2.")] = None,
    gate_scope: Annotated[GateScope | None, typer.Option(help="Of mor: what a sub-router's weight is of.")] = None,
    top_sub: Annotated[int | None, typer.Option(min=1, help="Of mor: sub-routers that have a say.")] = None,
    router_only: Annotated[bool, typer.Option("--router-only", help="Train the routers alone.")] = False,
    as_json: Json = False,
) -> None:
    """Print the layers, parameters and memory of a mixture; nothing is kept."""
    routing = given({"kind": router, "sub_routers": sub_routers, "gate_scope": gate_scope, "top_sub": top_sub})
    mixture: dict[str, Any] = {
        "experts": _numbers(experts), "top_k": _numbers(top_k), "rank": rank, "modules": module,
        "router": routing or None,
    }  # fmt: skip
    with session(ctx) as store:
        found = store.allocations.preview(
            model, revision=revision, precision=precision, router_only=router_only or None, **given(mixture)
        )
    if as_json:
        print_json(found)
    else:
        _print(found)


def _numbers(text: str | None) -> str | list[int] | None:
    """A scheme as it is; numbers with commas as a list."""
    if text is None or "," not in text:
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither digits nor numbers with commas: {EACH}") from None


def _print(found: Allocation) -> None:
    parts: list[tuple[str, Any]] = []
    first = 0
    for number, layer in enumerate(found.layers, 1):
        if number == len(found.layers) or found.layers[number] != layer:
            parts.append((f"{first}-{number - 1}", layer))
            first = number
    print_table(parts, LAYERS)
    counts, memory = found.parameters, found.memory
    say(f"{counts.trainable:,} parameters are trained: {counts.experts:,} of experts and {counts.routers:,} of routers")
    say(f"{counts.active:,} of them are active for a token; the base model has {counts.base:,}")
    say(f"{memory.total / 1e9:,.2f} GB without activations: {memory.base / 1e9:,.2f} of these are the base model's")
