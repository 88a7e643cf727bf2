"""What BM25 costs on this machine: a pool of real texts, repeated to so many rows, against a task of 57 subtasks.

    python -m benchmarks.bm25 DATA/train/mixed/mixed_4000.jsonl --rows 200000

Everything is the service's own code, in one thread. The queries are the file's first 285 rows, five for each subtask,
as many as MMLU has. Seconds are the processor's; memory is the highest of the process, less what it began with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradstore.types import Aggregate

from datastore import bm25
from datastore.bm25 import TextTarget
from datastore.shapes import example

SUBTASKS, PER_SUBTASK = 57, 5  # MMLU's validation rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="a JSONL file of rows in any shape that a dataset may have")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--aggregate", default="max", choices=["less", "avg", "max", "min"])
    parser.add_argument("--json", type=Path, default=None, help="where the numbers are written, too")
    options = parser.parse_args()
    found = measure(options.file, options.rows, options.aggregate)
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found))


def measure(file: Path, rows: int, aggregate: Aggregate) -> dict[str, Any]:
    """Score so many rows, and say what it took."""
    texts = [example(json.loads(line), file=file.name)[0].text for line in file.read_text().splitlines()]
    labels = [number // PER_SUBTASK for number in range(SUBTASKS * PER_SUBTASK)]
    target = TextTarget(texts[: len(labels)], labels[: len(texts)])
    bm25.score(texts[:10], [target], aggregate)  # imports
    before = _memory()
    began = time.process_time()
    marks: dict[str, float] = {}

    def mark(done: int) -> None:
        if done >= rows:
            marks.setdefault("reading", time.process_time() - began)
        if done > rows:
            marks.setdefault("weighing", time.process_time() - began)

    bm25.score(_repeated(texts, rows), [target], aggregate, on_rows=mark)
    total = time.process_time() - began
    reading, weighed = marks["reading"], marks.get("weighing", total)
    return {
        "name": "bm25",
        "rows": rows,
        "queries": len(target.texts),
        "aggregate": aggregate,
        "seconds": round(total, 2),
        "reading_seconds": round(reading, 2),
        "weighing_seconds": round(weighed - reading, 2),
        "scoring_seconds": round(total - weighed, 2),
        "megabytes": round(_memory() - before, 1),
    }


def _repeated(texts: list[str], rows: int) -> Iterator[str]:
    return itertools.islice(itertools.cycle(texts), rows)


def _memory() -> float:
    """Highest memory of this process until now, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
