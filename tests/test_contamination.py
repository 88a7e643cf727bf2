"""Overlap of a pool's rows with a task's, held against comparing every run of words with every other."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from gradstore.types import SelectionRecipe
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from datastore.errors import Conflict
from datastore.rows import Example
from datastore.selection import contamination
from datastore.selection import words as hashing
from datastore.selection.choose import Chosen, Lengths, Material, choose
from datastore.selection.contamination import Contamination, NgramIndex, Overlap, TaskNgrams, runs_of
from datastore.selection.draws import draw
from datastore.selection.make_up import Labelled
from datastore.selection.words import ngrams, ngrams_in
from datastore.tasks import Tasks

TEXT = st.lists(st.sampled_from("abc"), max_size=16).map(" ".join)


def example(text: str) -> Example:
    return Example(id=None, origin="o", prompt=text, completion="")


def overlap(runs: TaskNgrams, text: str) -> Overlap | None:
    return Contamination(lambda _: text, [runs]).of(0)


@given(st.lists(TEXT, min_size=1, max_size=6), TEXT, st.sampled_from([5, 9, 13]))
@settings(deadline=None)
def test_a_row_overlaps_where_any_run_of_words_is_a_tasks(rows: list[str], text: str, n: int) -> None:
    runs = runs_of("task_1", [example(row) for row in rows], n, validation=2)
    mine = text.split()
    expected = {}
    for number, row in enumerate(rows):
        theirs = row.split()
        size = min(n, len(theirs))
        if size < min(8, n):
            if theirs and theirs == mine:
                expected[number] = (0, size)  # it can stand in any text: the same text and no other is an overlap
            continue
        have = {tuple(theirs[place : place + size]) for place in range(len(theirs) - size + 1)}
        places = [place for place in range(len(mine) - size + 1) if tuple(mine[place : place + size]) in have]
        if places:
            expected[number] = (places[0], size)
    found = overlap(runs, text)
    assert (found is None) == (not expected)
    if found is not None:
        number = found.row + (2 if found.split == "test" else 0)
        place, size = expected[number]
        assert (place, size) == min(expected.values())
        assert found.text == " ".join(mine[place : place + size])
    assert runs.unchecked == sum(len(row.split()) < min(8, n) for row in rows)


def test_a_run_in_many_rows_is_the_prompts_template() -> None:
    header = "The following are multiple choice questions with answers about high school physics and more"
    rows = [f"{header}: {' '.join(f'w{row}x{word}' for word in range(14))}" for row in range(11)]
    runs = runs_of("task_1", [example(row) for row in rows], 13, validation=5)
    assert overlap(runs, header) is None
    found = overlap(runs, f"before {rows[7]} after")
    assert found is not None
    assert (found.split, found.row) == ("test", 2)
    few = runs_of("task_1", [example(row) for row in rows[:10]], 13, validation=5)
    assert overlap(few, header) is not None
    same = runs_of("task_1", [example(header)] * 12, 13, validation=12)
    assert overlap(same, header) is not None, "a task of the template alone is compared with it"


def test_rows_that_differ_in_their_vowel_signs_alone_do_not_overlap() -> None:
    """The Hindi words for day and poor have the same consonants."""
    day, poor = (" ".join([word, "में", "हिन्दी"] * 5) for word in ("दिन", "दीन"))
    runs = runs_of("task_1", [example(day)], 13, validation=1)
    found = overlap(runs, day)
    assert found is not None
    assert found.text.split()[:3] == ["दिन", "में", "हिन्दी"]
    assert overlap(runs, poor) is None


@given(
    tasks=st.lists(st.lists(TEXT, min_size=1, max_size=4), max_size=3),
    texts=st.lists(TEXT, min_size=1, max_size=8),
    at_once=st.sampled_from([1, 10, 1 << 15]),
    data=st.data(),
)
@settings(deadline=None)
def test_rows_looked_up_together_share_what_each_shares_by_itself(
    tasks: list[list[str]], texts: list[str], at_once: int, data: st.DataObject
) -> None:
    runs = [runs_of(f"task_{n}", [example(row) for row in rows], 3, validation=1) for n, rows in enumerate(tasks)]
    expected = [next((found for each in runs if (found := overlap(each, text)) is not None), None) for text in texts]
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "WORDS_AT_ONCE", at_once)
        found = Contamination(texts.__getitem__, runs)
        assert found.of_all(rows[:10]) == [expected[row] for row in rows[:10]]
        assert found.of_all(rows) == [expected[row] for row in rows]
        assert list(found.found()) == [(row, expected[row]) for row in dict.fromkeys(rows) if expected[row] is not None]


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9), max_size=5), st.sets(st.integers(1, 7), max_size=4))
def test_runs_of_several_texts_are_those_of_each_and_none_is_of_two(texts: list[list[str]], sizes: set[int]) -> None:
    found = ngrams_in(texts, sizes)
    for size, runs in found.items():
        expected = [(text, place) for text, each in enumerate(texts) for place in range(len(each) - size + 1)]
        assert list(zip(runs.text.tolist(), runs.place.tolist(), strict=True)) == expected
        hashes = [ngrams(each, size) for each in texts]
        np.testing.assert_array_equal(runs.hashes, np.concatenate([np.zeros(0, np.uint64), *hashes]))
    assert set(found) == sizes


def test_runs_are_known_by_their_words_and_the_order_of_these() -> None:
    np.testing.assert_array_equal(ngrams(["a", "b", "c"], 2)[1:], ngrams(["b", "c"], 2))
    assert ngrams(["a", "b"], 2) != ngrams(["b", "a"], 2)
    assert len(ngrams(["a"], 2)) == 0


def test_few_and_short_words_are_remembered_and_all_have_the_same_hash_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "KEPT_WORDS", 3)
    monkeypatch.setattr(hashing, "_kept", hashing._Kept())
    long = "x" * hashing.LONGEST_KEPT
    found = [*"abcabcdeabcd", long, f"{long}x", "\ud800"]
    wanted = [blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest() for word in found]
    assert ngrams(found, 1).tolist() == [int.from_bytes(digest, "little") for digest in wanted]
    assert ngrams(found, 1).tolist() == [int.from_bytes(digest, "little") for digest in wanted]
    assert f"{long}x" not in hashing._kept
    ngrams([long], 1)
    assert long in hashing._kept
    for word in map(str, range(50)):
        ngrams([word], 1)
        assert len(hashing._kept) <= 3


def test_runs_of_a_task_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "task"
    folder.mkdir()
    line = '{{"prompt": "{0} one two three four five six seven eight nine ten", "completion": "yes", "subtask": "s"}}\n'
    (folder / "validation.jsonl").write_text(line.format("first"))
    (folder / "test.jsonl").write_text(line.format("second"))
    tasks = Tasks(tmp_path / "tasks")
    task = tasks.store("jsonl", folder).id
    index = NgramIndex(tasks, tmp_path / "ngrams")
    runs = index.of(task, 13)
    assert (runs.validation, runs.unchecked, len(list((tmp_path / "ngrams").iterdir()))) == (1, 0, 1)
    monkeypatch.setattr(contamination, "runs_of", None)
    again = index.of(task, 13)
    np.testing.assert_array_equal(again.hashes, runs.hashes)
    np.testing.assert_array_equal(again.owners, runs.owners)
    assert (again.sizes, again.validation, again.unchecked) == (runs.sizes, 1, 0)
    text = "so: SECOND one, two three four five six seven eight nine ten yes!"
    found = Contamination(lambda _: text, [again]).of(0)
    assert found is not None
    assert (found.split, found.row, found.task) == ("test", 0, task)
    (tmp_path / "ngrams" / "runs_1.npz").write_bytes(b"of another version")
    (tmp_path / "ngrams" / ".runs_2.npz.0a1b").write_bytes(b"of a killed process")
    assert (index.sweep(older_than=60), index.sweep(older_than=-1)) == (0, 2)
    other = index.root / f"runs_other-13-v{contamination.VERSION}.npz"
    other.write_bytes(b"of another task")
    index.of(task, 13)
    index.delete(task)
    assert list(index.root.iterdir()) == [other]


def test_a_matched_draw_says_which_lengths_it_did_without_and_of_no_row_nothing_can_be_chosen() -> None:
    leaked = " ".join(f"word{n}" for n in range(20))
    texts = [leaked if row % 2 else f"row {row}" for row in range(20)]
    lengths = np.array([5, 6], np.int32)[np.arange(20) % 2]
    contamination = Contamination(texts.__getitem__, [runs_of("task_1", [example(leaked)], 13, validation=0)])
    recipe = SelectionRecipe.model_construct(strategy="top", combine=None, exclude_contaminated=True)

    def chosen(among: NDArray[np.bool_]) -> Chosen:
        material = Material(
            Labelled(("pool",), np.zeros(20, np.int64)),
            str,
            lambda rows: np.empty((len(rows), 1)),
            contamination,
            Lengths(lengths, np.array([5, 5, 6], np.int32)),
        )
        return choose([draw(20, seed=2)], recipe, among, 3, material)

    found = chosen(np.ones(20, bool))
    assert lengths[found.rows].tolist() == [5, 5, 5]
    assert found.notes == ["1 of 3 rows could not be matched: no row of their length was left"]
    with pytest.raises(Conflict, match="no row can be chosen"):
        chosen(lengths == 6)


def test_a_matched_draw_takes_other_rows_of_the_same_length_instead_of_those_that_overlap() -> None:
    leaked = " ".join(f"word{n}" for n in range(20))
    texts = [leaked if row in (3, 4, 7) else f"row {row}" for row in range(40)]
    lengths = np.array([5, 6], np.int32)[np.arange(40) % 2]
    contamination = Contamination(texts.__getitem__, [runs_of("task_1", [example(leaked)], 13, validation=0)])
    everywhere = Labelled(("pool",), np.zeros(40, np.int64))
    wanted = np.array([5] * 12 + [6] * 12, np.int32)
    material = Material(everywhere, str, lambda rows: np.empty((len(rows), 1)), contamination, Lengths(lengths, wanted))
    drawn, taken = [draw(40, seed=2)], {}
    for exclude in (False, True):
        recipe = SelectionRecipe.model_construct(strategy="top", combine=None, exclude_contaminated=exclude)
        taken[exclude] = choose(drawn, recipe, np.ones(40, bool), 24, material).rows.tolist()
        assert sorted(lengths[taken[exclude]].tolist()) == wanted.tolist()
    assert {3, 4, 7} & set(taken[False]), "this draw has rows to leave out"
    assert not {3, 4, 7} & set(taken[True])
    assert set(taken[False]) - {3, 4, 7} <= set(taken[True])
