"""A whole store in a folder, and a worker that writes given numbers as features: no torch, no service."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import Checkpoint, Dataset, GradientsRequest, Task
from numpy.typing import NDArray

from datastore.catalog import Catalog, utc_now
from datastore.gradients import Block
from datastore.leases import Claim, NewChunk
from datastore.settings import Settings
from datastore.store import OpenStore, open_store

Numbers = Callable[[str, int, int, int], NDArray[np.float32]]
"""(checkpoint, first row, last row, dim) → features (n, dim)."""

DIM = 16


@dataclass(frozen=True)
class Store(OpenStore):
    """Everything below the service."""

    @classmethod
    def at(cls, folder: Path, *, catalog: str = "", **chosen: Any) -> Store:
        """Open a store, made where there is none."""
        settings = Settings(data=folder, catalog=catalog, **chosen)
        opened = Catalog(settings.catalog_url)
        opened.migrate()
        return cls(**vars(open_store(settings, opened)))

    def pool(self, rows: int, *, name: str | None = None, first: int = 0) -> Dataset:
        """A dataset of numbered rows; a longer one begins with a shorter one."""
        lines = "".join(json.dumps(_row(number)) + "\n" for number in range(first, first + rows))
        found = self.datasets.ingest(
            io.BytesIO(lines.encode()), filename="pool.jsonl", known=self.catalog.dataset_sizes()
        )
        return self.catalog.add_dataset(
            id=found.id,
            rows=found.rows,
            bytes=found.bytes,
            origins=found.origins,
            prefix=found.prefix,
            sources=found.sources,
            name=name,
            replace=False,
        )

    def task(self, subtasks: dict[str, int], *, folder: Path, name: str = "target") -> Task:
        """A task with so many validation rows per subtask."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"prompt": f"{name} {subtask} {number}", "completion": "yes", "subtask": subtask}
            for subtask, count in subtasks.items()
            for number in range(count)
        ]
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        stored = self.tasks.store("jsonl", folder)
        return self.catalog.add_task(
            id=stored.id, name=name, kind="jsonl", subtasks=stored.subtasks, notes=stored.notes, replace=False
        )

    def checkpoint(self, number: int, **changes: Any) -> Checkpoint:
        """A checkpoint's record, without files."""
        values: dict[str, Any] = {
            "id": f"ck_{number}", "name": None, "run": None, "model": "tiny", "revision": None, "method": "lora",
            "epoch": number, "step": number, "learning_rate": 1e-4 / (number + 1), "has_moments": True,
            "moments_note": None, "parameters": 100, "precision": "float32", "template": "tulu", "max_length": 64,
            "bytes": 1, "created_at": utc_now(),
        }  # fmt: skip
        return self.catalog.add_checkpoint(Checkpoint.model_validate(values | changes))

    def work(self, numbers: Numbers, *, shards: int | None = None) -> list[Claim]:
        """Do the gradients shards that wait, with these numbers as features; returns what was done."""
        return list(self._work(numbers, shards))

    def score(self) -> None:
        """Do the scoring jobs that wait."""
        while (claim := self.jobs.claim("test", kinds=["scoring"])) is not None:
            self.scoring.work(claim, lambda _: None)
            assert self.jobs.succeed(claim)

    def _work(self, numbers: Numbers, shards: int | None) -> Iterator[Claim]:
        done = 0
        while (shards is None or done < shards) and (claim := self.jobs.claim("test", kinds=["gradients"])) is not None:
            self._write(claim, numbers)
            done += 1
            yield claim

    def _write(self, claim: Claim, numbers: Numbers) -> None:
        payload, chunks = claim.payload, []
        start, stop = payload["start"], payload["stop"]
        for output in payload["outputs"]:
            segment, base = output["segment"], output["base"]
            features = numbers(payload["checkpoint"], start, stop, output["dim"])
            self.store.create(
                segment,
                rows=output["rows"],
                dim=output["dim"],
                dtype=claim.plan["dtype"],
                attributes=output["attributes"],
            )
            block = block_of(features, kind=output["kind"])
            digest = self.store.write(segment, start=start - base, attempt=claim.token, block=block)
            excluded = [(start - base + row, reason) for row, reason in block.excluded.items()]
            chunks.append(NewChunk(segment, start - base, stop - base, digest, excluded, tokens=stop - start))
        assert self.jobs.succeed(claim, chunks=chunks)
        waiting = self.jobs.unpublished(attempt=claim.token)
        for chunk in waiting:
            self.store.publish(chunk.segment, start=chunk.start, attempt=chunk.attempt, digest=chunk.digest)
        self.jobs.published(waiting)


def block_of(features: NDArray[np.float32], *, kind: str = "sgd") -> Block:
    """Features with made-up statistics; a row of zeros counts as one whose gradient is zero.

    Those of kind `logodds` have their first number for the log-odds, too.
    """
    rows = len(features)
    return Block(
        features=features,
        norms=np.ones(rows, np.float32),
        raw_norms=np.full(rows, 2, np.float32),
        losses=np.ones(rows, np.float32),
        tokens=np.ones(rows, np.int32),
        reasons=[None if row.any() else "the gradient is zero" for row in features],
        logodds=features[:, 0].copy() if kind == "logodds" else None,
    )


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store with a run of two checkpoints, on each of the catalogs."""
    catalog = "" if request.param == "sqlite" else request.getfixturevalue("postgres_server").database()
    store = Store.at(tmp_path / "store", catalog=catalog)
    for number in range(2):
        store.checkpoint(number)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
    yield store
    store.catalog.close()


def numbers(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """Features that depend on the row and the checkpoint only."""
    rows = [np.random.default_rng([row, int(checkpoint[-1]), dim]).normal(size=dim) for row in range(start, stop)]
    return np.array(rows, np.float32)


def task_numbers(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    return numbers(checkpoint, start + 1_000_000, stop + 1_000_000, dim)


def request(**changes: object) -> GradientsRequest:
    """A request for features of the run."""
    return GradientsRequest.model_validate({"run": "warm-up", "dims": [DIM], "dtype": "float16", **changes})


def with_config(store: Store, folder: Path, text: str = '{"hidden_size": 24}') -> None:
    """A run of a model whose config.json is on this machine."""
    folder.mkdir()
    (folder / "config.json").write_text(text)
    for number in (5, 6):
        store.checkpoint(number, model=str(folder))
    store.catalog.add_run(id="run_2", checkpoints=["ck_5", "ck_6"], name="local")


def _row(number: int) -> dict[str, Any]:
    return {"dataset": f"origin{number % 3}", "id": str(number), "prompt": f"row {number}", "completion": "done"}
