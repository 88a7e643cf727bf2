"""Hypothesis mutates files of every packaging: whatever it makes is stored whole, or refused and leaves nothing."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzzing import check_dataset, check_zip, seeds

PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\u0000",
    b"\\ud800",
    b"\n",
    b"\r",
    b"\0",
    b"\xff\xfe",
    b"1e999",
    b"NaN",
    b"{}\n",
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A seed with bytes changed, cut out, doubled or put in, perhaps packed again."""
    content = bytearray(draw(st.sampled_from(seeds())))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 40))
        match draw(st.sampled_from(["change", "cut", "double", "put"])):
            case "change":
                content[place : place + 1] = draw(st.binary(min_size=1, max_size=2))
            case "cut":
                del content[place : place + length]
            case "double":
                content[place:place] = content[place : place + length]
            case _:
                content[place:place] = draw(st.sampled_from(PIECES))
    found = bytes(content)
    return gzip.compress(found, mtime=0) if draw(st.booleans()) else found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


@pytest.fixture(scope="module")
def zips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zips")


@settings(max_examples=400, deadline=None)
@given(content=mutated() | st.binary(max_size=300), skip=st.booleans())
def test_any_bytes_are_a_dataset_or_refused(root: Path, content: bytes, skip: bool) -> None:
    check_dataset(root, content, skip=skip)


@settings(max_examples=300, deadline=None)
@given(content=mutated())
def test_any_bytes_are_a_zip_or_refused(zips: Path, content: bytes) -> None:
    check_zip(zips, content)
