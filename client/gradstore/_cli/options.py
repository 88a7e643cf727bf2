"""Options and arguments: those that several commands have, and those made from the functions they are for.

Made, so that a new argument is an option at once: a command takes the arguments of a function of `_endpoints.py` or
`recipes.py`, with the texts of `HELP`. What a shell cannot say directly is said in parts: a list by repeating its
option, the adapter's shape by four options.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from gradstore._signatures import expanded
from gradstore.types import LoraSettings

CommandT = TypeVar("CommandT", bound=Callable[..., None])

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until the job is done; Ctrl-C leaves it at work.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and start nothing.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait at most; the job goes on.")]
Limit = Annotated[int | None, typer.Option(min=1, help="How many to print; else all.")]
Rows = Annotated[int, typer.Option("--limit", min=0, help="How many rows to print; 0 prints all.")]
Reference = Annotated[str, typer.Argument(metavar="ID", help="Id or name.")]
LocalPath = Annotated[Path, typer.Argument(metavar="PATH", exists=True, help="File, zip or folder of this machine.")]
NewFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to make; a path in .zip gets the zip.")]

AS_TRAINED = {
    "max_length": "Tokens kept of a row; by default as the run was trained.",
    "precision": "Number type of the base model while it computes; by default as the run was trained.",
    "template": "How a conversation is written as text; by default as the run was trained.",
}

HELP = {
    "adam": "Adam's direction as LESS's code has it (less), or with bias correction (exact).",
    "aggregate": "How a row's scores over a task become one; less: mean within a subtask, then the largest.",
    "among": "Of how many of the best rows k-center and clusters choose; by default four times as many as are chosen.",
    "append_to": "Dataset whose rows come first; the features of these rows are reused.",
    "attention": "How attention is computed; by default as the model's code chooses.",
    "baseline": "Measure the base model beside it.",
    "bandwidth": "nearness=kde: width of the Gaussians around the shots; by default 10.",
    "batch_size": "Rows per optimizer step.",
    "beta": "cods: weight of the likeness of capabilities beside that of places.",
    "bootstrap_samples": "Samples of the confidence intervals.",
    "budget": "Part of the pool whose gradients are computed: 0.2 is 20 %.",
    "by": "Whose scores are meant, of a method that has them from something that was learned.",
    "capabilities": "Capability that strategy=capability selects for; repeat for several.",
    "checkpoint": "Checkpoint by id; repeat for several.",
    "checkpoints": "Checkpoint by id, instead of a run; repeat for several.",
    "clusters": "Clusters to take equal parts of; by default the square root of the number of rows.",
    "combine": "How several tasks choose: by a row's largest or mean score, in turns, or the least served first.",
    "converted_from": "Dtype that the features were rounded to before; none: those that were rounded once.",
    "dataset": "Dataset by id or name.",
    "decontaminate": "Task whose rows the chosen ones are compared with, beside the target; repeatable.",
    "dedupe": "Pass over rows more alike than this to one chosen before, such as 0.95.",
    "dedupe_by": "How likeness is measured: cosine of features, or shared 5-word runs of the texts.",
    "device_batch_size": "Rows per forward pass; the rest is accumulated.",
    "dim": "Dimensions of the projected gradients.",
    "dims": "Dimensions of the projected gradients; repeat to get several from one pass.",
    "dtype": "Number type of the stored gradients.",
    "epochs": "Passes over the rows.",
    "evaluate": "Measure the base model and the tuned one on the task's test rows at the end.",
    "exclude": "Dataset or selection whose examples are left out; repeatable.",
    "exclude_contaminated": "Leave out rows that overlap with a task's validation or test rows.",
    "exclude_ids": "Example that is left out, by its own id; repeatable.",
    "experts_from": "Adapter of the bank that an expert of the mixture begins as; repeatable.",
    "feature_sets": "Feature set by id; repeat for several.",
    "finetune": "Fine-tune by id or name.",
    "fraction": "Random fraction of the dataset's rows: 0.05 is 5 %.",
    "gradient_checkpointing": "Save memory by computing activations twice.",
    "gradients": "Job by id or name: gradients, an import or a conversion.",
    "k": "How many rows to choose, instead of a fraction.",
    "kind": "Kind of the pool's features.",
    "kinds": "Kind of features; repeat to get several from one pass. By default adam for a dataset and sgd for a task.",
    "learning_rate": "Learning rate at its highest; of a checkpoint, the mean of its epoch.",
    "logodds_form": "Log-odds as they are (exact), or of probabilities moved away from 0 and 1 (reference, GradEx's).",
    "lora_alpha": "Scale of the adapter.",
    "lora_dropout": "Dropout of the adapter in training.",
    "lora_r": "Rank of the adapter.",
    "lora_targets": "Module that gets an adapter (q_proj, …, or all-linear); repeatable.",
    "match": "Selection whose lengths the rows drawn have (method random).",
    "max_length": "Tokens kept of a row.",
    "max_new_tokens": "Longest generated answer, in tokens.",
    "max_rows": "At most so many test rows per subtask, the first ones.",
    "method": "Train an adapter, or all weights.",
    "model": "Base model: hub id, or a folder of the server inside an allowed root.",
    "name": "Name to give it, instead of remembering its id.",
    "nearness": "shots: a row's largest cosine with a shot (max_cosine, the default), that with their mean (centroid), "
    "the density of Gaussians around them (kde, drawn), or its distance to their convex hull (hull, drawn inside).",
    "neighbours": "cods: how many of the task's nearest rows give a row's score; by default 5.",
    "ngram": "Words of a run that two rows must share to overlap; by default 13.",
    "on_error": "What to do with a file that has bad rows: refuse it, or take the good ones.",
    "origin": "Only rows of this origin.",
    "origins": "Only examples of this origin; repeatable.",
    "pct": "Fraction of the pool to choose: 0.05 is 5 %.",
    "precision": "Number type of the base model while it computes.",
    "projection": "How gradients are projected.",
    "q": "Only rows that hold this text, in any case of letters.",
    "quantisation": "Load the base model in 8 or 4 bits (GPU).",
    "projection_id": "What you call the projection of imported features; compared are those of one name only.",
    "quota": "Share of the chosen rows by origin: equal, proportional, or origin:fraction; repeatable.",
    "reduction": "Gradients of the mean of the supervised tokens' losses, or of their sum.",
    "replace": "Take the name from what has it now.",
    "revision": "Revision of the base model on the hub.",
    "rows": "Random number of the dataset's rows.",
    "run": "Run by id or name.",
    "scheduler": "Course of the learning rate.",
    "query_kind": "Kind of the question's gradient.",
    "search": "Read every feature (exact), or ask an index where the pool is large enough for one.",
    "seed": "Seed; the same seed gives the same numbers.",
    "selection": "Selection by id or name.",
    "selection_seed": "Seed of what is drawn.",
    "step": "Optimizer step at which the checkpoint was taken.",
    "strategy": "The best rows (top), the farthest from each other (k-center), the best of each cluster (clusters), or "
    "those like the task's rows and unlike each other (shots); cods: those nearest to the task's rows in turns "
    "(nearest), to their mean (prototype), or by capabilities.",
    "task": "Task by id or name.",
    "tasks": "Task by id or name; repeat for several.",
    "tau": "shots: pass over rows whose cosine with one taken before exceeds this; by default 0.9.",
    "template": "How a conversation is written as text.",
    "token_budget": "Tokens per batch, padding included; by default what the worker's device does best.",
    "trace": "Of a mixture: say which experts the tokens go to.",
    "trace_tokens": "How many of the last tokens of each row are traced one by one.",
    "warmup_fraction": "Fraction of the pool to warm up on.",
    "warmup_ratio": "Fraction of the steps in which the learning rate rises.",
    "weight_decay": "Weight decay.",
    "weights": "Weights whose gradients are meant where there is no adapter, as *.q_proj.weight; repeatable.",
}


def takes(
    function: Callable[..., Any],
    *,
    request: type[BaseModel] | None = None,
    without: Sequence[str] = (),
    texts: Mapping[str, str] | None = None,
) -> Callable[[CommandT], CommandT]:
    """Give a command the keyword arguments of a function as options, in place of its `**fields`.

    `request` is the body they become, whose defaults are shown. What is not given on the command line is not sent.
    """

    def decorate(command: CommandT) -> CommandT:
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        words = {**HELP, **(texts or {})}
        defaults = {name: field.default for name, field in (request.model_fields if request else {}).items()}
        options = [
            _option(parameter, words[parameter.name], defaults.get(parameter.name, parameter.default))
            for parameter in _parts(expanded(function).parameters.values())
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in without
        ]
        arguments = [parameter for parameter in own if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
        ordered = [*arguments, *_in_order(options), *own[len(arguments) :]]
        command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]  # read by typer
        return command

    return decorate


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, as the function takes them."""
    found = {name: value for name, value in fields.items() if value is not None and value != []}
    lora = {name: found.pop(f"lora_{name}") for name in LoraSettings.model_fields if f"lora_{name}" in found}
    if lora.get("targets") == ["all-linear"]:
        lora["targets"] = "all-linear"
    return {**found, "lora": LoraSettings(**lora)} if lora else found


def parameter_sets(option: str, texts: Sequence[str]) -> list[dict[str, Any]] | None:
    """The sets of parameters that an option was given; None where it was not. Raises `ValueError` for what names none.

    >>> parameter_sets("--scores", ["kind=adam,dim=1024"])
    [{'kind': 'adam', 'dim': '1024'}]
    """
    return [parameter_set(option, text) for text in texts] or None


def parameter_set(option: str, text: str) -> dict[str, Any]:
    """What an option says as name=value,… or as JSON. Raises `ValueError` for what is neither."""
    if text.lstrip().startswith("{"):
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{option} {text}: this is no JSON: {error}") from error
        return found
    pairs = [part.partition("=") for part in text.split(",") if part]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"{option} {text}: say name=value, not {name!r}")
    return {name.strip().replace("-", "_"): value.strip() for name, _, value in pairs}


def _parts(parameters: Iterable[inspect.Parameter]) -> Iterator[inspect.Parameter]:
    """The parameters, the adapter's shape as one for each of its fields."""
    for parameter in parameters:
        if parameter.name != "lora":
            yield parameter
            continue
        for name, field in LoraSettings.model_fields.items():
            yield parameter.replace(name=f"lora_{name}", annotation=field.annotation, default=field.default)


def _singular(name: str) -> str:
    return f"{name.removesuffix('ies')}y" if name.endswith("ies") else name.removesuffix("s")


def _option(parameter: inspect.Parameter, text: str, default: Any) -> inspect.Parameter:
    required = parameter.default is inspect.Parameter.empty
    kind = _value(parameter.annotation)
    names, metavar = [], None
    if get_origin(kind) is list:  # repeated, so its name is the singular
        names = [f"--{_singular(parameter.name).replace('_', '-')}"]
        item = get_args(kind)[0]
        metavar = f"<{'|'.join(item) if issubclass(item, StrEnum) else item.__name__}>"
    option = typer.Option(*names, metavar=metavar, help=f"{text}{_shown(default)}", show_default=False)
    return parameter.replace(
        default=parameter.default if required else None,
        annotation=Annotated[kind if required else kind | None, option],
        kind=inspect.Parameter.KEYWORD_ONLY,
    )


def _shown(default: Any) -> str:
    """A default as the help shows it."""
    if default is None or default is inspect.Parameter.empty or default is PydanticUndefined:
        return ""
    if isinstance(default, bool):
        default = "yes" if default else "no"
    return f" [default: {', '.join(map(str, default)) if isinstance(default, list) else default}]"


def _in_order(options: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """What must be given comes first."""
    return sorted(options, key=lambda option: option.default is not inspect.Parameter.empty)


def _value(annotation: Any) -> Any:
    """The type of one value on the command line, or a list of it where the option may be repeated."""
    parts = [part for part in _alternatives(annotation) if part is not type(None)]
    choices = tuple(choice for part in parts if get_origin(part) is Literal for choice in get_args(part))
    lists = [part for part in parts if get_origin(part) in {list, Sequence}]
    if lists:
        return list[_item(_value(get_args(lists[0])[0]))]  # type: ignore[misc]  # a type made at run time
    return Literal[choices] if choices else parts[0]


def _item(kind: Any) -> Any:
    """The type of a list's items: typer takes no list of a Literal, but one of an enumeration."""
    if get_origin(kind) is not Literal:
        return kind
    return StrEnum("Choice", {choice: choice for choice in get_args(kind)})


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in {Union, UnionType} else (annotation,)
