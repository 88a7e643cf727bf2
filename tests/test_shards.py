"""Shards and names by content."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.shards import CHUNK_ROWS, content_id, feature_id, plan, segment_id

RECIPE = {"checkpoint": "ck_1", "kind": "adam", "dim": 8192, "learning": {"b": 1, "a": "é"}}


@given(rows=st.integers(0, 100_000), chunks=st.integers(1, 9))
def test_shards_cover_every_row_once(rows: int, chunks: int) -> None:
    shards = plan(rows, size=chunks * CHUNK_ROWS)
    assert [row for shard in shards for row in (shard.start, shard.stop)][1:-1:2] == [s.start for s in shards[1:]]
    assert sum(shard.rows for shard in shards) == rows
    if shards:
        assert (shards[0].start, shards[-1].stop) == (0, rows)


@given(rows=st.integers(1, 100_000), chunks=st.integers(1, 9))
def test_a_shard_is_a_whole_number_of_chunks(rows: int, chunks: int) -> None:
    shards = plan(rows, size=chunks * CHUNK_ROWS)
    assert all(shard.start % CHUNK_ROWS == 0 for shard in shards)
    assert all(shard.rows == chunks * CHUNK_ROWS for shard in shards[:-1])
    assert [shard.number for shard in shards] == list(range(len(shards)))


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK_ROWS + 1, -CHUNK_ROWS])
def test_a_shard_that_splits_a_chunk_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="whole number of chunks"):
        plan(10, size=size)


def test_a_segment_has_the_same_name_in_another_process() -> None:
    code = f"from datastore.shards import segment_id\nprint(segment_id({RECIPE!r}, rows_hash='ds_1', start=0, stop=10))"
    name = segment_id(RECIPE, rows_hash="ds_1", start=0, stop=10)
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == name
    )


def test_a_name_does_not_depend_on_the_order_of_the_recipe() -> None:
    turned = dict(reversed(RECIPE.items()))
    assert segment_id(turned, rows_hash="ds_1", start=0, stop=9) == segment_id(
        RECIPE, rows_hash="ds_1", start=0, stop=9
    )
    assert feature_id(turned, rows_hash="ds_1") == feature_id(RECIPE, rows_hash="ds_1")


def test_everything_that_a_segment_is_made_from_changes_its_name() -> None:
    names = {
        segment_id(RECIPE, rows_hash="ds_1", start=0, stop=9),
        segment_id({**RECIPE, "dim": 4096}, rows_hash="ds_1", start=0, stop=9),
        segment_id(RECIPE, rows_hash="ds_2", start=0, stop=9),
        segment_id(RECIPE, rows_hash="ds_1", start=1, stop=9),
        segment_id(RECIPE, rows_hash="ds_1", start=0, stop=8),
    }
    assert len(names) == 5


def test_names_have_their_prefix_and_24_hex_digits() -> None:
    for prefix, name in (
        ("seg_", segment_id(RECIPE, rows_hash="ds_1", start=0, stop=9)),
        ("feat_", feature_id(RECIPE, rows_hash="ds_1")),
    ):
        assert name.startswith(prefix)
        assert len(bytes.fromhex(name.removeprefix(prefix))) == 12


def test_a_number_that_json_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        content_id("seg", {"rate": float("nan")})
