"""Shards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.shards import CHUNK_BYTES, CHUNK_ROWS, chunk_rows, plan


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


@given(st.integers(0, 10**7), st.integers(1, 1 << 28))
def test_a_chunk_holds_the_rows_of_a_shard_or_a_power_of_two_of_them(rows: int, row_bytes: int) -> None:
    found = chunk_rows(rows, row_bytes=row_bytes)
    assert found == 1 or found * row_bytes <= CHUNK_BYTES
    assert CHUNK_ROWS % found == 0 or found == rows < CHUNK_ROWS
    if found < min(rows, CHUNK_ROWS):
        assert 2 * found * row_bytes > CHUNK_BYTES
