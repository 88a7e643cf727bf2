"""The provenance card: what selected these rows, from what, for what, when and how, as data and as a page.

The page is a Hugging Face dataset card: YAML front matter that `datasets.load_dataset` reads, and Markdown below it
(https://huggingface.co/docs/hub/datasets-cards). Nothing in a card depends on when it is asked for, so the same
selection gives the same bytes until something in it is renamed or deleted, or another version tells it. A recipe is
shown whatever it holds: its fields become rows of a table, and, by the names that /select has for them, the request
that makes the selection again.
"""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any, TypeVar
from urllib.parse import urlencode

from gradstore import __version__
from gradstore.types import (
    Excluded,
    FeatureSet,
    FeaturesProvenance,
    Provenance,
    ProvenanceCheckpoint,
    ProvenanceDataset,
    ProvenanceRun,
    ProvenanceTask,
    Selection,
)

from datastore.catalog import Catalog
from datastore.errors import Ambiguous, GradstoreError, InvalidInput, NotFound
from datastore.features import UNPROJECTED
from datastore.leases import Jobs
from datastore.parameters import OF_GRADIENTS, Query
from datastore.recipes import Recipes

_NAMES = {"datasets": "dataset", "tasks": "task", "checkpoints": "checkpoint"}
"""Fields of a recipe that /select has under another name."""
_OPTIONS = {"exclude_ids": "exclude-id"}
"""Parameters of /select that the command line has under another name."""
_NONE = frozenset({"quantisation", "converted_from"})
"""Fields of a recipe whose absence /select knows as `none`."""
_FOLLOWS = frozenset({"checkpoint_weights", "task_kind", "task_adam", "projection_version", "bm25_version"})
"""Fields of a recipe that /select finds out from the others."""
FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class DataFile:
    """A file beside a card that `datasets.load_dataset` is to find."""

    config: str
    """Name of the configuration that it is loaded by."""
    path: str


@dataclass(frozen=True)
class Cards:
    """Looks up what a selection's recipe names."""

    catalog: Catalog
    jobs: Jobs
    recipes: Recipes

    def of(self, selection: Selection) -> Provenance:
        """Where a selection comes from."""
        recipe = selection.recipe.model_dump(mode="json")
        weights = dict(zip(recipe["checkpoints"], recipe["checkpoint_weights"], strict=True))
        return Provenance(
            selection=selection.id,
            name=selection.name,
            created_at=selection.created_at,
            gradstore=__version__,
            count=selection.count,
            pool=selection.pool,
            left_out=selection.left_out,
            origins=selection.origins,
            pool_origins=selection.pool_origins,
            recipe=recipe,
            datasets=[self._dataset(id) for id in recipe["datasets"]],
            tasks=[self._task(id) for id in recipe["tasks"]],
            checkpoints=[self._checkpoint(id, weight) for id, weight in weights.items()],
            run=self._run(recipe["run"]) if recipe["run"] else None,
            excluded=[self._excluded(id) for id in recipe["exclude"]],
            **self._again(selection, recipe),
        )

    def _again(self, selection: Selection, recipe: Mapping[str, Any]) -> dict[str, str]:
        """The request and the command that give the same selection: its question, or else its recipe as it is.

        A recipe that somebody has sent need not be the answer to a question, as with weights of its own.
        """
        try:
            answered = self.recipes.resolve(_question(recipe), path="/select")[0] == selection.recipe
        except (InvalidInput, Ambiguous):
            answered = False
        except GradstoreError:  # something is deleted, and no request gives it
            answered = True
        if answered:
            return {"request": f"GET /select?{urlencode(_parameters(recipe))}", "command": _command(recipe)}
        return {
            "request": f"POST /selections {json.dumps({'recipe': recipe}, ensure_ascii=False)}",
            "command": f"gradstore select --recipe {selection.id}",
        }

    def of_features(self, features: FeatureSet, *, start: int, stop: int) -> FeaturesProvenance:
        """What the rows `start:stop` of a feature set are."""
        return FeaturesProvenance(
            gradstore=__version__,
            feature_set=features,
            start=start,
            stop=stop,
            dataset=self._dataset(features.dataset) if features.dataset else None,
            task=self._task(features.task) if features.task else None,
            checkpoint=self._checkpoint(features.checkpoint, None),
        )

    def _dataset(self, id: str) -> ProvenanceDataset:
        return ProvenanceDataset.model_validate(self.catalog.dataset(id).model_dump())

    def _task(self, id: str) -> ProvenanceTask:
        task = self.catalog.task(id)
        return ProvenanceTask.model_validate({**task.model_dump(), "subtasks": len(task.subtasks)})

    def _checkpoint(self, id: str, weight: float | None) -> ProvenanceCheckpoint:
        known = _known(lambda: self.catalog.checkpoint(id))
        return ProvenanceCheckpoint.model_validate(
            {"id": id, **(known.model_dump() if known else {}), "weight": weight}
        )

    def _run(self, id: str) -> ProvenanceRun:
        run = _known(lambda: self.catalog.run(id))
        if run is None:
            return ProvenanceRun(id=id)
        finetune = run.finetune
        job = _known(lambda: self.jobs.get(finetune, kind="finetune")) if finetune else None
        training = job.request.model_dump(mode="json") if job else None
        return ProvenanceRun.model_validate({**run.model_dump(), "training": training})

    def _excluded(self, id: str) -> Excluded:
        noun: Callable[[str], Any] = self.catalog.selection if id.startswith("sel_") else self.catalog.dataset
        known = _known(lambda: noun(id))
        return Excluded(id=id, name=known.name if known else None)


def card(provenance: Provenance, *, files: Sequence[DataFile] = (), notes: Sequence[str] = ()) -> str:
    """The page; `files` stand in its front matter, `notes` are paragraphs of Markdown below the first one."""
    chosen = f"{provenance.count:,} of {provenance.pool:,} rows"
    parts = [
        _front_matter(provenance, files),
        f"# {provenance.selection}" + (f": {_text(provenance.name)}" if provenance.name else ""),
        f"{chosen}, chosen by gradstore at {provenance.created_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        + (f" for {', '.join(_text(task.name) for task in provenance.tasks)}." if provenance.tasks else ".")
        + f" This card is of gradstore {provenance.gradstore}.",
        *notes,
        "## How it was chosen",
        _table(["field", "value"], _said(provenance.recipe)),
        "The same again, against the same store:",
        f"    {provenance.request}\n\n    {provenance.command}",
        "## From what",
        _table(
            ["dataset", "name", "rows", "files (SHA-256)"],
            [
                (
                    each.id,
                    each.name,
                    f"{each.rows:,}",
                    ", ".join(f"{one.filename} ({one.sha256})" for one in each.sources),
                )
                for each in provenance.datasets
            ],
        ),
        _origins(provenance),
        *_targets(provenance.tasks),
        *_models(provenance.checkpoints),
        *_training(provenance.run),
        *_not_chosen(provenance),
    ]
    return "\n\n".join(parts) + "\n"


def _known(look: Callable[[], FoundT]) -> FoundT | None:
    """What is looked up; None where it is deleted by now."""
    try:
        return look()
    except NotFound:
        return None


def _parameters(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The recipe as the parameters of /select: what it does not say is left out, a list is said item by item.

    That a base model was not quantised, and features not converted, is said where there were some: with a precision.
    """
    left_out = _FOLLOWS | ({"checkpoints"} if recipe["run"] else set())
    left_out |= set(OF_GRADIENTS) if recipe["kind"] in UNPROJECTED else set()
    found: list[tuple[str, str]] = []
    for name, value in recipe.items():
        said = value is not None or (name in _NONE and recipe["precision"] is not None)
        if name in left_out or not said:
            continue
        items = value if isinstance(value, list) else ["none" if value is None else value]
        if isinstance(value, dict):
            items = [f"{origin}:{share!r}" for origin, share in value.items()]
        found += [(_NAMES.get(name, name), _plain(item)) for item in items]
    return found


def _question(recipe: Mapping[str, Any]) -> Query:
    """The recipe's parameters as a question."""
    names = {theirs: ours for ours, theirs in _NAMES.items()}
    texts: dict[str, list[str]] = defaultdict(list)
    for name, text in _parameters(recipe):
        texts[names.get(name, name)].append(text)
    values: dict[str, Any] = {}
    for name, said in texts.items():
        several = name == "quota" or isinstance(recipe[name], list)
        values[name] = tuple(said) if several else "none" if recipe[name] is None else recipe[name]
    return Query(**values)


def _command(recipe: Mapping[str, Any]) -> str:
    return " ".join(
        [
            "gradstore select",
            *(_option(_OPTIONS.get(name, name.replace("_", "-")), text) for name, text in _parameters(recipe)),
        ]
    )


def _option(name: str, text: str) -> str:
    """A parameter as the command line has it: a switch for true and false."""
    switches = {"true": f"--{name}", "false": f"--no-{name}"}
    return switches.get(text, f"--{name} {shlex.quote(text)}")


def _plain(value: Any) -> str:
    if isinstance(value, bool | dict | list):
        return json.dumps(value)
    return str(value)


# The page -----------------------------------------------------------------------------------------------------------


def _front_matter(provenance: Provenance, files: Sequence[DataFile]) -> str:
    """YAML without anything that a user has written: every text in it is one of ours."""
    lines = [
        "---",
        f"pretty_name: {provenance.selection}",
        "task_categories:",
        "- text-generation",
        "tags:",
        "- gradstore",
        "- data-selection",
        "size_categories:",
        f"- {_size(provenance.count)}",
    ]
    if files:
        lines += ["configs:"]
        for file in files:
            lines += [f"- config_name: {file.config}", f"  data_files: {file.path}"]
    return "\n".join([*lines, "---"])


def _size(rows: int) -> str:
    """The hub's word for a number of rows."""
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((word for bound, word in bounds if rows < bound), "1M<n<10M" if rows < 10_000_000 else "10M<n<100M")


def _origins(provenance: Provenance) -> str:
    rows = [
        (origin, f"{provenance.origins.get(origin, 0):,}", f"{count:,}")
        for origin, count in provenance.pool_origins.items()
    ]
    return _table(["origin", "chosen rows", "rows of the pool"], rows)


def _targets(tasks: Sequence[ProvenanceTask]) -> list[str]:
    rows = [(task.id, task.name, task.kind, f"{task.validation:,}", task.subtasks) for task in tasks]
    return ["## For what", _table(["task", "name", "kind", "validation rows", "subtasks"], rows)] if rows else []


def _models(checkpoints: Sequence[ProvenanceCheckpoint]) -> list[str]:
    names = ["checkpoint", "model", "revision", "epoch", "step", "learning rate", "weight"]
    rows = [
        (one.id, one.model, one.revision, one.epoch, one.step, _rounded(one.learning_rate), _rounded(one.weight))
        for one in checkpoints
    ]
    return ["## By what", _table(names, rows)] if rows else []


def _training(run: ProvenanceRun | None) -> list[str]:
    if run is None:
        return []
    told = f"The checkpoints are those of the run {run.id}"
    if run.training is None:
        return [f"{told}."]
    return [f"{told}, trained by {run.finetune}:", _table(["setting", "value"], _said(run.training))]


def _not_chosen(provenance: Provenance) -> list[str]:
    rows = [(reason, f"{count:,}") for reason, count in provenance.left_out.items()]
    rows += [(f"as in {one.id}" + (f" ({one.name})" if one.name else ""), "") for one in provenance.excluded]
    return ["## Left out", _table(["reason", "rows"], rows)] if rows else []


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(_text('' if cell is None else str(cell)) for cell in line)} |" for line in lines)


def _said(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The fields that say something, as rows of a table."""
    return [
        (name, value if isinstance(value, str) else json.dumps(_rounded(value), ensure_ascii=False))
        for name, value in fields.items()
        if value is not None
    ]


def _rounded(value: Any) -> Any:
    """A value without the noise of binary fractions, for reading: the request below has it in full."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _text(text: str) -> str:
    """A text on one line of Markdown that means nothing but itself: it may come from a row of a stranger's file."""
    line = " ".join(text.split())
    for mark in "\\`*[]|":
        line = line.replace(mark, f"\\{mark}")
    return line.replace("<", "&lt;")
