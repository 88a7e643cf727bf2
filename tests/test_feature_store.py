"""The feature store: what is written is what is read, whoever dies meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from gradstore.types import FeatureDtype, FeatureKind
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from datastore.dtypes import power_of_two_scales
from datastore.errors import Conflict, Damaged, NotFound
from datastore.gradients import Block, FeatureStore, sound
from datastore.segments import REASONS, Segment, array_formats, stored_bytes
from datastore.shards import CHUNK_ROWS

DIM = 24
SEGMENT = "seg_0123456789abcdef01234567"


def block_of(rows: int, *, seed: int = 0, dim: int = DIM, size: float = 1.0) -> Block:
    rng = np.random.default_rng(seed)
    return Block(
        features=(rng.standard_normal((rows, dim)) * size).astype(np.float32),
        norms=rng.uniform(1, 2, rows).astype(np.float32),
        raw_norms=rng.uniform(2, 3, rows).astype(np.float32),
        losses=rng.uniform(0, 5, rows).astype(np.float32),
        tokens=rng.integers(1, 99, rows).astype(np.int32),
        reasons=[None] * rows,
    )


def part(block: Block, start: int, stop: int) -> Block:
    values = {field.name: getattr(block, field.name) for field in fields(Block)}
    return Block(**{name: None if value is None else value[start:stop] for name, value in values.items()})


def fill(
    store: FeatureStore,
    segment: str,
    block: Block,
    *,
    dtype: FeatureDtype = "float16",
    kind: FeatureKind = "sgd",
    chunks: int = 1,
) -> None:
    rows, dim = block.features.shape
    store.create(segment, rows=rows, dim=dim, dtype=dtype, attributes={"kind": kind})
    for start in range(0, rows, chunks * CHUNK_ROWS):
        piece = part(block, start, start + chunks * CHUNK_ROWS)
        digest = store.write(segment, start=start, attempt=1, block=piece)
        store.publish(segment, start=start, attempt=1, digest=digest)


def group_of(store: FeatureStore, segment: str = SEGMENT) -> Path:
    return store.root / segment / "data.zarr"


def read_all(segment: Segment) -> None:
    """Read every chunk of every array with its checksum; raises `Damaged` at the first that is not whole."""
    for _ in segment.blocks(check=True):
        pass
    for name in segment.formats.keys() - {"features"}:
        segment.column(name)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "features")


# What is stored -----------------------------------------------------------------------------------------------------


DTYPES: list[FeatureDtype] = ["float16", "float32", "bfloat16", "int8", "int4", "binary"]


@pytest.mark.parametrize("dim", [DIM, 13])
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_come_back_with_their_columns(store: FeatureStore, dtype: FeatureDtype, dim: int) -> None:
    block = block_of(1500, dim=dim)
    fill(store, SEGMENT, block, dtype=dtype)
    segment = store.open(SEGMENT)
    assert (segment.rows, segment.dim, segment.dtype, segment.recipe) == (1500, dim, dtype, {"kind": "sgd"})
    for start, stop in ((0, 1500), (0, 0), (1024, 1024), (1500, 1500), (1023, 1025), (1400, 1500)):
        found, wanted = segment.features(start, stop), block.features[start:stop]
        assert found.dtype == np.float32
        largest = np.abs(wanted).max(axis=1, initial=0, keepdims=True)
        if dtype == "binary":
            np.testing.assert_array_equal(np.sign(found), np.sign(wanted))
            np.testing.assert_allclose(
                np.abs(found), np.broadcast_to(np.abs(wanted).mean(1)[:, None], found.shape), rtol=1e-6
            )
        else:
            assert (np.abs(found - wanted) <= np.abs(wanted) * RELATIVE[dtype] + largest * ABSOLUTE[dtype]).all()
    np.testing.assert_array_equal(segment.norms, block.norms)
    np.testing.assert_array_equal(segment.raw_norms, block.raw_norms)
    np.testing.assert_array_equal(segment.losses, block.losses)
    np.testing.assert_array_equal(segment.tokens, block.tokens)
    assert segment.valid.all()
    assert segment.reasons == {}
    read_all(segment)


RELATIVE = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0, "int4": 0}
ABSOLUTE = {"float32": 0, "float16": 2**-24, "bfloat16": 0, "int8": 0.5001 / 127, "int4": 0.5001 / 7}
"""Half a step of each dtype: of the number itself, and of the row's largest."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_length_is_the_norm_of_what_is_decoded(store: FeatureStore, dtype: FeatureDtype) -> None:
    block = block_of(300, size=1e-4, dim=13)
    fill(store, SEGMENT, replace(block, reasons=["the moon was full", *[None] * 299]), dtype=dtype)
    segment = store.open(SEGMENT)
    decoded = segment.decoded(0, 300).astype(np.float64)
    np.testing.assert_allclose(segment.lengths[1:], np.linalg.norm(decoded, axis=1)[1:], rtol=1e-7)
    assert segment.lengths[0] == 0
    assert not segment.stored(0, 1).any()
    assert not segment.features(0, 1).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_blocks_cover_all_rows_in_order(store: FeatureStore, dtype: FeatureDtype) -> None:
    fill(store, SEGMENT, block_of(1500), dtype=dtype)
    segment = store.open(SEGMENT)
    blocks = list(segment.decoded_blocks(check=True))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), segment.decoded(0, 1500))
    assert [start for start, _ in blocks] == [0, 1024]


@pytest.mark.parametrize("dtype", DTYPES)
def test_anybodys_zarr_reads_the_same_numbers(store: FeatureStore, dtype: FeatureDtype) -> None:
    fill(store, SEGMENT, block_of(2100), dtype=dtype, chunks=2)
    segment = store.open(SEGMENT)
    group = zarr.open_group(group_of(store), mode="r")
    assert {name for name, _ in group.members()} == {*array_formats(2100, dim=DIM, dtype=dtype)}
    for name, array in group.arrays():
        ours = segment.stored(0, 2100) if name == "features" else segment.column(name)
        np.testing.assert_array_equal(np.asarray(array[:]), ours)
    header = group.attrs["gradstore"]
    assert isinstance(header, dict)
    assert header["reasons"] == {str(code): text for code, text in REASONS.items()}
    assert group.attrs["recipe"] == {"kind": "sgd"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_code_of_the_format_page_reads_what_was_stored(store: FeatureStore, dtype: FeatureDtype) -> None:
    fill(store, SEGMENT, block_of(50, dim=13), dtype=dtype)
    segment = store.open(SEGMENT)
    page = (Path(__file__).parents[1] / "docs" / "on-disk-format.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, np.ndarray] = {}
    exec(compile(code, "on-disk-format.md", "exec"), {"path": group_of(store)}, names)  # noqa: S102 - our own page
    np.testing.assert_array_equal(names["features"], segment.features(0, 50))
    np.testing.assert_allclose(np.linalg.norm(names["directions"].astype(np.float64), axis=1), 1, rtol=1e-6)


def test_chunk_files_are_the_ones_zarr_would_write(store: FeatureStore, tmp_path: Path) -> None:
    fill(store, SEGMENT, block_of(1100))
    source = zarr.open_group(group_of(store), mode="r")
    copy = tmp_path / "copy.zarr"
    store.create("seg_empty", rows=1100, dim=DIM, dtype="float16", attributes={"kind": "sgd"})
    group_of(store, "seg_empty").rename(copy)
    target = zarr.open_group(copy, mode="r+")
    for name, array in source.arrays():
        written = target[name]
        assert isinstance(written, zarr.Array)
        written[:] = array[:]
    assert files_of(copy) == files_of(group_of(store))


def test_a_group_that_another_tool_has_compressed_reads_the_same(store: FeatureStore, tmp_path: Path) -> None:
    fill(store, SEGMENT, block_of(1500))
    before = store.open(SEGMENT)
    features, reason = before.features(0, 1500), before.column("reason")
    original = zarr.open_group(group_of(store), mode="r")
    array = original["features"]
    assert isinstance(array, zarr.Array)
    values = np.asarray(array[:])
    group = zarr.open_group(group_of(store), mode="r+")
    group.create_array("features", data=values, chunks=(100, 10), overwrite=True)
    after = store.open(SEGMENT)
    np.testing.assert_array_equal(after.features(0, 1500), features)
    np.testing.assert_array_equal(after.features(1020, 1030), features[1020:1030])
    np.testing.assert_array_equal(after.column("reason"), reason)


def test_log_odds_are_a_column_of_their_kind_and_of_no_other(store: FeatureStore) -> None:
    logodds = np.linspace(-9, 9, 1500).astype(np.float32)
    block = replace(block_of(1500), logodds=logodds)
    block.features[7] = 0
    with pytest.raises(ValueError, match="have logodds, or have none"):
        fill(store, "seg_a", block)
    with pytest.raises(ValueError, match="have logodds, or have none"):
        fill(store, "seg_b", replace(block, logodds=None), kind="logodds")
    fill(store, "seg_c", block_of(1500))
    fill(store, "seg_d", part(block, 0, 1200), kind="logodds")
    fill(store, "seg_e", part(block, 1200, 1500), kind="logodds")
    assert "logodds" not in store.open("seg_c").columns
    view = store.view(["seg_d", "seg_e"])
    wanted = np.where(np.arange(1500) == 7, 0, logodds)
    np.testing.assert_array_equal(view.logodds, wanted)
    np.testing.assert_array_equal(view.part("logodds", 1100, 1300), wanted[1100:1300])
    np.testing.assert_array_equal(zarr.open_group(group_of(store, "seg_d"), mode="r")["logodds"][:], wanted[:1200])
    more = stored_bytes(1200, dim=DIM, dtype="float16", kind="logodds") - stored_bytes(1200, dim=DIM, dtype="float16")
    assert more == 4 * 2048 + 2 * 4


def test_lost_and_changed_log_odds_are_found_as_damage(store: FeatureStore) -> None:
    fill(store, SEGMENT, replace(block_of(1500), logodds=np.ones(1500, np.float32)), kind="logodds", chunks=2)
    ranges = [(0, 1500)]
    assert not list(store.faults(SEGMENT, ranges, deep=False))
    chunk = group_of(store) / "logodds" / "c.1"
    kept = chunk.read_bytes()
    chunk.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
    assert [found[:2] for found in store.faults(SEGMENT, ranges, deep=False)] == ranges
    chunk.unlink()
    assert [found[:2] for found in store.faults(SEGMENT, ranges, deep=False)] == ranges


def test_the_stated_bytes_are_the_bytes_on_the_disk(store: FeatureStore) -> None:
    fill(store, SEGMENT, block_of(1500))
    metadata = sum(len(data) for name, data in files_of(group_of(store)).items() if name.endswith("zarr.json"))
    assert store.bytes(SEGMENT) == stored_bytes(1500, dim=DIM, dtype="float16") + metadata


@pytest.mark.parametrize("rows", [1, 9, 1023, 1024])
def test_a_segment_of_few_rows_takes_no_more_than_these(store: FeatureStore, rows: int) -> None:
    fill(store, SEGMENT, block_of(rows))
    columns = 5 * 4 + 4 + 1  # bytes of a row beside its feature
    assert stored_bytes(rows, dim=DIM, dtype="float16") == rows * (2 * DIM + columns) + 8 * 4  # a checksum an array
    read_all(store.open(SEGMENT))


def test_chunks_of_long_rows_are_smaller_and_end_where_those_of_short_ones_do(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.shards.CHUNK_BYTES", 150 * 2 * DIM)
    block = block_of(2500)
    fill(store, SEGMENT, block)
    segment = store.open(SEGMENT)
    assert {name: each.chunk_rows for name, each in segment.formats.items() if name in ("features", "norms")} == {
        "features": 128, "norms": 1024,
    }  # fmt: skip
    assert segment.edges == [*range(0, 2500, 128), 2500]
    assert len(list((group_of(store) / "features").glob("c.*"))) == 20
    read_all(segment)
    np.testing.assert_array_equal(segment.norms, block.norms)
    monkeypatch.undo()
    fill(store, "seg_usual", block)
    np.testing.assert_array_equal(segment.stored(0, 2500), store.open("seg_usual").stored(0, 2500))
    again = store.open(SEGMENT)  # what is written stays readable, whatever a later version would choose
    np.testing.assert_array_equal(again.stored(1000, 1100), segment.stored(1000, 1100))
    some = np.array([0, 127, 128, 1023, 1024, 2499])
    np.testing.assert_array_equal(again.stored_rows(some), segment.stored(0, 2500)[some])


def test_a_segment_of_few_rows_in_a_whole_chunk_is_still_read(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.segments.chunk_rows", lambda rows, row_bytes: CHUNK_ROWS)  # noqa: ARG005
    block = block_of(9)
    fill(store, SEGMENT, block)
    monkeypatch.undo()
    segment = store.open(SEGMENT)
    assert (group_of(store) / "features" / "c.0.0").stat().st_size == 1024 * DIM * 2 + 4
    assert segment.edges == [0, 9]
    np.testing.assert_array_equal(segment.tokens, block.tokens)
    read_all(segment)


def test_blocks_cover_all_rows_in_order_without_a_copy(store: FeatureStore) -> None:
    fill(store, SEGMENT, block_of(2500))
    segment = store.open(SEGMENT)
    blocks = list(segment.blocks(rows=300))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), segment.stored(0, 2500))
    assert [start for start, _ in blocks[:5]] == [0, 300, 600, 900, 1024]
    assert not any(rows.flags.owndata or rows.flags.writeable for _, rows in blocks)


# The scale ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-12, 1e-6, 1.0, 1e5, 1e12, 1e30, 5e37])
def test_gradients_of_any_size_keep_their_direction_in_float16(store: FeatureStore, size: float) -> None:
    block = block_of(200, size=size)
    fill(store, SEGMENT, block)
    segment = store.open(SEGMENT)
    assert segment.valid.all()
    assert np.isfinite(segment.stored(0, 200)).all()
    exact = block.features.astype(np.float64)
    stored = segment.stored(0, 200).astype(np.float64) / segment.lengths[:, None]
    error = np.linalg.norm(stored - exact / np.linalg.norm(exact, axis=1, keepdims=True), axis=1)
    assert error.max() < 2**-11


@given(
    rows=arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.just(7)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_the_scale_is_a_power_of_two_that_brings_a_row_near_one(rows: np.ndarray) -> None:
    scales = power_of_two_scales(rows)
    fraction, _ = np.frexp(scales)
    assert (fraction == 0.5).all()
    largest = np.abs(rows / scales[:, None]).max(axis=1)
    normal = np.abs(rows).max(axis=1) >= np.float32(2.0**-126)
    assert ((largest[normal] >= 1) & (largest[normal] < 2)).all()
    assert (largest < 2).all()


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-100, 100), seed=st.integers(0, 99))
def test_multiplying_a_gradient_by_a_power_of_two_changes_nothing_but_its_scale(exponent: int, seed: int) -> None:
    rows = block_of(20, seed=seed).features
    scaled = np.ldexp(rows, exponent)
    once, twice = power_of_two_scales(rows), power_of_two_scales(scaled)
    np.testing.assert_array_equal(np.ldexp(once, exponent), twice)
    np.testing.assert_array_equal(
        (rows / once[:, None]).astype(np.float16), (scaled / twice[:, None]).astype(np.float16)
    )


# Rows without a feature ---------------------------------------------------------------------------------------------


def test_a_row_with_a_reason_is_zeros_and_not_valid(store: FeatureStore) -> None:
    block = block_of(100)
    block.features[3] = np.nan
    block.losses[3] = np.nan
    reasons: list[str | None] = [None] * 100
    reasons[3], reasons[7] = REASONS[2], "the moon was full"
    fill(store, SEGMENT, replace(block, reasons=reasons))
    segment = store.open(SEGMENT)
    assert np.flatnonzero(~segment.valid).tolist() == [3, 7]
    assert segment.reasons == {3: REASONS[2], 7: "the moon was full"}
    for row in (3, 7):
        assert not segment.stored(row, row + 1).any()
        for name in ("scales", "lengths", "norms", "raw_norms", "losses"):
            assert segment.column(name)[row] == 0
    assert np.isfinite(segment.features(0, 100)).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: block.features.__setitem__((5, 2), np.inf), REASONS[5]),
        (lambda block: block.features.__setitem__((5, 2), np.nan), REASONS[5]),
        (lambda block: block.features.__setitem__(5, 0), REASONS[6]),
        (lambda block: block.norms.__setitem__(5, np.inf), REASONS[3]),
        (lambda block: block.raw_norms.__setitem__(5, np.nan), REASONS[3]),
        (lambda block: block.losses.__setitem__(5, np.nan), REASONS[2]),
    ],
)
def test_a_number_that_is_none_gets_a_reason_although_the_worker_gave_none(
    store: FeatureStore, change: object, reason: str
) -> None:
    block = block_of(10)
    assert callable(change)
    change(block)
    assert sound(block).excluded == {5: reason}
    fill(store, SEGMENT, block)
    assert store.open(SEGMENT).reasons == {5: reason}


def test_words_of_a_reason_are_found_in_any_shard_of_a_grown_set(store: FeatureStore) -> None:
    for name in ("seg_a", "seg_b"):
        block = block_of(2100)
        reasons: list[str | None] = [None] * 2100
        reasons[2050], reasons[1] = f"a tale of {name}", REASONS[4]
        fill(store, name, replace(block, reasons=reasons))
    found = store.view(["seg_a", "seg_b"]).reasons
    assert found == {1: REASONS[4], 2050: "a tale of seg_a", 2101: REASONS[4], 4150: "a tale of seg_b"}


def test_the_reasons_of_the_gradient_engine_have_codes() -> None:
    engine = pytest.importorskip("worker.features")
    own = {engine.LOSS_NOT_FINITE, engine.GRADIENT_NOT_FINITE, engine.GRADIENT_ZERO, engine.NOTHING_SUPERVISED}
    own.add(engine.FEATURE_NOT_FINITE)
    assert own <= {*REASONS.values()}


def test_a_workers_own_reason_stands(store: FeatureStore) -> None:
    block = block_of(3)
    block.features[1] = 0
    named = replace(block, reasons=[None, REASONS[1], None])
    assert sound(named).excluded == {1: REASONS[1]}


# Attempts -----------------------------------------------------------------------------------------------------------


def test_nothing_is_readable_before_it_is_published(store: FeatureStore) -> None:
    block = block_of(2000)
    store.create(SEGMENT, rows=2000, dim=DIM, dtype="float16", attributes={})
    digest = store.write(SEGMENT, start=0, attempt=1, block=part(block, 0, 1024))
    segment = store.open(SEGMENT)
    with pytest.raises(Damaged, match=r"features/c\.0\.0 is missing"):
        segment.stored(0, 1)
    store.publish(SEGMENT, start=0, attempt=1, digest=digest)
    assert segment.stored(0, 1024).any()
    with pytest.raises(Damaged, match=r"c\.1\.0 is missing"):
        segment.stored(1000, 1100)
    with pytest.raises(Damaged, match="is missing"):
        _ = segment.valid
    with pytest.raises(Damaged, match="is missing"):
        read_all(segment)


def test_creating_twice_is_harmless_and_another_shape_is_refused(store: FeatureStore) -> None:
    fill(store, SEGMENT, block_of(10))
    before = files_of(store.root)
    store.create(SEGMENT, rows=10, dim=DIM, dtype="float16", attributes={"kind": "sgd"})
    for changed in ({"rows": 11}, {"dim": 3}, {"dtype": "float32"}, {"attributes": {"kind": "adam"}}):
        wanted: dict[str, object] = {
            "rows": 10,
            "dim": DIM,
            "dtype": "float16",
            "attributes": {"kind": "sgd"},
            **changed,
        }
        with pytest.raises(Conflict, match="another shape or recipe"):
            store.create(SEGMENT, **wanted)  # type: ignore[arg-type]  # built from a table
    assert files_of(store.root) == before


def test_publishing_twice_is_harmless(store: FeatureStore) -> None:
    store.create(SEGMENT, rows=10, dim=DIM, dtype="float16", attributes={})
    digest = store.write(SEGMENT, start=0, attempt=1, block=block_of(10))
    store.publish(SEGMENT, start=0, attempt=1, digest=digest)
    before = files_of(store.root)
    store.publish(SEGMENT, start=0, attempt=1, digest=digest)
    assert files_of(store.root) == before
    assert store.attempts() == []


def test_a_late_losers_write_and_publication_change_nothing(store: FeatureStore) -> None:
    store.create(SEGMENT, rows=10, dim=DIM, dtype="float16", attributes={})
    late = store.write(SEGMENT, start=0, attempt=1, block=block_of(10, seed=1))
    winner = store.write(SEGMENT, start=0, attempt=2, block=block_of(10, seed=2))
    store.publish(SEGMENT, start=0, attempt=2, digest=winner)
    before = files_of(group_of(store))
    with pytest.raises(Conflict, match="belong to another attempt"):
        store.publish(SEGMENT, start=0, attempt=1, digest=late)
    later = store.write(SEGMENT, start=0, attempt=3, block=block_of(10, seed=3))
    with pytest.raises(Conflict, match="belong to another attempt"):
        store.publish(SEGMENT, start=0, attempt=3, digest=later)
    assert files_of(group_of(store)) == before
    for attempt in (1, 3):
        store.discard(SEGMENT, start=0, attempt=attempt)
    assert store.attempts() == []
    assert files_of(group_of(store)) == before


def test_a_digest_that_is_not_the_attempts_own_publishes_nothing(store: FeatureStore) -> None:
    store.create(SEGMENT, rows=10, dim=DIM, dtype="float16", attributes={})
    store.write(SEGMENT, start=0, attempt=1, block=block_of(10, seed=1))
    other = store.write(SEGMENT, start=0, attempt=2, block=block_of(10, seed=2))
    before = files_of(store.root)
    with pytest.raises(Conflict, match="other bytes"):
        store.publish(SEGMENT, start=0, attempt=1, digest=other)
    with pytest.raises(Conflict, match="has written nothing"):
        store.publish(SEGMENT, start=0, attempt=9, digest=other)
    assert files_of(store.root) == before


def test_an_attempt_writes_once(store: FeatureStore) -> None:
    store.create(SEGMENT, rows=10, dim=DIM, dtype="float16", attributes={})
    digest = store.write(SEGMENT, start=0, attempt=1, block=block_of(10))
    before = files_of(store.root)
    assert store.write(SEGMENT, start=0, attempt=1, block=block_of(10)) == digest
    with pytest.raises(Conflict, match="already written other bytes"):
        store.write(SEGMENT, start=0, attempt=1, block=block_of(10, seed=1))
    assert files_of(store.root) == before


def test_a_shard_of_another_size_cannot_take_published_rows(store: FeatureStore) -> None:
    block = block_of(2048)
    store.create(SEGMENT, rows=2048, dim=DIM, dtype="float16", attributes={})
    second = store.write(SEGMENT, start=1024, attempt=1, block=part(block, 1024, 2048))
    store.publish(SEGMENT, start=1024, attempt=1, digest=second)
    whole = store.write(SEGMENT, start=0, attempt=2, block=block)
    with pytest.raises(Conflict, match="shard of another size"):
        store.publish(SEGMENT, start=0, attempt=2, digest=whole)


@pytest.mark.parametrize(("start", "rows"), [(0, 1023), (1, 1024), (1024, 400), (1024, 1024), (2048, 1), (0, 0)])
def test_rows_that_are_no_whole_chunks_are_refused(store: FeatureStore, start: int, rows: int) -> None:
    store.create(SEGMENT, rows=1500, dim=DIM, dtype="float16", attributes={})
    with pytest.raises(ValueError, match="whole number of chunks"):
        store.write(SEGMENT, start=start, attempt=1, block=block_of(rows))


def test_features_of_another_dim_are_refused(store: FeatureStore) -> None:
    store.create(SEGMENT, rows=5, dim=DIM + 1, dtype="float16", attributes={})
    with pytest.raises(ValueError, match="shape"):
        store.write(SEGMENT, start=0, attempt=1, block=block_of(5))


def test_many_publishers_of_one_attempt_agree(store: FeatureStore) -> None:
    block = block_of(3000)
    store.create(SEGMENT, rows=3000, dim=DIM, dtype="float16", attributes={})
    digest = store.write(SEGMENT, start=0, attempt=1, block=block)
    errors: list[Exception] = []

    def publish() -> None:
        try:
            store.publish(SEGMENT, start=0, attempt=1, digest=digest)
        except Exception as error:  # noqa: BLE001 - any of them fails the test below
            errors.append(error)

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    read_all(store.open(SEGMENT))


def test_of_many_attempts_published_at_once_one_wins_whole(store: FeatureStore) -> None:
    store.create(SEGMENT, rows=3000, dim=DIM, dtype="float16", attributes={})
    digests = {
        attempt: store.write(SEGMENT, start=0, attempt=attempt, block=block_of(3000, seed=attempt))
        for attempt in range(1, 6)
    }
    won: list[int] = []

    def publish(attempt: int) -> None:
        try:
            store.publish(SEGMENT, start=0, attempt=attempt, digest=digests[attempt])
            won.append(attempt)
        except Conflict:
            pass

    threads = [threading.Thread(target=publish, args=(attempt,)) for attempt in digests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    segment = store.open(SEGMENT)
    read_all(segment)
    np.testing.assert_array_equal(segment.norms, block_of(3000, seed=won[0]).norms)


def test_the_order_and_size_of_shards_do_not_change_a_byte(store: FeatureStore) -> None:
    block = block_of(5000)
    fill(store, "seg_a", block, chunks=1)
    fill(store, "seg_b", block, chunks=3)
    store.create("seg_c", rows=5000, dim=DIM, dtype="float16", attributes={"kind": "sgd"})
    for start in (4096, 0, 2048, 3072, 1024):
        piece = part(block, start, start + CHUNK_ROWS)
        digest = store.write("seg_c", start=start, attempt=1, block=piece)
        store.publish("seg_c", start=start, attempt=1, digest=digest)
    assert (
        files_of(group_of(store, "seg_a")) == files_of(group_of(store, "seg_b")) == files_of(group_of(store, "seg_c"))
    )


def test_a_deleted_segment_is_gone_and_can_be_made_again(store: FeatureStore) -> None:
    fill(store, SEGMENT, block_of(10))
    store.write(SEGMENT, start=0, attempt=7, block=block_of(10, seed=1))
    store.delete(SEGMENT)
    store.delete(SEGMENT)
    assert store.bytes(SEGMENT) == 0
    with pytest.raises(NotFound):
        store.open(SEGMENT)
    with pytest.raises(NotFound):
        store.write(SEGMENT, start=0, attempt=8, block=block_of(10))
    store.discard(SEGMENT, start=0, attempt=7)
    fill(store, SEGMENT, block_of(10, seed=2))
    np.testing.assert_array_equal(store.open(SEGMENT).norms, block_of(10, seed=2).norms)


def test_what_is_left_over_is_listed_and_what_is_unfinished_is_swept(store: FeatureStore) -> None:
    fill(store, SEGMENT, block_of(2000))
    assert store.attempts() == []
    store.write(SEGMENT, start=1024, attempt=5, block=part(block_of(2000), 1024, 2000))
    (left,) = store.attempts()
    assert (left.segment, left.start, left.attempt) == (SEGMENT, 1024, 5)
    assert 0 <= left.age_seconds < 60
    torn = store.root / "unfinished" / f"{SEGMENT}.0-9.killed"
    torn.mkdir()
    (torn / "features.c.0.0").write_bytes(b"half a chunk")
    assert store.sweep(older_than=60) == 0
    time.sleep(0.05)
    assert store.sweep(older_than=0.01) == 1
    assert list((store.root / "unfinished").iterdir()) == []
    assert len(store.attempts()) == 1


# Damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["features", "lengths", "reason", "norms"])
@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_flipped_bit_is_found_and_named(store: FeatureStore, array: str, place: int) -> None:
    fill(store, SEGMENT, block_of(1500))
    key = array_formats(2000, dim=DIM, dtype="float16")[array].key(1)
    path = group_of(store) / array / key
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)
    segment = store.open(SEGMENT)
    with pytest.raises(Damaged, match=rf"{array}/{key} does not match its checksum"):
        read_all(segment)
    with pytest.raises(Damaged):
        segment.features(1024, 1100) if array == "features" else segment.column(array)
    found = zarr.open_group(group_of(store), mode="r")[array]
    assert isinstance(found, zarr.Array)
    with pytest.raises(ValueError, match="checksum"):
        found[1024:]


@pytest.mark.parametrize("size", [0, 100, -1, 1])
def test_a_chunk_of_another_length_is_never_mapped(store: FeatureStore, size: int) -> None:
    fill(store, SEGMENT, block_of(1500))
    path = group_of(store) / "features" / "c.1.0"
    raw = path.read_bytes()
    path.write_bytes(raw + b"x" if size == 1 else raw[:size])
    segment = store.open(SEGMENT)
    with pytest.raises(Damaged, match=r"c\.1\.0 has [\d,]+ bytes instead of"):
        segment.stored(1100, 1200)
    assert segment.stored(0, 1024, check=True).any()
    assert segment.valid.all()


def test_a_lost_chunk_never_reads_as_zeros(store: FeatureStore) -> None:
    fill(store, SEGMENT, block_of(1500))
    (group_of(store) / "features" / "c.0.0").unlink()
    segment = store.open(SEGMENT)
    with pytest.raises(Damaged, match="is missing"):
        segment.stored(0, 10)
    found = zarr.open_group(group_of(store), mode="r")["features"]
    assert isinstance(found, zarr.Array)
    assert np.isnan(np.asarray(found[:1024])).all()


def test_lost_rows_of_a_rewritten_group_never_read_as_numbers(store: FeatureStore) -> None:
    fill(store, SEGMENT, block_of(300))
    group = zarr.open_group(group_of(store), mode="r+")
    group.create_array(
        "features", shape=(300, DIM), chunks=(100, DIM), dtype="float16", fill_value=np.nan, overwrite=True
    )
    with pytest.raises(Damaged, match="never written"):
        store.open(SEGMENT).features(0, 10)


def test_rows_whose_reason_was_lost_are_not_taken_for_excluded_ones(store: FeatureStore) -> None:
    fill(store, SEGMENT, block_of(300))
    group = zarr.open_group(group_of(store), mode="r+")
    group.create_array("reason", shape=(300,), chunks=(100,), dtype="uint8", fill_value=255, overwrite=True)
    with pytest.raises(Damaged, match="never written"):
        _ = store.open(SEGMENT).valid


def test_damaged_metadata_is_named(store: FeatureStore) -> None:
    fill(store, SEGMENT, block_of(10))
    (group_of(store) / "norms" / "zarr.json").write_text("{")
    with pytest.raises(Damaged, match=r"norms/zarr\.json cannot be read"):
        store.open(SEGMENT)


def test_a_format_from_the_future_is_refused(store: FeatureStore) -> None:
    fill(store, SEGMENT, block_of(10))
    path = group_of(store) / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"]["gradstore"]["format"] = 99
    path.write_text(json.dumps(metadata))
    with pytest.raises(Damaged, match="newer gradstore"):
        store.open(SEGMENT)


def test_bytes_that_are_lost_during_publication_are_reported(store: FeatureStore) -> None:
    store.create(SEGMENT, rows=10, dim=DIM, dtype="float16", attributes={})
    digest = store.write(SEGMENT, start=0, attempt=1, block=block_of(10))
    (store.root / SEGMENT / "attempts" / "0-1" / "losses.c.0").unlink()
    with pytest.raises(Damaged, match="is lost"):
        store.publish(SEGMENT, start=0, attempt=1, digest=digest)


# Grown datasets -----------------------------------------------------------------------------------------------------


def test_segments_of_a_grown_set_read_as_one(store: FeatureStore) -> None:
    block = block_of(4000)
    block.features[1499] = 0
    for name, start, stop in (("seg_a", 0, 1500), ("seg_b", 1500, 1510), ("seg_c", 1510, 4000)):
        fill(store, name, part(block, start, stop))
    fill(store, "seg_whole", block)
    view, whole = store.view(["seg_a", "seg_b", "seg_c"]), store.open("seg_whole")
    assert (view.rows, view.dim, view.dtype) == (4000, DIM, "float16")
    for start, stop in ((0, 4000), (1499, 1500), (1499, 1511), (1500, 1510), (2000, 3500), (4000, 4000), (1500, 1500)):
        np.testing.assert_array_equal(view.features(start, stop), whole.features(start, stop))
    for name in array_formats(2000, dim=DIM, dtype="float16"):
        if name != "features":
            np.testing.assert_array_equal(view.column(name), whole.column(name))
    assert view.reasons == whole.reasons == {1499: REASONS[6]}
    blocks = list(view.blocks(rows=700))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), whole.stored(0, 4000))
    assert not any(rows.flags.owndata for _, rows in blocks)


def test_segments_of_different_dims_are_no_set(store: FeatureStore) -> None:
    fill(store, "seg_a", block_of(5))
    fill(store, "seg_b", block_of(5, dim=3))
    with pytest.raises(ValueError, match="one dim and dtype"):
        store.view(["seg_a", "seg_b"])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 11), (4, 3)])
def test_rows_outside_are_refused(store: FeatureStore, start: int, stop: int) -> None:
    fill(store, "seg_a", block_of(10))
    for rows in (store.open("seg_a"), store.view(["seg_a"])):
        with pytest.raises(IndexError):
            rows.stored(start, stop)


# Killed at any point ------------------------------------------------------------------------------------------------

KILLED_BEFORE_EACH_STEP = textwrap.dedent(
    """
    # Runs one operation in forked children, killing the n-th child (SIGKILL) right before its n-th change of the disk.
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    import zarr
    from datastore.gradients import Block, FeatureStore

    operation, root, base = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    STEPS = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
    rng = np.random.default_rng(0)
    n = 1500
    block = Block(
        features=rng.standard_normal((n, 24)).astype(np.float32), norms=np.ones(n, np.float32),
        raw_norms=np.ones(n, np.float32), losses=np.ones(n, np.float32), tokens=np.ones(n, np.int32),
        reasons=[None] * n,
    )

    def perform(store, digest):
        if operation == "create":
            store.create("seg_x", rows=n, dim=24, dtype="float16", attributes={"kind": "sgd"})
        elif operation == "write":
            store.write("seg_x", start=0, attempt=1, block=block)
        elif operation == "publish":
            store.publish("seg_x", start=0, attempt=1, digest=digest)
        elif operation == "delete":
            store.delete("seg_x")

    def dying(store, digest, countdown):
        def hook(event, arguments):
            nonlocal countdown
            if event in STEPS and str(root) in str(arguments[0]):
                countdown -= 1
                if countdown < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        perform(store, digest)

    digest, stride = sys.argv[4], int(sys.argv[5])
    for step in range(0, 10_000, stride):
        store = FeatureStore(root / str(step))
        os.system(f"cp -a {base} {store.root}")
        child = os.fork()
        if child == 0:
            try:
                dying(store, digest, step)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status))
    """
)


def killed_stores(operation: str, tmp_path: Path, *, stride: int = 1) -> tuple[list[FeatureStore], str]:
    """A store per step of the operation (each `stride`-th), killed right before it; the last one was let finish."""
    base = FeatureStore(tmp_path / "base")
    base.root.mkdir()
    digest = ""
    if operation != "create":
        base.create("seg_x", rows=1500, dim=DIM, dtype="float16", attributes={"kind": "sgd"})
    if operation in {"publish", "delete"}:
        digest = base.write("seg_x", start=0, attempt=1, block=killed_block())
    if operation == "delete":
        base.publish("seg_x", start=0, attempt=1, digest=digest)
    root = tmp_path / "killed"
    root.mkdir()
    command = [sys.executable, "-c", KILLED_BEFORE_EACH_STEP, operation, str(root), str(base.root), digest, str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    stores = [FeatureStore(folder) for folder in sorted(root.iterdir(), key=lambda path: int(path.name))]
    assert len(stores) > 5
    return stores, digest


def killed_block() -> Block:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1500, DIM)).astype(np.float32)
    ones = np.ones(1500, np.float32)
    return Block(features, ones, ones, ones, np.ones(1500, np.int32), [None] * 1500)


def assert_whole(store: FeatureStore) -> None:
    segment = store.open("seg_x")
    read_all(segment)
    np.testing.assert_allclose(segment.features(0, 1500), killed_block().features, rtol=2**-11, atol=1e-6)


def test_a_publication_killed_at_any_step_is_finished_by_repeating_it(tmp_path: Path) -> None:
    stores, digest = killed_stores("publish", tmp_path)
    unfinished = 0
    for store in stores:
        try:
            read_all(store.open("seg_x"))
        except Damaged:
            unfinished += 1
        store.publish("seg_x", start=0, attempt=1, digest=digest)
        assert_whole(store)
        assert store.attempts() == []
    assert unfinished > 5


def test_a_half_published_attempt_cannot_be_discarded_or_overtaken(tmp_path: Path) -> None:
    stores, digest = killed_stores("publish", tmp_path)
    half = next(store for store in stores if (group_of(store, "seg_x") / "scales" / "c.0").exists())
    with pytest.raises(Conflict, match="publish it again"):
        half.discard("seg_x", start=0, attempt=1)
    other = half.write("seg_x", start=0, attempt=2, block=block_of(1500, seed=9))
    with pytest.raises(Conflict, match="another attempt"):
        half.publish("seg_x", start=0, attempt=2, digest=other)
    half.publish("seg_x", start=0, attempt=1, digest=digest)
    assert_whole(half)


def test_a_write_killed_at_any_step_leaves_nothing_that_counts(tmp_path: Path) -> None:
    stores, _ = killed_stores("write", tmp_path)
    swept = 0
    for store in stores:
        for left in store.attempts():
            store.discard(left.segment, start=left.start, attempt=left.attempt)
        digest = store.write("seg_x", start=0, attempt=2, block=killed_block())
        store.publish("seg_x", start=0, attempt=2, digest=digest)
        assert_whole(store)
        swept += store.sweep(older_than=-1)
        assert store.attempts() == []
        assert list((store.root / "unfinished").iterdir()) == []
    assert swept > 5


def test_a_creation_killed_at_any_step_is_made_good_by_repeating_it(tmp_path: Path) -> None:
    stores, _ = killed_stores("create", tmp_path, stride=5)
    for store in stores:
        store.create("seg_x", rows=1500, dim=DIM, dtype="float16", attributes={"kind": "sgd"})
        digest = store.write("seg_x", start=0, attempt=1, block=killed_block())
        store.publish("seg_x", start=0, attempt=1, digest=digest)
        assert_whole(store)


def test_a_deletion_killed_at_any_step_leaves_the_whole_or_nothing(tmp_path: Path) -> None:
    stores, _ = killed_stores("delete", tmp_path)
    gone = 0
    for store in stores:
        if store.bytes("seg_x"):
            assert_whole(store)
        else:
            gone += 1
            with pytest.raises(NotFound):
                store.open("seg_x")
        store.delete("seg_x")
        store.sweep(older_than=-1)
        assert files_of(store.root) == {}
    assert 0 < gone < len(stores)


def test_a_full_disk_leaves_nothing_behind_and_the_attempt_can_be_repeated(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features")
    store.create("seg_x", rows=1500, dim=DIM, dtype="float16", attributes={"kind": "sgd"})
    before = files_of(store.root)
    code = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from datastore.errors import NotEnoughSpace
        from datastore.gradients import Block, FeatureStore

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        ones = np.ones(1500, np.float32)
        block = Block(np.ones((1500, 24), np.float32), ones, ones, ones, np.ones(1500, np.int32), [None] * 1500)
        try:
            FeatureStore(Path(sys.argv[1])).write("seg_x", start=0, attempt=1, block=block)
        except NotEnoughSpace as error:
            print(error.needed, error)
            sys.exit(7)
        """
    )
    done = subprocess.run([sys.executable, "-c", code, str(store.root)], check=False, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "free some space" in done.stdout
    assert files_of(store.root) == before
    assert store.attempts() == []
    digest = store.write("seg_x", start=0, attempt=1, block=killed_block())
    store.publish("seg_x", start=0, attempt=1, digest=digest)
    assert_whole(store)


# The document -------------------------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "on-disk-format.md").read_text()


def test_the_documented_lines_read_a_segment(store: FeatureStore) -> None:
    block = block_of(1500, size=1e-7)
    block.features[9] = 0
    fill(store, SEGMENT, block)
    code = DOCUMENT.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {"path": group_of(store)}
    exec(code, names)  # noqa: S102 - the document's own lines
    segment = store.open(SEGMENT)
    np.testing.assert_array_equal(np.asarray(names["features"]), segment.features(0, 1500))
    np.testing.assert_array_equal(np.asarray(names["valid"]), segment.valid)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(names["directions"]), axis=1), 1, rtol=1e-5)


def test_the_document_names_every_array_and_reason() -> None:
    for name in array_formats(2000, dim=DIM, dtype="float16"):
        assert f"| `{name}` |" in DOCUMENT
    for code, text in REASONS.items():
        assert f"| {code} | {text} |" in DOCUMENT
