"""What must hold for any bytes that are sent as a dataset or as a zip; found out by guided chance.

    python -m tests.fuzzing --seconds 600          # atheris: mutations that reach new code are kept and mutated again

`tests/test_fuzzing.py` has Hypothesis do the same for some seconds.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import shutil
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from datastore.datasets import Datasets
    from datastore.errors import GradstoreError

ROWS: list[dict[str, Any]] = [
    {"prompt": "2 + 2?", "completion": "4", "id": "a", "source": "sums"},
    {"instruction": "Say ß", "input": "", "output": "\u00df \U0001f600"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    {"question": "1e400?", "answer": "#### 3"},
]


def seeds() -> list[bytes]:
    """Files of every packaging that is read."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS[:1] * 3), table)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("dev/a.jsonl", lines)
        packed.writestr("b.json", json.dumps(ROWS))
    return [
        lines.encode(),
        json.dumps(ROWS, indent=1).encode(),
        lines.encode("utf-16"),
        b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode(),
        gzip.compress(lines.encode(), mtime=0),
        gzip.compress(json.dumps(ROWS).encode(), mtime=0) * 2,
        table.getvalue(),
        archive.getvalue(),
        b"",
        b"[",
        b'{"prompt": "a", "completion": ',
    ]


def check_dataset(root: Path, content: bytes, *, skip: bool) -> None:
    """Send bytes as a dataset: they are stored whole or refused with a reason, and nothing is left lying about."""
    from datastore.datasets import Datasets  # here, where atheris can instrument it
    from datastore.errors import GradstoreError

    datasets = Datasets(root)
    before = {path.name for path in root.iterdir()}
    try:
        found = datasets.ingest(io.BytesIO(content), filename="fuzzed", on_error="skip" if skip else "fail")
    except GradstoreError as error:
        _check_refusal(error)
        assert {path.name for path in root.iterdir()} == before, "a refused file has left something"
    else:
        _check_stored(datasets, found.id, rows=found.rows)
    assert not list((root / "incoming").iterdir()), "an upload's folder is left"


def _check_refusal(refusal: GradstoreError) -> None:
    assert str(refusal)
    errors = getattr(refusal, "errors", [])
    assert len(errors) <= getattr(refusal, "total_errors", 0)
    assert all(item.detail for item in errors)
    assert all(item.line is None or item.line > 0 for item in errors)


def _check_stored(datasets: Datasets, id: str, *, rows: int) -> None:
    lines = list(datasets.lines(id, range(rows)))
    assert len(lines) == rows > 0
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert sum(1 for _ in datasets.examples(id)) == rows
    with datasets.content(id).open("rb") as stored:
        again = datasets.ingest(stored, filename="again")
    assert (again.id, again.rows, again.created) == (id, rows, False), "what is stored is another dataset"
    datasets.delete(id, keep_sources=())


def check_zip(folder: Path, content: bytes) -> None:
    """Send bytes as a zip: what it unpacks to lies inside the folder, and is no larger than allowed."""
    from datastore.archives import Limits, unpack
    from datastore.errors import GradstoreError

    limits = Limits(bytes=1 << 20, entries=50)
    target = folder / "inside" / "unpacked"
    target.mkdir(parents=True)
    try:
        with suppress(GradstoreError):
            written = unpack(io.BytesIO(content), "fuzzed.zip", target, limits=limits)
            assert all(path.resolve().is_relative_to(target.resolve()) for path in written)
        found = [path for path in folder.rglob("*") if not path.is_dir()]
        assert all(path.is_relative_to(target) and not path.is_symlink() for path in found)
        assert sum(path.stat().st_size for path in found) <= limits.bytes
        assert len(found) <= limits.entries
    finally:
        shutil.rmtree(folder / "inside")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["datastore"]):
        import datastore.archives
        import datastore.datasets  # noqa: F401 - for the checks, instrumented

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        corpus, zips = place / "corpus", place / "zips"
        corpus.mkdir()
        zips.mkdir()
        for number, seed in enumerate(seeds()):
            (corpus / str(number)).write_bytes(b"\0" + seed)

        def once(data: bytes) -> None:
            """The first byte chooses: bit 0 whether bad rows are skipped, bit 1 whether it is sent as a zip."""
            choice, content = data[:1], data[1:]
            if choice and choice[0] & 2:
                check_zip(zips, content)
            else:
                check_dataset(place / "datasets", content, skip=bool(choice and choice[0] & 1))

        flags = [f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-max_len=4096", "-verbosity=1"]
        atheris.Setup([sys.argv[0], *flags, str(corpus)], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
