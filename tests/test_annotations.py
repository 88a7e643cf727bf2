"""Annotations: labels by id, from a file or the rows' origins; nothing of a file is dropped without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import AnnotationRequest, AnnotationResult, Capability, TaxonomyRequest
from pydantic import ValidationError

from datastore import taxonomies
from datastore.errors import Conflict, InUse, InvalidInput
from datastore.letters import letters, options, question
from datastore.schema import TaxonomyRow
from tests.test_streams import with_ids
from tests.workplace import Workplace

NAMES = [capability.name for capability in taxonomies.CODS]


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace.at(tmp_path)


def file_of(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def result_of(workplace: Workplace, id: str) -> AnnotationResult:
    job = workplace.job(id)
    assert job.status == "succeeded", job.error
    return AnnotationResult.model_validate(job.result.model_dump() if job.result else None)


def origins(*names: str) -> list[dict[str, Any]]:
    return [{**row, "dataset": name} for row, name in zip(with_ids(len(names)), names, strict=True)]


def test_the_default_taxonomy_has_the_thirteen_in_their_order(workplace: Workplace) -> None:
    taxonomy = taxonomies.record(workplace.context.catalog, taxonomies.CODS)
    assert [each.name for each in taxonomy.capabilities] == [
        "Action Recognition", "Attribute Recognition", "Captioning", "Function Reasoning", "Future Prediction",
        "Identity Reasoning", "Logical Reasoning", "Object Localization", "OCR", "Physical Property",
        "Relation Reasoning", "Spatial Reasoning", "Structural Understanding",
    ]  # fmt: skip
    assert taxonomies.record(workplace.context.catalog, taxonomies.CODS).id == taxonomy.id
    reordered = taxonomies.record(workplace.context.catalog, taxonomies.CODS[::-1])
    assert reordered.id != taxonomy.id


def test_a_capability_stands_once_in_a_taxonomy() -> None:
    with pytest.raises(ValidationError, match="stands twice"):
        TaxonomyRequest(capabilities=[Capability(name="a"), Capability(name="a")])


def test_labels_are_joined_by_id_and_both_keys_are_taken(workplace: Workplace, tmp_path: Path) -> None:
    pool = workplace.pool(with_ids(4))
    file = file_of(
        tmp_path / "labels.jsonl",
        {"id": "row-2", "categories": ["OCR", "Captioning"], "source": "x", "question": "y"},
        {"id": "row-0", "category": ["Logical Reasoning"]},
        {"id": "row-3", "categories": "OCR"},
    )
    job, works = workplace.context.annotations.upload(AnnotationRequest(dataset=pool.id), file)
    assert not works
    labels, known = workplace.context.annotations.labels(job.id)
    assert workplace.context.annotations.capabilities(job.id) == tuple(NAMES)
    wanted = np.zeros((4, 13), bool)
    wanted[2, [8, 2]] = wanted[0, 6] = wanted[3, 8] = True
    np.testing.assert_array_equal(labels, wanted)
    assert known.tolist() == [True, False, True, True]
    result = result_of(workplace, job.id)
    assert {each.name: each.rows for each in result.capabilities if each.rows} == {
        "OCR": 2, "Captioning": 1, "Logical Reasoning": 1,
    }  # fmt: skip
    assert (result.rows, result.labelled_rows, result.total_problems) == (4, 3, 0)


def test_a_json_array_in_another_order_has_the_same_labels(workplace: Workplace, tmp_path: Path) -> None:
    pool = workplace.pool(with_ids(3))
    entries = [{"id": f"row-{row}", "categories": [NAMES[row]]} for row in range(3)]
    (tmp_path / "array.json").write_text(json.dumps(entries[::-1]))
    annotations = workplace.context.annotations
    lines, _ = annotations.upload(AnnotationRequest(dataset=pool.id), file_of(tmp_path / "lines.jsonl", *entries))
    array, _ = annotations.upload(AnnotationRequest(dataset=pool.id), tmp_path / "array.json")
    np.testing.assert_array_equal(annotations.labels(lines.id)[0], annotations.labels(array.id)[0])


def test_whatever_cannot_be_taken_is_told_by_line(workplace: Workplace, tmp_path: Path) -> None:
    pool = workplace.pool(with_ids(3))
    file = file_of(
        tmp_path / "labels.jsonl",
        {"id": "row-0", "categories": ["OCR"]},
        {"id": "row-1", "categories": ["Telepathy"]},
        {"id": "stranger", "categories": ["OCR"]},
        {"id": "row-0", "categories": ["Captioning"]},
        {"categories": ["OCR"]},
        {"id": "row-2", "categories": ["OCR"], "category": ["OCR"]},
        {"id": "row-2", "categories": [3]},
        ["row-2", "OCR"],
    )
    annotations = workplace.context.annotations
    with pytest.raises(InvalidInput, match="7 lines cannot be taken") as refused:
        annotations.upload(AnnotationRequest(dataset=pool.id), file)
    assert [error.line for error in refused.value.errors] == [2, 3, 4, 5, 6, 7, 8]
    assert "Telepathy" in refused.value.errors[0].detail
    assert "stranger" in refused.value.errors[1].detail

    job, _ = annotations.upload(AnnotationRequest(dataset=pool.id, on_error="skip"), file)
    result = result_of(workplace, job.id)
    assert (result.labelled_rows, result.total_problems) == (1, 7)
    assert annotations.labels(job.id)[0][0].nonzero()[0].tolist() == [NAMES.index("OCR")]


def test_origins_are_labels_and_make_their_own_taxonomy(workplace: Workplace) -> None:
    pool = workplace.pool(origins("flan", "cot", "flan", "dolly"))
    annotations = workplace.context.annotations
    job, works = annotations.start(AnnotationRequest(dataset=pool.id, by="origin"))
    assert not works
    labels, known = annotations.labels(job.id)
    assert annotations.capabilities(job.id) == ("cot", "dolly", "flan")
    assert labels.argmax(1).tolist() == [2, 0, 2, 1]
    assert known.all()
    assert (labels.sum(1) == 1).all()
    assert [each.rows for each in result_of(workplace, job.id).capabilities] == [1, 1, 2]


def test_origins_that_a_given_taxonomy_has_not_are_refused_or_left_without_labels(workplace: Workplace) -> None:
    pool = workplace.pool(origins("flan", "cot", "flan"))
    some = taxonomies.record(workplace.context.catalog, [Capability(name="flan")], name="some")
    annotations = workplace.context.annotations
    with pytest.raises(InvalidInput, match="no capability called 'cot'"):
        annotations.start(AnnotationRequest(dataset=pool.id, by="origin", taxonomy="some"))
    job, _ = annotations.start(AnnotationRequest(dataset=pool.id, by="origin", taxonomy=some.id, on_error="skip"))
    labels, known = annotations.labels(job.id)
    assert labels[:, 0].tolist() == known.tolist() == [True, False, True]


def test_an_annotation_protects_its_taxonomy_and_goes_with_its_labels(workplace: Workplace, tmp_path: Path) -> None:
    pool = workplace.pool(with_ids(1))
    annotations, catalog = workplace.context.annotations, workplace.context.catalog
    file = file_of(tmp_path / "labels.jsonl", {"id": "row-0", "categories": []})
    job, _ = annotations.upload(AnnotationRequest(dataset=pool.id), file)
    taxonomy = result_of(workplace, job.id).taxonomy
    with pytest.raises(InUse):
        catalog.remove(TaxonomyRow, taxonomy)
    assert annotations.labels(job.id)[1].tolist() == [True]  # known to ask for nothing of the taxonomy
    annotations.remove(job.id)
    assert not list(workplace.context.settings.matrices.glob("matrix_*"))
    catalog.remove(TaxonomyRow, taxonomy)


def test_labels_are_asked_of_what_has_succeeded(workplace: Workplace) -> None:
    pool = workplace.pool(with_ids(1))
    workplace = Workplace.at(workplace.folder, model=workplace.model, labellers="http://127.0.0.1:9/v1")
    job, works = workplace.context.annotations.start(
        AnnotationRequest.model_validate({"dataset": pool.id, "by": "labeller", "labeller": {"model": "m"}})
    )
    assert works
    with pytest.raises(Conflict, match="queued"):
        workplace.context.annotations.labels(job.id)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("A, C", [0, 2]), ("C,A", [0, 2]), (" B \n", [1]), ("M", [12]), ("A, A", [0]),
        ("A rather long answer", None), ("I think B", None), ("A, B and C", None), ("N", None), ("a, c", None),
        ("A.", None), ("", None), ("A,", None), ("A C", None), ("AB", None), ("None", None), ("A, C\nB", None),
    ],
)  # fmt: skip
def test_only_a_comma_list_of_offered_letters_is_a_reply(reply: str, found: list[int] | None) -> None:
    assert options(reply, 13) == found


def test_every_option_has_letters_of_its_own_that_are_read_back() -> None:
    names = [letters(number) for number in range(702)]
    assert len(set(names)) == 702
    assert all(options(name, 702) == [number] for number, name in enumerate(names))


def test_a_question_lists_the_letters_with_their_definitions_and_not_the_answer() -> None:
    asked = question(taxonomies.CODS, "What is 2 + 2?")
    assert asked.startswith(f"Capabilities:\nA. {NAMES[0]}: {taxonomies.CODS[0].definition}\n")
    assert f"\nM. {NAMES[12]}" in asked
    assert "What is 2 + 2?" in asked
