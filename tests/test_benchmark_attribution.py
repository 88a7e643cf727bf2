"""The benchmark of attributions: rows like given ones, and what is measured of their index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.attribution import measure, scan
from benchmarks.spectrum import RealFeatures, Resampled
from datastore import index
from tests.test_index import clustered
from tests.test_search import unit


@pytest.fixture
def real() -> RealFeatures:
    rows = clustered(260)
    return RealFeatures(*(unit(part[part.any(axis=1)]).astype(np.float32) for part in (rows[:240], rows[240:])))


def test_rows_are_made_again_and_keep_the_spectrum(real: RealFeatures) -> None:
    made = Resampled(real.pool, rank=16)
    rows = made.block(0, 2000)
    np.testing.assert_array_equal(rows, Resampled(real.pool, rank=16).block(0, 2000))
    assert not np.array_equal(rows[:100], made.block(2000, 2100))
    np.testing.assert_allclose(rows.mean(axis=0), real.pool.mean(axis=0), atol=0.05)
    sizes = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    shares, wanted = np.cumsum(sizes / sizes.sum()), np.cumsum(made.spectrum)
    assert [shares[n] for n in (0, 3, 15)] == pytest.approx([wanted[n] for n in (0, 3, 15)], abs=0.1)
    lengths = np.linalg.norm(rows, axis=1)
    assert 0.8 < lengths.mean() < 1.1


def test_the_index_is_built_searched_and_compared(
    real: RealFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(index, "REDUCED", 16)
    lines = measure(tmp_path, real, rows=3000, dtype="int8")
    assert [line.name for line in lines] == [
        "rows made and written", "index built and measured", f"exact search, {len(real.queries)} questions",
        "exact search, 1 question", "index, 1 question (median)",
    ]  # fmt: skip
    assert all(line.seconds > 0 for line in lines)
    assert lines[-1].ratio == pytest.approx(lines[-1].seconds / lines[-2].seconds)
    found = float(capsys.readouterr().out.split("recall@100 ")[1].split()[0])
    assert found > 0.9


def test_coordinates_alone_tell_of_candidates(real: RealFeatures, capsys: pytest.CaptureFixture[str]) -> None:
    few, many, lists = "4:SQ8", "24:SQ8", "24:IVF32,SQ8:nprobe=2"
    scan(real, rows=3000, kinds=[few, many, lists])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    found = {(line[0], int(line[2].replace(",", ""))): float(line[3]) for line in lines}
    assert found[many, 500] > 0.95
    assert found[few, 500] < found[many, 500]
    assert found[few, 500] < found[few, 2000]
    assert found[lists, 500] < found[many, 500]
