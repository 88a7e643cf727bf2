"""Ways of choosing through a whole store: each selection is the one that its definition gives for the same scores."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import Selection, SelectionRecipe
from numpy.typing import NDArray

from datastore import answers
from datastore.errors import Busy, GradientsMissing, InUse, InvalidInput
from datastore.influence import normalise
from datastore.parameters import Query
from datastore.recipes import Sources
from datastore.schema import SelectionRow
from datastore.selection import diversity
from datastore.selection_files import SelectionFiles
from tests.stores import DIM, Store, numbers, request, task_numbers

ROWS = 90


@pytest.fixture
def filled(tmp_path: Path) -> Store:
    """A store with a pool of rows that come in pairs of near-duplicates, and a task, with all features."""
    store = Store.at(tmp_path / "store")
    for number in range(2):
        store.checkpoint(number)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
    store.pool(ROWS, name="pool")
    store.features.start(request(dataset="pool"))
    store.work(paired)
    store.task({"algebra": 3, "history": 2}, folder=tmp_path / "task")
    store.features.start(request(task="target"))
    store.work(task_numbers)
    return store


def paired(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """Features of which each odd row's is nearly that of the row before."""
    rows = np.arange(start, stop)
    own = np.concatenate([numbers(checkpoint, row, row + 1, dim) for row in rows.tolist()])
    first = np.concatenate([numbers(checkpoint, row - row % 2, row - row % 2 + 1, dim) for row in rows.tolist()])
    return np.where((rows % 2 == 1)[:, None], first + 0.05 * own, own).astype(np.float32)


def asked(store: Store, **query: Any) -> tuple[SelectionRecipe, Sources]:
    fields = {"tasks": ["target"], **query}
    return store.recipes.resolve(Query(**fields), path="/select")


def answered(store: Store, recipe: SelectionRecipe, sources: Sources) -> Selection:
    if recipe.method == "influence":
        store.scoring.start(recipe, sources)
        store.score()
    scores = store.scoring.known(recipe, sources)
    assert scores is not None
    return store.answers.select(recipe, sources, scores, limit=10_000)


def select(store: Store, **query: Any) -> Selection:
    return answered(store, *asked(store, **query))


def rows_of(selection: Selection) -> list[int]:
    return [row.row for row in selection.data]


def cosines(store: Store) -> NDArray[np.float32]:
    """Cosines of all rows with each other, weighted over the checkpoints."""
    recipe, _ = asked(store, k=1)
    pairs = zip(recipe.checkpoints, recipe.checkpoint_weights, strict=True)
    units = [(weight, normalise(paired(checkpoint, 0, ROWS, DIM))) for checkpoint, weight in pairs]
    return np.sum([weight * unit @ unit.T for weight, unit in units], axis=0)


def test_near_duplicates_are_passed_over_by_their_features(filled: Store) -> None:
    ranking = rows_of(select(filled, k=ROWS))
    between = cosines(filled)
    expected: list[int] = []
    for row in ranking:
        if not expected or between[row, expected].max() <= 0.95:
            expected.append(row)
    found = select(filled, k=30, dedupe=0.95)
    assert rows_of(found) == expected[:30]
    everything = select(filled, k=ROWS, dedupe=0.95)
    assert (everything.count, rows_of(everything)) == (len(expected), expected)
    assert any(f"{len(expected):,} rows instead of {ROWS:,}" in note for note in everything.notes)


def test_near_duplicates_are_passed_over_by_their_text(filled: Store) -> None:
    found = select(filled, k=ROWS, dedupe=0.9, dedupe_by="text")
    assert found.count == ROWS, "row 1 and row 2 are different texts of three words each"
    assert select(filled, k=ROWS, dedupe=1.0, dedupe_by="text").count == ROWS
    drawn = select(filled, tasks=[], method="random", k=10, dedupe=0.9)
    assert drawn.recipe.dedupe_by == "text"


def test_quotas_are_shares_of_the_chosen_rows_by_origin(filled: Store) -> None:
    ranking = rows_of(select(filled, k=ROWS))
    for quota, expected in (
        (["equal"], {0: 8, 1: 8, 2: 8}),
        (["proportional"], {0: 8, 1: 8, 2: 8}),
        (["origin0:0.5", "origin2:0.25"], {0: 12, 1: 6, 2: 6}),
        (["origin0:1"], {0: 24}),
    ):
        found = select(filled, k=24, quota=quota)
        assert found.origins == {f"origin{number}": count for number, count in expected.items()}
        of_origin = {number: [row for row in ranking if row % 3 == number] for number in expected}
        best = {row for number, count in expected.items() for row in of_origin[number][:count]}
        assert rows_of(found) == [row for row in ranking if row in best]
    short = select(filled, k=60, quota=["origin0:1"])
    assert (short.count, short.origins) == (30, {"origin0": 30})
    assert any("30 rows instead of 60" in note for note in short.notes)
    shared = select(filled, k=60, quota=["origin0:0.8"])
    assert shared.origins["origin0"] == 30
    assert shared.count == 60
    assert any("origin0: 30 rows instead of 48" in note for note in shared.notes)


@pytest.mark.parametrize(
    ("quota", "words"),
    [
        (["dolly:0.5"], "no row has the origin 'dolly'; there are origin0, origin1, origin2"),
        (["origin0:0.5", "origin1:0.6"], "more than 1"),
        (["origin0"], "'origin0' is none"),
        (["origin0:2"], "is none"),
        (["equal", "origin0:0.5"], "give it alone"),
        (["origin0:0.1", "origin0:0.1"], "two quotas"),
    ],
)
def test_a_quota_that_cannot_be_is_refused(filled: Store, quota: list[str], words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        asked(filled, k=5, quota=quota)
    assert caught.value.errors[0].parameter == "quota"


def test_centers_are_the_farthest_among_the_best(filled: Store) -> None:
    best = rows_of(select(filled, k=40))
    between = cosines(filled)
    expected = best[:1]
    while len(expected) < 10:
        expected.append(min(best, key=lambda row: (row in expected, between[row, expected].max())))
    assert rows_of(select(filled, k=10, strategy="k-center")) == expected
    assert set(rows_of(select(filled, k=10, strategy="k-center", among=10))) == set(best[:10])


def test_more_clusters_than_can_be_found_in_a_request_are_refused(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "MAX_CLUSTER_PRODUCTS", 4 * 80)
    assert select(filled, k=20, strategy="clusters", clusters=4).count == 20
    with pytest.raises(InvalidInput, match=r"5 clusters of 80 candidates .*ask for fewer"):
        select(filled, k=20, strategy="clusters", clusters=5)


def test_clusters_give_equal_parts_of_the_best(filled: Store) -> None:
    found = select(filled, k=20, strategy="clusters", clusters=4, selection_seed=3)
    assert (found.count, found.recipe.selection_seed) == (20, 3)
    assert set(rows_of(found)) <= set(rows_of(select(filled, k=80)))
    assert [row.score for row in found.data] == sorted((row.score for row in found.data), reverse=True)
    assert any("4 of 4 clusters of 80 candidates" in note for note in found.notes)


def test_rows_are_excluded_by_text_and_by_id(filled: Store) -> None:
    best = rows_of(select(filled, k=10))
    filled.pool(5, name="few")
    without = select(filled, datasets=["pool"], k=ROWS, exclude=["few"], exclude_ids=[str(best[0]), "unheard"])
    expected = [row for row in rows_of(select(filled, k=ROWS)) if row >= 5 and row != best[0]]
    assert rows_of(without) == expected
    assert without.pool == len(expected)
    first = select(filled, k=10)
    rest = select(filled, k=ROWS, exclude=[first.id])
    assert rows_of(rest) == rows_of(select(filled, k=ROWS))[10:]
    with pytest.raises(InUse):
        filled.answers.remove(first.id)


def contaminated(store: Store, tmp_path: Path) -> list[int]:
    """A task whose test rows hold two texts of the pool; the pool's rows of these."""
    folder = tmp_path / "leaky"
    folder.mkdir()
    long = "row 7 done and so on for as many words as there have to be in a row of a pool"
    rows = {"validation": [f"validation {'x ' * 15}"], "test": [f"{long}", "row 8"]}
    for split, texts in rows.items():
        lines = [json.dumps({"prompt": text, "completion": "y", "subtask": "s"}) + "\n" for text in texts]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    stored = store.tasks.store("jsonl", folder)
    store.catalog.add_task(
        id=stored.id, name="leaky", kind="jsonl", subtasks=stored.subtasks, notes=stored.notes, replace=False
    )
    return [7]


def test_overlaps_with_a_task_are_told_and_left_out(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "store")
    contaminated(store, tmp_path)
    text = "ROW 7, done: and so on for as many words as there have to be."
    lines = "".join(
        json.dumps({"dataset": "a", "id": f"r{n}", "prompt": text if n == 3 else f"row {n}", "completion": "z"}) + "\n"
        for n in range(6)
    )
    import io

    found = store.datasets.ingest(io.BytesIO(lines.encode()), filename="pool.jsonl", known={})
    store.catalog.add_dataset(
        id=found.id, rows=6, bytes=found.bytes, origins=found.origins, prefix=None, sources=found.sources, name="pool",
        replace=False,
    )  # fmt: skip
    told = select(store, tasks=["leaky"], method="random", k=6)
    assert told.contamination is not None
    assert (told.count, told.contamination.chosen, told.contamination.dropped) == (6, 1, 0)
    (overlap,) = told.contamination.overlaps
    assert (overlap.row, overlap.id, overlap.split, overlap.task_row) == (3, "r3", "test", 0)
    assert overlap.text == "row 7 done and so on for as many words as there have"
    assert told.contamination.unchecked == 1
    clean = select(store, tasks=[], decontaminate=["leaky"], method="random", k=6, exclude_contaminated=True)
    assert clean.contamination is not None
    assert (clean.count, clean.contamination.chosen, clean.contamination.dropped) == (5, 0, 1)
    assert 3 not in rows_of(clean)
    assert select(store, tasks=[], method="random", k=6).contamination is None


def test_a_matched_draw_has_as_many_rows_as_what_it_matches(filled: Store) -> None:
    model = select(filled, k=12)
    control = select(filled, tasks=[], method="random", match=model.id, selection_seed=5)
    assert (control.count, control.recipe.match, control.recipe.datasets) == (12, model.id, model.recipe.datasets)
    assert rows_of(control) != rows_of(model)
    with pytest.raises(InvalidInput, match="as many rows as the selection"):
        asked(filled, tasks=[], method="random", match=model.id, k=3)
    drawn = select(filled, tasks=[], method="random", k=3)
    with pytest.raises(InvalidInput, match="without features"):
        select(filled, tasks=[], method="random", match=drawn.id)


@pytest.mark.parametrize(
    "query",
    [
        {"k": 12},
        {"k": 12, "dedupe": 0.95, "quota": ["origin1:0.5"]},
        {"k": 12, "strategy": "clusters", "clusters": 3, "dedupe": 0.9, "dedupe_by": "text"},
        {"k": 8, "strategy": "k-center", "exclude_ids": ["3"], "exclude_contaminated": True},
        {"pct": 0.1, "tasks": [], "method": "random", "quota": ["equal"], "selection_seed": 9},
    ],
    ids=str,
)
def test_a_recipe_alone_gives_its_selection_again(filled: Store, query: dict[str, Any]) -> None:
    first = select(filled, **query)
    sent = json.loads(first.recipe.model_dump_json())
    filled.answers.remove(first.id)
    recipe = SelectionRecipe.model_validate(sent)
    again = answered(filled, recipe, filled.recipes.sources(recipe))
    assert again.model_dump(exclude={"created_at"}) == first.model_dump(exclude={"created_at"})


def test_a_known_selection_is_read_once_for_each_state_of_the_catalog(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, sources = asked(filled, k=12)
    made = answered(filled, recipe, sources)
    reads: list[str] = []
    page = SelectionFiles.page

    def counted(files: SelectionFiles, id: str, **wanted: int) -> list[dict[str, Any]]:
        reads.append(id)
        return page(files, id, **wanted)

    monkeypatch.setattr(SelectionFiles, "page", counted)
    found = [filled.answers.find(recipe, limit=5, after=after) for after in (0, 0, 5, 5, 0)]
    assert [each and [row.rank for row in each.data] for each in found] == [
        [*range(1 + after, 6 + after)] for after in (0, 0, 5, 5, 0)
    ]
    assert len(reads) == 2
    filled.catalog.rename(SelectionRow, made.id, "best")
    renamed = filled.answers.find(recipe, limit=5)
    assert renamed is not None
    assert (renamed.name, len(reads)) == ("best", 3)
    filled.answers.table(made.id).unlink()
    assert filled.answers.find(recipe, limit=5) is None, "rows that are lost are chosen again"


def test_a_comparison_of_rows_is_made_once_however_many_ask(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, sources = asked(filled, k=12, dedupe=0.95)
    expected = answered(filled, recipe, sources)
    filled.answers.remove(expected.id)
    scores = filled.scoring.known(recipe, sources)
    assert scores is not None
    both = threading.Barrier(2)
    calls = []
    choose = answers.choose

    def counted(*args: Any) -> Any:
        calls.append(1)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)  # a second choice at the same time would come here
        return choose(*args)

    monkeypatch.setattr(answers, "choose", counted)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: filled.answers.select(recipe, sources, scores, limit=12), range(2)))
    assert len(calls) == 1
    assert [rows_of(each) for each in found] == [rows_of(expected)] * 2


def test_who_waits_too_long_for_a_comparison_of_rows_is_told_to_ask_again(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "LONGEST_WAIT", 0.01)
    recipe, sources = asked(filled, k=12, dedupe=0.95)
    plain, _ = asked(filled, k=12)
    filled.answers.remove(answered(filled, recipe, sources).id)
    scores = filled.scoring.known(recipe, sources)
    assert scores is not None
    with filled.answers._alone():
        with pytest.raises(Busy, match="ask again in a minute"):
            filled.answers.select(recipe, sources, scores, limit=12)
        assert filled.answers.select(plain, sources, scores, limit=12).count == 12
    assert filled.answers.select(recipe, sources, scores, limit=12).count == 12


def test_a_recipe_whose_features_are_gone_says_how_to_compute_them(filled: Store) -> None:
    recipe, _ = asked(filled, k=3)
    other = recipe.model_copy(update={"dim": 2 * DIM})
    with pytest.raises(GradientsMissing, match="POST /gradients"):
        filled.recipes.sources(other)
    with pytest.raises(InvalidInput, match="a recipe has checkpoints"):
        filled.recipes.sources(recipe.model_copy(update={"checkpoints": [], "checkpoint_weights": []}))


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ({"among": 5}, "among"),
        ({"clusters": 5}, "clusters"),
        ({"strategy": "k-center", "quota": ["equal"]}, "quota"),
        ({"strategy": "k-center", "dedupe": 0.9}, "dedupe"),
        ({"strategy": "k-center", "among": 100_000}, "among"),
        ({"dedupe_by": "text"}, "dedupe_by"),
        ({"dedupe": 1.0}, "dedupe"),
        ({"selection_seed": 1}, "selection_seed"),
        ({"match": "sel_0"}, "match"),
        ({"tasks": [], "method": "random", "strategy": "clusters"}, "strategy"),
        ({"tasks": [], "method": "random", "dedupe": 0.9, "dedupe_by": "features"}, "dedupe_by"),
        ({"tasks": [], "method": "random", "exclude_contaminated": True}, "exclude_contaminated"),
    ],
    ids=str,
)
def test_what_does_nothing_in_a_way_of_choosing_is_refused(
    filled: Store, query: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        asked(filled, **({} if "match" in query else {"k": 5}), **query)
    assert [item.parameter for item in caught.value.errors] == [parameter]
