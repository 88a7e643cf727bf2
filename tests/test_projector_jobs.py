"""Projectors and embeddings as jobs: streams and labels in, a kept network and the rows' places out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import (
    AnnotationRequest,
    AnyJob,
    EmbeddingRequest,
    EmbeddingResult,
    ProjectorConfig,
    ProjectorRequest,
    ProjectorResult,
    ProjectorStreams,
    Selection,
    StreamRequest,
)

from datastore import backups
from datastore.doctor import examine
from datastore.errors import Conflict, Damaged, InUse, InvalidInput
from datastore.parameters import Query
from datastore.projector_files import ProjectorFiles
from datastore.selection.abilities import Places
from tests.workplace import Workplace, numbered
from worker.ability_files import read_projector
from worker.ability_training import Streams

ROWS, DIM, EXPERTS = 60, 12, 4
NAMES = ("algebra", "poetry", "law")
SMALL = ProjectorConfig(width=16, blocks=1, dim=8, heads=2, epochs=2, adjustment_epochs=1, batch_size=16)


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace.at(tmp_path)


def rows_of(seed: int, rows: int = ROWS) -> Any:
    """Gradients in which each capability has a direction, routing weights, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.random((rows, len(NAMES))) < 0.5
    labels[np.arange(rows), rng.integers(len(NAMES), size=rows)] = True
    directions = 3 * np.eye(len(NAMES), DIM)
    gradients = labels @ directions + 0.3 * rng.standard_normal((rows, DIM))
    return gradients.astype(np.float32), rng.random((rows, EXPERTS), np.float32), labels


class Lab:
    """A pool with streams and labels."""

    def __init__(self, workplace: Workplace, folder: Path, *, seed: int = 0, rows: int = ROWS) -> None:
        self.workplace, self.folder = workplace, folder
        self.gradients, self.routing, self.labels = rows_of(seed, rows)
        self.ids = [f"row-{number}" for number in range(rows)]
        lines = [
            {"id": id, **row}
            for id, row in zip(self.ids, numbered(range(1000 * seed, 1000 * seed + rows)), strict=True)
        ]
        self.pool = workplace.pool(lines)

    def stream(self, values: Any, *, rows: Any = None, dataset: str | None = None) -> str:
        rows = range(len(values)) if rows is None else rows
        folder = self.folder / f"stream-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        np.save(folder / "rows.npy", values[list(rows)])
        (folder / "ids.json").write_text(json.dumps([self.ids[row] for row in rows]))
        return self.workplace.context.streams.upload(StreamRequest(dataset=dataset or self.pool.id), folder)[0].id

    def streams(self) -> ProjectorStreams:
        return ProjectorStreams(gradients=self.stream(self.gradients), routing=self.stream(self.routing))

    def annotation(self, rows: Any = None) -> str:
        rows = range(len(self.labels)) if rows is None else rows
        taxonomy = taxonomy_of(self.workplace)
        file = self.folder / f"labels-{len(list(self.folder.iterdir()))}.jsonl"
        lines = [
            {"id": self.ids[row], "categories": [NAMES[n] for n in np.flatnonzero(self.labels[row])]} for row in rows
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        request = AnnotationRequest(dataset=self.pool.id, taxonomy=taxonomy)
        return self.workplace.context.annotations.upload(request, file)[0].id

    def projector(self, **changes: Any) -> AnyJob:
        asked = {"streams": self.streams(), "annotations": self.annotation(), "config": SMALL, "seed": 0} | changes
        return self.workplace.context.projectors.start(ProjectorRequest(**asked))[0]


def taxonomy_of(workplace: Workplace) -> str:
    capabilities = [{"name": name, "definition": ""} for name in NAMES]
    return workplace.context.catalog.add_taxonomy(id="tax_" + "0" * 24, capabilities=capabilities).id


@pytest.fixture
def lab(workplace: Workplace, tmp_path: Path) -> Lab:
    folder = tmp_path / "sent"
    folder.mkdir()
    return Lab(workplace, folder)


def done(workplace: Workplace, job: AnyJob) -> AnyJob:
    workplace.work()
    found = workplace.job(job.id)
    assert found.status == "succeeded", found.error
    return found


def result_of(job: AnyJob) -> ProjectorResult:
    return ProjectorResult.model_validate(job.result.model_dump() if job.result else None)


def test_a_projector_is_trained_on_labelled_rows_that_have_all_streams(workplace: Workplace, lab: Lab) -> None:
    streams = ProjectorStreams(
        gradients=lab.stream(lab.gradients), routing=lab.stream(lab.routing, rows=range(3, ROWS))
    )
    job = done(workplace, lab.projector(streams=streams, annotations=lab.annotation(rows=range(ROWS - 5))))
    result = result_of(job)
    assert (result.unlabelled_rows, result.absent_rows) == (5, 3)
    assert result.training_rows + result.validation_rows == ROWS - 8
    assert (result.gradient_columns, result.routing_columns) == (DIM, EXPERTS)
    assert [each.name for each in result.capabilities] == list(NAMES)
    judged = sum(each.training_rows + each.rows for each in result.capabilities)
    assert judged == lab.labels[3 : ROWS - 5].sum()
    assert workplace.context.projectors.epochs(job.id) == result.epochs
    assert job.progress.done == job.progress.total == 3 * -(-result.training_rows // 16)


def test_the_same_request_is_the_same_projector_and_a_kept_one_is_not_trained_again(
    workplace: Workplace, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = done(workplace, lab.projector())
    again, works = workplace.context.projectors.start(
        ProjectorRequest.model_validate(first.request.model_dump() | {"seed": 0})
    )
    assert (again.id, works) == (first.id, False)
    other = lab.projector(seed=1)
    assert other.id != first.id
    workplace.context.jobs.cancel(other.id)
    kept = workplace.context.projectors.files.weights(first.id).read_bytes()
    workplace.context.projectors.remove(first.id)
    assert not workplace.context.projectors.files.exists(first.id)
    once_more = done(workplace, lab.projector())
    assert once_more.id == first.id
    assert workplace.context.projectors.files.weights(first.id).read_bytes() == kept


def test_rows_are_where_the_kept_projector_puts_them_bit_for_bit(workplace: Workplace, lab: Lab) -> None:
    projector = done(workplace, lab.projector())
    streams = ProjectorStreams(
        gradients=lab.stream(lab.gradients), routing=lab.stream(lab.routing, rows=range(4, ROWS))
    )
    embeddings = workplace.context.embeddings
    job = done(workplace, embeddings.start(EmbeddingRequest(projector=projector.id, streams=streams))[0])
    result = EmbeddingResult.model_validate(job.result.model_dump() if job.result else None)
    assert (result.dataset, result.task, result.absent_rows, result.dim) == (lab.pool.id, None, 4, 8)
    places = embeddings.places(job.id)
    read = read_projector(workplace.context.projectors.files.weights(projector.id))
    routing = lab.routing.copy()
    routing[:4] = 0
    again = read.place(Streams(lab.gradients, routing))
    np.testing.assert_array_equal(places.embedding[4:], again.embedding[4:])
    np.testing.assert_array_equal(places.probabilities[4:], again.probabilities[4:])
    np.testing.assert_array_equal(places.similarities[4:], again.similarities[4:])
    assert places.present.tolist() == [False] * 4 + [True] * (ROWS - 4)
    assert result.counts == (again.probabilities[4:] > 0.5).sum(axis=0).tolist()
    page = embeddings.rows(job.id, start=3, stop=6)
    assert page.data[0].embedding is None
    assert page.data[1].row == 4
    assert page.data[1].probabilities == again.probabilities[4].tolist()
    assert page.has_more
    assert embeddings.of(projector.id, lab.pool.id).embedding.tolist() == places.embedding.tolist()


def test_what_does_not_go_together_is_refused_by_name(workplace: Workplace, lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Lab(workplace, tmp_path / "other", seed=1)
    mixed = ProjectorStreams(gradients=lab.stream(lab.gradients), routing=other.stream(other.routing))
    with pytest.raises(InvalidInput, match="/streams/routing"):
        lab.projector(streams=mixed)
    with pytest.raises(InvalidInput, match="labels of"):
        lab.projector(annotations=other.annotation())
    unready = lab.projector()
    request = {"projector": unready.id, "streams": other.streams()}
    with pytest.raises(Conflict, match="once it has succeeded"):
        workplace.context.embeddings.start(EmbeddingRequest(**request))
    done(workplace, unready)
    alone = ProjectorStreams(gradients=other.stream(other.gradients))
    with pytest.raises(InvalidInput, match="reads these, too"):
        workplace.context.embeddings.start(EmbeddingRequest(projector=unready.id, streams=alone))
    narrow = ProjectorStreams(gradients=other.stream(other.gradients[:, :5]), routing=other.stream(other.routing))
    with pytest.raises(InvalidInput, match="5 numbers"):
        workplace.context.embeddings.start(EmbeddingRequest(projector=unready.id, streams=narrow))
    with pytest.raises(Conflict, match="POST /embeddings"):
        workplace.context.embeddings.of(unready.id, other.pool.id)


def test_labels_without_any_capability_teach_nothing(workplace: Workplace, lab: Lab) -> None:
    lab.labels[:] = False
    job = lab.projector()
    workplace.work()
    found = workplace.job(job.id)
    assert found.status == "failed"
    assert found.error is not None
    assert "nothing to learn" in found.error.detail


def test_a_backup_has_the_network_of_a_projector(workplace: Workplace, lab: Lab, tmp_path: Path) -> None:
    projector = done(workplace, lab.projector())
    backups.backup(workplace.context, tmp_path / "backup")
    kept = ProjectorFiles(tmp_path / "backup" / "files" / "projectors").weights(projector.id)
    assert kept.read_bytes() == workplace.context.projectors.files.weights(projector.id).read_bytes()


def test_what_is_used_stays_and_what_is_damaged_is_said(workplace: Workplace, lab: Lab) -> None:
    projector = done(workplace, lab.projector())
    streams = lab.streams()
    job = done(
        workplace, workplace.context.embeddings.start(EmbeddingRequest(projector=projector.id, streams=streams))[0]
    )
    with pytest.raises(InUse):
        workplace.context.projectors.remove(projector.id)
    with pytest.raises(InUse):
        workplace.context.streams.remove(streams.gradients)
    file = workplace.context.projectors.files.weights(projector.id)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(Damaged, match="train it again"):
        workplace.context.projectors.files.weights(projector.id)
    found = [finding for finding in examine(workplace.context, older_than=0, deep=True) if finding.kind == "damaged"]
    assert [finding.place for finding in found] == [f"projectors/{projector.id}"]
    workplace.context.projectors.files.delete([projector.id])
    found = [finding for finding in examine(workplace.context, older_than=0, deep=True) if finding.kind == "missing"]
    assert [finding.place for finding in found] == [f"projectors/{projector.id}"]
    workplace.context.embeddings.remove(job.id)
    assert workplace.context.projectors.remove(projector.id) == projector.id


def test_streams_of_this_store_are_compared_by_how_they_were_made(workplace: Workplace, lab: Lab) -> None:
    hidden = lab.stream(np.hstack([lab.gradients, lab.gradients])[:, :7])
    streams = ProjectorStreams(gradients=lab.stream(lab.gradients), hidden=hidden)
    result = result_of(done(workplace, lab.projector(streams=streams)))
    assert (result.gradient_columns, result.routing_columns) == (DIM + 7, 0)


# Selection --------------------------------------------------------------------------------------------------------


class Target:
    """A projector, a pool and a task whose rows it has placed."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.workplace = lab, lab.workplace
        self.projector = done(self.workplace, lab.projector(config=SMALL.model_copy(update={"epochs": 8}))).id
        self.pool = self._placed(lab.streams())
        self.task = self._task(folder)
        rng = np.random.default_rng(7)
        self.wanted = 3 * np.eye(len(NAMES), DIM)[[0, 0, 1, 1, 1]] + 0.3 * rng.standard_normal((5, DIM))
        self.subtasks = ["first", "first", "second", "second", "second"]
        ids = [f"want-{row}" for row in range(5)]
        streams = [self._task_stream(folder, values, ids) for values in (self.wanted, np.full((5, EXPERTS), 0.5))]
        self.references = self._placed(ProjectorStreams(gradients=streams[0], routing=streams[1]))

    def _placed(self, streams: ProjectorStreams) -> Places:
        embeddings = self.workplace.context.embeddings
        request = EmbeddingRequest(projector=self.projector, streams=streams)
        return embeddings.places(done(self.workplace, embeddings.start(request)[0]).id)

    def _task(self, folder: Path) -> str:
        (folder / "task").mkdir()
        rows = [
            {"id": f"want-{row}", "subtask": "first" if row < 2 else "second", **text}
            for row, text in enumerate(numbered(range(5000, 5005)))
        ]
        for split in ("validation", "test"):
            (folder / "task" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        stored = self.workplace.context.tasks.store("jsonl", folder / "task")
        return self.workplace.context.catalog.add_task(
            id=stored.id, name="target", kind="jsonl", subtasks=stored.subtasks, notes=stored.notes, replace=False
        ).id

    def _task_stream(self, folder: Path, values: Any, ids: list[str]) -> str:
        path = folder / f"of-task-{len(list(folder.iterdir()))}"
        path.mkdir()
        np.save(path / "rows.npy", values.astype(np.float32))
        (path / "ids.json").write_text(json.dumps(ids))
        return self.workplace.context.streams.upload(StreamRequest(task=self.task), path)[0].id

    def select(self, **asked: Any) -> Selection:
        context = self.workplace.context
        query = Query(method="cods", **{"tasks": [self.task], "k": 12, **asked})
        recipe, sources = context.recipes.resolve(query, path="/select")
        scores = context.scoring.known(recipe, sources)
        assert scores is not None
        return context.answers.select(recipe, sources, scores, limit=1000)


@pytest.fixture
def target(lab: Lab, tmp_path: Path) -> Target:
    return Target(lab, tmp_path)


def alike(one: Any, other: Any) -> float:
    return float(one.astype(float) @ other.astype(float))


def test_references_take_their_nearest_rows_in_turns_without_twins(target: Target) -> None:
    """Against loops over rows: turns by subtask, twins of rows taken and of references passed over."""
    pool, references = target.pool.embedding, target.references.embedding
    cosines = np.sort(np.concatenate([(pool @ pool.T)[np.triu_indices(ROWS, 1)], (pool @ references.T).ravel()]))
    limit = float(np.quantile(cosines, 0.97))  # so that some are passed over
    found = target.select(dedupe=limit, neighbours=2, beta=0.5)
    left = [row for row in range(ROWS) if max(alike(pool[row], each) for each in references) <= limit]
    taken: list[tuple[int, int]] = []
    turn, order = 0, [0, 2, 1, 3, 4]
    while len(taken) < 12 and left:
        row = max(left, key=lambda each: alike(pool[each], references[order[turn]]))
        left.remove(row)
        if all(alike(pool[row], pool[other]) <= limit for other, _ in taken):
            taken.append((row, order[turn]))
            turn = (turn + 1) % 5
    assert [(row.row, row.subtask) for row in found.data] == [(row, target.subtasks[by]) for row, by in taken]
    wanted = target.references.probabilities.mean(axis=0)
    for row in found.data:
        nearest = sorted(alike(pool[row.row], each) for each in references)[-2:]
        own = target.pool.probabilities[row.row]
        agreement = alike(own, wanted) / np.linalg.norm(own) / np.linalg.norm(wanted)
        assert row.score == pytest.approx(np.mean(nearest) + 0.5 * agreement, abs=1e-5)
    assert found.recipe.by == target.projector
    assert found.recipe.dedupe_by == "features"
    assert any("lie where a row of the task does" in note for note in found.notes)


def test_other_strategies_rank_by_the_mean_and_by_named_capabilities(target: Target) -> None:
    places, references = target.pool, target.references
    centre = references.embedding.mean(axis=0)
    by_mean = target.select(strategy="prototype")
    expected = np.argsort(-(places.embedding @ centre), kind="stable")[:12]
    assert [row.row for row in by_mean.data] == expected.tolist()
    assert by_mean.recipe.dedupe is None
    by_name = target.select(strategy="capability", tasks=[], capabilities=["poetry", "law"])
    expected = np.argsort(-places.similarities[:, [1, 2]].mean(axis=1), kind="stable")[:12]
    assert [row.row for row in by_name.data] == expected.tolist()
    assert {row.task for row in by_name.data} == {None}
    best = target.select(strategy="top", neighbours=1)
    expected = np.argsort(-(places.embedding @ references.embedding.T).max(axis=1), kind="stable")[:12]
    assert [row.row for row in best.data] == expected.tolist()
    apart = target.select(strategy="k-center", k=6)
    assert len({row.row for row in apart.data}) == 6
    again = target.workplace.context.recipes.sent(by_name.recipe)
    assert not again.datasets


def test_a_selection_has_more_of_what_is_asked_for_than_its_pool(target: Target) -> None:
    chosen = target.select(strategy="capability", tasks=[], capabilities=["law"], k=10)
    rows = [row.row for row in chosen.data]
    assert target.lab.labels[rows, 2].mean() > 1.3 * target.lab.labels[:, 2].mean()
    embeddings = target.workplace.context.embeddings
    found = embeddings.histogram(
        target.projector, chosen.id, [target.lab.pool.id], [(row.dataset, row.row) for row in chosen.data]
    )
    law = found.capabilities[2]
    said = target.pool.probabilities > 0.5
    assert (law.pool, law.selected) == (said[:, 2].sum(), said[rows, 2].sum())
    assert law.enrichment == pytest.approx(said[rows, 2].mean() / said[:, 2].mean())
    assert (found.pool, found.selected) == (ROWS, 10)


def test_what_an_ability_space_has_no_use_for_is_refused(target: Target) -> None:
    for asked, word in (
        ({"strategy": "capability", "tasks": []}, "capabilities"),
        ({"strategy": "capability", "capabilities": ["law"]}, "task"),
        ({"strategy": "capability", "tasks": [], "capabilities": ["dance"]}, "dance"),
        ({"strategy": "prototype", "neighbours": 3}, "neighbours"),
        ({"capabilities": ["law"]}, "capabilities"),
        ({"quota": ["equal"]}, "quota"),
        ({"aggregate": "max"}, "aggregate"),
        ({"tasks": []}, "task"),
        ({"method": "bm25", "beta": 0.5}, "beta"),
        ({"method": "bm25", "strategy": "nearest"}, "strategy"),
    ):
        query = Query(**{"method": "cods", "tasks": [target.task], "k": 12, **asked})
        with pytest.raises(InvalidInput, match=word):
            target.workplace.context.recipes.resolve(query, path="/select")
    other = target.workplace.task(name="unplaced")
    with pytest.raises(Conflict, match="POST /embeddings"):
        target.select(tasks=[other.id])
    target.select()
    with pytest.raises(InUse):
        target.workplace.context.projectors.remove(target.projector)
