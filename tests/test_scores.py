"""Scores streamed from the store: the same as from raw gradients, however the store is cut."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gradstore.types import Aggregate, FeatureDtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datastore.errors import Conflict, Damaged
from datastore.gradients import Block, FeatureStore
from datastore.influence import NO_SUBTASK, TaskScores
from datastore.scores import ScoreCache, Target, cached, score
from datastore.segments import BLOCK_BYTES, FeatureView
from datastore.shards import CHUNK_ROWS

DIM = 48
RATES = [2e-5, 1.5e-5, 0.5e-5]
HOWS: list[Aggregate] = ["less", "avg", "max", "min"]


def gradients(rows: int, *, seed: int, checkpoints: int = 3, dim: int = DIM) -> list[np.ndarray]:
    """Float64 gradients with a few strong common directions and lengths from 1e-9 to 1e3, one array per checkpoint."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(7).standard_normal((checkpoints, 5, dim))
    lengths = 10.0 ** rng.uniform(-9, 3, (rows, 1))
    return [lengths * (rng.standard_normal((rows, 5)) @ each + rng.standard_normal((rows, dim))) for each in common]


def brute_force(
    pool: Sequence[np.ndarray], target: Sequence[np.ndarray], subtasks: Sequence[str], rates: Sequence[float], how: str
) -> np.ndarray:
    """The score of every row from raw float64 gradients, as the specification has it."""
    table = np.zeros((len(pool[0]), len(target[0])))
    for train, rows, rate in zip(pool, target, rates, strict=True):
        a = train / np.sqrt((train**2).sum(axis=1))[:, None]
        b = rows / np.sqrt((rows**2).sum(axis=1))[:, None]
        table += rate / sum(rates) * np.einsum("zd,vd->zv", a, b)
    if how == "less":
        names = np.array(subtasks)
        return np.array([max(row[names == name].mean() for name in subtasks) for row in table])
    if how == "avg":
        return np.array([row.mean() for row in table])
    return np.array([row.max() if how == "max" else row.min() for row in table])


class Room:
    """A store and a cache in a folder, filled on demand."""

    def __init__(self, root: Path) -> None:
        self.store = FeatureStore(root / "features")
        self.cache = ScoreCache(root / "scores")

    def fill(
        self,
        label: str,
        gradients: Sequence[np.ndarray],
        *,
        cuts: Sequence[int] = (),
        dtype: FeatureDtype = "float16",
        invalid: Sequence[Sequence[int]] = (),
    ) -> list[FeatureView]:
        """A view per checkpoint, its segments cut at `cuts`; `invalid` rows of each checkpoint have no feature."""
        views = []
        for number, rows in enumerate(gradients):
            bad = set(invalid[number]) if invalid else set()
            names = []
            for start, stop in zip((0, *cuts), (*cuts, len(rows)), strict=True):
                names.append(f"seg_{label}_{number}_{start}_{stop}_{dtype}")
                self._segment(names[-1], rows[start:stop], dtype, {row - start for row in bad})
            views.append(self.store.view(names))
        return views

    def _segment(self, name: str, rows: np.ndarray, dtype: FeatureDtype, bad: set[int]) -> None:
        if (self.store.root / name).exists():
            return
        self.store.create(name, rows=len(rows), dim=rows.shape[1], dtype=dtype, attributes={})
        for start in range(0, len(rows), CHUNK_ROWS):
            part = rows[start : start + CHUNK_ROWS].astype(np.float32)
            ones = np.ones(len(part), np.float32)
            reasons = ["the gradient is zero" if start + row in bad else None for row in range(len(part))]
            block = Block(part, ones, ones, ones, ones.astype(np.int32), reasons)
            digest = self.store.write(name, start=start, attempt=1, block=block)
            self.store.publish(name, start=start, attempt=1, digest=digest)


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


SUBTASKS = ["law", "law", "art", "law", "music", "art", "art"]


def assert_same(found: TaskScores, wanted: TaskScores) -> None:
    np.testing.assert_allclose(found.score, wanted.score, atol=1e-6)
    np.testing.assert_array_equal(found.valid, wanted.valid)
    gaps = found.subtask != wanted.subtask
    assert not gaps.any()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float16", 2e-4)])
def test_the_score_vector_is_the_one_of_brute_force(
    room: Room, how: Aggregate, dtype: FeatureDtype, tolerance: float
) -> None:
    pool, target = gradients(2500, seed=1), gradients(7, seed=2)
    views = room.fill("pool", pool, dtype=dtype)
    task = Target(room.fill("task", target, dtype=dtype), SUBTASKS)
    (found,) = score(views, [task], weights=RATES, aggregate=how, cache=room.cache)
    wanted = brute_force(pool, target, SUBTASKS, RATES, how)
    np.testing.assert_allclose(found.score, wanted, atol=tolerance)
    assert found.score.dtype == np.float32
    assert found.valid.all()
    assert np.corrcoef(found.score, wanted)[0, 1] > 0.999999


def decoded_by_hand(view: FeatureView) -> np.ndarray:
    """What a view's rows say once they are stored, as float64 (n, dim), from the features and not from the kernel."""
    return view.features(0, view.rows).astype(np.float64)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8", "int4", "binary"])
def test_scores_are_the_cosines_of_what_is_stored_in_any_dtype(room: Room, how: Aggregate, dtype: FeatureDtype) -> None:
    pool, target = gradients(1500, seed=1, dim=45), gradients(7, seed=2, dim=45)  # no whole number of bytes when packed
    views, task_views = room.fill("pool", pool, dtype=dtype, cuts=[700]), room.fill("task", target, dtype=dtype)
    (found,) = score(views, [Target(task_views, SUBTASKS)], weights=RATES, aggregate=how, cache=room.cache)
    stored = [decoded_by_hand(view) for view in views]
    wanted = brute_force(stored, [decoded_by_hand(view) for view in task_views], SUBTASKS, RATES, how)
    np.testing.assert_allclose(found.score, wanted, atol=3e-6)


def test_a_pool_and_a_task_of_two_dtypes_are_scored_by_what_each_stores(room: Room) -> None:
    pool, target = gradients(300, seed=1), gradients(7, seed=2)
    views, task_views = room.fill("pool", pool, dtype="int4"), room.fill("task", target, dtype="float32")
    (found,) = score(views, [Target(task_views, SUBTASKS)], weights=RATES, aggregate="less", cache=room.cache)
    stored = [decoded_by_hand(view) for view in views]
    wanted = brute_force(stored, [decoded_by_hand(view) for view in task_views], SUBTASKS, RATES, "less")
    np.testing.assert_allclose(found.score, wanted, atol=3e-6)


def test_the_subtask_is_the_one_that_gave_the_score(room: Room) -> None:
    pool, target = gradients(500, seed=1), gradients(7, seed=2)
    views = room.fill("pool", pool)
    task = Target(room.fill("task", target), SUBTASKS)
    assert task.subtasks == ("law", "art", "music")
    (found,) = score(views, [task], weights=RATES, aggregate="less", cache=room.cache)
    names = np.array(SUBTASKS)
    for row in (0, 17, 499):
        chosen = names == task.subtasks[found.subtask[row]]
        one = brute_force(
            [each[row : row + 1] for each in pool],
            [each[chosen] for each in target],
            names[chosen].tolist(),
            RATES,
            "less",
        )
        assert found.score[row] == pytest.approx(one[0], abs=2e-4)
    (mean,) = score(views, [task], weights=RATES, aggregate="avg", cache=room.cache)
    assert (mean.subtask == NO_SUBTASK).all()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 1199), max_size=3), how=st.sampled_from(HOWS))
def test_the_cut_into_segments_changes_no_score(
    tmp_path_factory: pytest.TempPathFactory, cuts: set[int], how: Aggregate
) -> None:
    room = Room(tmp_path_factory.mktemp("cuts"))
    pool, target = gradients(1200, seed=1, checkpoints=2), gradients(7, seed=2, checkpoints=2)
    task = Target(room.fill("task", target), SUBTASKS)
    (whole,) = score(room.fill("pool", pool), [task], weights=RATES[:2], aggregate=how, cache=room.cache)
    one, other = room.fill("pool", pool, cuts=sorted(cuts))[0], room.fill("pool", pool, cuts=sorted(cuts)[::2])[1]
    (found,) = score([one, other], [task], weights=RATES[:2], aggregate=how, cache=room.cache)
    assert_same(found, whole)


def test_the_order_of_the_pool_changes_nothing_but_the_order(room: Room) -> None:
    pool, target = gradients(1500, seed=1), gradients(7, seed=2)
    turned = np.random.default_rng(0).permutation(1500)
    task = Target(room.fill("task", target), SUBTASKS)
    (straight,) = score(room.fill("pool", pool), [task], weights=RATES, aggregate="less", cache=room.cache)
    shuffled = room.fill("turned", [each[turned] for each in pool])
    (found,) = score(shuffled, [task], weights=RATES, aggregate="less", cache=room.cache)
    np.testing.assert_allclose(found.score, straight.score[turned], atol=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_several_tasks_in_one_pass_are_scored_as_one_by_one(room: Room, tmp_path: Path, how: Aggregate) -> None:
    views = room.fill("pool", gradients(1500, seed=1))
    tasks = [
        Target(room.fill("a", gradients(7, seed=2)), SUBTASKS),
        Target(room.fill("b", gradients(3, seed=3)), ["x", "y", "x"]),
        Target(room.fill("c", gradients(1, seed=4)), ["all"]),
    ]
    together = score(views, tasks, weights=RATES, aggregate=how, cache=room.cache)
    for task, found in zip(tasks, together, strict=True):
        (alone,) = score(views, [task], weights=RATES, aggregate=how, cache=ScoreCache(tmp_path / task.key))
        assert_same(found, alone)


@pytest.mark.parametrize("how", HOWS)
def test_rows_without_a_feature_have_no_score_and_disturb_no_other(room: Room, how: Aggregate) -> None:
    pool, target = gradients(1100, seed=1), gradients(7, seed=2)
    rest = [0, 1, 3, 4, 6]
    views = room.fill("pool", pool, invalid=[[3], [], [1050, 3]])
    task = Target(room.fill("task", target, invalid=[[2], [5], []]), SUBTASKS)
    (found,) = score(views, [task], weights=RATES, aggregate=how, cache=room.cache)
    assert np.flatnonzero(~found.valid).tolist() == [3, 1050]
    assert found.score[[3, 1050]].tolist() == [0, 0]
    wanted = brute_force(pool, [each[rest] for each in target], [SUBTASKS[row] for row in rest], RATES, how)
    np.testing.assert_allclose(found.score[found.valid], wanted[found.valid], atol=2e-4)
    assert np.isfinite(found.score).all()
    assert task.notes == ["2 of 7 validation rows have no feature at some checkpoint and are left out"]


def test_a_subtask_that_lost_its_rows_keeps_the_others_numbers(room: Room) -> None:
    target = gradients(4, seed=2, checkpoints=1)
    views = room.fill("pool", gradients(50, seed=1, checkpoints=1))
    task = Target(room.fill("task", target, invalid=[[0]]), ["lost", "kept", "kept", "last"])
    (found,) = score(views, [task], weights=[1.0], aggregate="less", cache=room.cache)
    assert set(found.subtask.tolist()) <= {1, 2}
    assert any("'lost' is left out" in note for note in task.notes)


def test_a_task_without_a_usable_row_is_refused(room: Room) -> None:
    views = room.fill("task", gradients(2, seed=2, checkpoints=2), invalid=[[0], [1]])
    with pytest.raises(Conflict, match="none of the 2 validation rows"):
        Target(views, ["a", "b"])


def test_views_that_do_not_fit_are_refused(room: Room) -> None:
    pool, task = room.fill("pool", gradients(9, seed=1)), Target(room.fill("task", gradients(2, seed=2)), ["a", "b"])
    narrow = Target(room.fill("narrow", gradients(2, seed=2, dim=5)), ["a", "b"])
    with pytest.raises(ValueError, match="weights"):
        score(pool, [task], weights=RATES[:2], aggregate="less", cache=room.cache)
    with pytest.raises(ValueError, match="dim"):
        score(pool, [narrow], weights=RATES, aggregate="less", cache=room.cache)
    with pytest.raises(ValueError, match="3 subtasks"):
        Target(task.views, ["a", "b", "c"])


# The kernel ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 3, 100_000])
def test_any_dim_is_scored(room: Room, dim: int) -> None:
    pool, target = gradients(40, seed=1, checkpoints=1, dim=dim), gradients(3, seed=2, checkpoints=1, dim=dim)
    task = Target(room.fill("task", target), ["a", "b", "a"])
    (found,) = score(room.fill("pool", pool), [task], weights=[1.0], aggregate="less", cache=room.cache)
    np.testing.assert_allclose(found.score, brute_force(pool, target, ["a", "b", "a"], [1.0], "less"), atol=2e-4)


# The cache ----------------------------------------------------------------------------------------------------------


def chunk(room: Room, segment: str) -> Path:
    return room.store.root / segment / "data.zarr" / "features" / "c.0.0"


def test_scores_are_answered_from_the_cache_without_reading_a_feature(room: Room) -> None:
    views = room.fill("pool", gradients(1500, seed=1))
    task = Target(room.fill("task", gradients(7, seed=2)), SUBTASKS)
    asked = {"weights": RATES, "cache": room.cache}
    assert cached(views, [task], aggregate="less", weights=RATES, cache=room.cache) is None
    first = score(views, [task], aggregate="less", weights=RATES, cache=room.cache)
    for view in views:
        chunk(room, view.names[0][0]).unlink()
    assert_same(score(views, [task], aggregate="less", weights=RATES, cache=room.cache)[0], first[0])
    again = cached(views, [task], aggregate="less", weights=RATES, cache=room.cache)
    assert again is not None
    assert_same(again[0], first[0])
    with pytest.raises(Damaged, match="is missing"):
        score(views, [task], aggregate="max", **asked)  # type: ignore[arg-type]  # one mapping for brevity


def test_what_the_scores_depend_on_is_in_their_name(room: Room) -> None:
    views = room.fill("pool", gradients(50, seed=1))
    task = Target(room.fill("task", gradients(7, seed=2)), SUBTASKS)
    other = Target(room.fill("task", gradients(7, seed=2)), ["all"] * 7)
    score(views, [task], weights=RATES, aggregate="less", cache=room.cache)
    doubled = [2 * rate for rate in RATES]
    assert cached(views, [task], weights=doubled, aggregate="less", cache=room.cache) is not None
    assert cached(views, [task], weights=RATES[::-1], aggregate="less", cache=room.cache) is None
    assert cached(views, [task], weights=RATES, aggregate="avg", cache=room.cache) is None
    assert cached(views, [other], weights=RATES, aggregate="less", cache=room.cache) is None
    assert cached(views[::-1], [task], weights=RATES, aggregate="less", cache=room.cache) is None


def test_a_grown_pool_scores_its_new_segment_only(room: Room) -> None:
    pool = gradients(2200, seed=1)
    task = Target(room.fill("task", gradients(7, seed=2)), SUBTASKS)
    before = room.fill("pool", [rows[:2000] for rows in pool])
    score(before, [task], weights=RATES, aggregate="less", cache=room.cache)
    grown = [room.store.view([view.names[0][0], *_added(room, number, pool)]) for number, view in enumerate(before)]
    for view in before:
        chunk(room, view.names[0][0]).unlink()  # whoever reads the old rows again fails
    done: list[int] = []
    (found,) = score(grown, [task], weights=RATES, aggregate="less", cache=room.cache, on_rows=done.append)
    wanted = brute_force(pool, gradients(7, seed=2), SUBTASKS, RATES, "less")
    np.testing.assert_allclose(found.score, wanted, atol=2e-4)
    assert done == sorted(done)
    assert done[-1] == 2200


def _added(room: Room, number: int, pool: Sequence[np.ndarray]) -> list[str]:
    (view,) = room.fill(f"added{number}", [pool[number][2000:]])
    return [view.names[0][0]]


def test_a_new_task_leaves_the_known_ones_alone(room: Room) -> None:
    views = room.fill("pool", gradients(300, seed=1))
    old = Target(room.fill("a", gradients(7, seed=2)), SUBTASKS)
    new = Target(room.fill("b", gradients(2, seed=3)), ["x", "y"])
    score(views, [old], weights=RATES, aggregate="less", cache=room.cache)
    kept = {path: path.stat().st_mtime_ns for path in room.cache.root.glob("score_*/*.npy")}
    score(views, [old, new], weights=RATES, aggregate="less", cache=room.cache)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(room.cache.root.glob("score_*"))) == 2


@pytest.mark.parametrize("name", ["score.npy", "subtask.npy", "valid.npy", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "lost"])
def test_damaged_scores_are_computed_again(room: Room, name: str, how: str) -> None:
    views = room.fill("pool", gradients(300, seed=1))
    task = Target(room.fill("task", gradients(7, seed=2)), SUBTASKS)
    (first,) = score(views, [task], weights=RATES, aggregate="less", cache=room.cache)
    (path,) = room.cache.root.glob(f"score_*/{name}")
    raw = path.read_bytes()
    if how == "lost":
        path.unlink()
    else:
        path.write_bytes(raw[: len(raw) // 2] if how == "cut" else raw[:-20] + b"\x00" + raw[-19:])
    assert cached(views, [task], weights=RATES, aggregate="less", cache=room.cache) is None
    (again,) = score(views, [task], weights=RATES, aggregate="less", cache=room.cache)
    assert_same(again, first)
    assert cached(views, [task], weights=RATES, aggregate="less", cache=room.cache) is not None


def test_kept_scores_are_plain_arrays_and_json(room: Room) -> None:
    views = room.fill("pool", gradients(300, seed=1))
    task = Target(room.fill("task", gradients(7, seed=2)), SUBTASKS)
    (found,) = score(views, [task], weights=RATES, aggregate="less", cache=room.cache)
    (folder,) = room.cache.root.glob("score_*")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "score.npy", "subtask.npy", "valid.npy"]
    np.testing.assert_array_equal(np.load(folder / "score.npy", allow_pickle=False), found.score)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == 300
    assert manifest["made_from"]["aggregate"] == "less"


def test_scores_of_a_deleted_segment_are_deleted(room: Room) -> None:
    task = Target(room.fill("task", gradients(7, seed=2)), SUBTASKS)
    for label in ("a", "b"):
        score(room.fill(label, gradients(30, seed=1)), [task], weights=RATES, aggregate="less", cache=room.cache)
    assert room.cache.delete("seg_a_1_0_30_float16") == 1
    assert room.cache.delete("seg_a_1_0_30_float16") == 0
    assert room.cache.delete("seg_task_0_0_7_float16") == 1
    assert list(room.cache.root.glob("score_*")) == []


# Faults and memory --------------------------------------------------------------------------------------------------


def test_a_flipped_bit_gives_no_score(room: Room) -> None:
    views = room.fill("pool", gradients(1500, seed=1))
    task = Target(room.fill("task", gradients(7, seed=2)), SUBTASKS)
    path = chunk(room, views[1].names[0][0])
    raw = bytearray(path.read_bytes())
    raw[1234] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Damaged, match="checksum"):
        score(views, [task], weights=RATES, aggregate="less", cache=room.cache)
    assert list(room.cache.root.glob("score_*")) == []


def test_a_job_can_stop_between_two_blocks(room: Room) -> None:
    views = room.fill("pool", gradients(5000, seed=1))
    task = Target(room.fill("task", gradients(7, seed=2)), SUBTASKS)

    def stop(done: int) -> None:
        if done >= 2000:
            raise InterruptedError(f"after {done} rows")

    with pytest.raises(InterruptedError, match="after 2048 rows"):
        score(views, [task], weights=RATES, aggregate="less", cache=room.cache, on_rows=stop)


@pytest.mark.parametrize("how", ["less", "max"])
def test_memory_stays_within_what_is_stated(room: Room, how: Aggregate) -> None:
    rows, dim, checkpoints, references, subtasks = 6000, 1024, 2, 40, 8
    pool = gradients(rows, seed=1, checkpoints=checkpoints, dim=dim)
    target = gradients(references, seed=2, checkpoints=checkpoints, dim=dim)
    views, names = room.fill("pool", pool), [f"s{row % subtasks}" for row in range(references)]
    task_views = room.fill("task", target)
    del pool, target
    queries = subtasks if how == "less" else references
    stated = (
        12 * checkpoints * queries * dim
        + 4 * references * dim
        + BLOCK_BYTES * checkpoints
        + 12 * CHUNK_ROWS * queries
        + (16 * checkpoints + 14) * rows
    )
    tracemalloc.start()
    score(views, [Target(task_views, names)], weights=[1.0, 1.0], aggregate=how, cache=room.cache)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < stated + (1 << 20)
    assert peak < checkpoints * rows * dim * 2  # it holds less than the features take
