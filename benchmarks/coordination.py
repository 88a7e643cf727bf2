"""What a shard costs beside its computing: to be claimed, kept, committed and published, by several worker processes.

    python -m benchmarks.coordination --processes 8 --shards 20
    python -m benchmarks.coordination --catalog postgresql+psycopg://postgres@localhost/empty …

Every process claims a shard, sleeps in place of computing with its heartbeat going on, and then writes, commits and
publishes features of a few dims, in as many files as any shard has. What is counted of a shard is the time in the
catalog and in publication; reading rows and writing features are work that a single worker has, too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from gradstore.types import JobKind
from sqlalchemy.orm import Session

from benchmarks.timing import Seconds, TimedJobs, table, together
from datastore.catalog import Catalog
from datastore.gradients import Block, FeatureStore
from datastore.leases import Claim, Jobs, NewChunk, NewShard
from datastore.schema import JobRow, SegmentRow
from datastore.shards import CHUNK_ROWS, plan
from datastore.turns import Turns
from worker.heartbeat import Heartbeat

SEGMENT, DIM = "seg_coordination", 64
KINDS: tuple[JobKind, ...] = ("gradients",)
IN_LINE = ("waiting", "claim", "upcoming", "succeed", "unpublished", "files", "published")
"""What a shard waits for; heartbeats go on beside the computing. `files` get their keys, outside the catalog."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--catalog", default="", help="URL of an empty catalog, else SQLite in a new folder")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--shards", type=int, default=20, help="shards for each process")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of a shard's computing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, elapsed = measure(
            options.catalog or f"sqlite:///{folder}/catalog.sqlite3", Path(folder),
            processes=options.processes, shards=options.shards, shard_seconds=options.seconds,
        )  # fmt: skip
    print("\n".join(table(found, names=[*IN_LINE, "renew", "wanted"], elapsed=elapsed)))
    own = found["shard"]
    half, most = np.percentile(own, [50, 99]) * 1e3
    print(f"a shard: {half:,.0f} ms in the half, {most:,.0f} ms in 99 % of {len(own)}")


def measure(url: str, folder: Path, *, processes: int, shards: int, shard_seconds: float) -> tuple[Seconds, float]:
    """The seconds of each call, and of all of them together for each shard (`shard`); and the run's."""
    catalog = Catalog(url)
    catalog.migrate()
    rows = processes * shards * CHUNK_ROWS
    FeatureStore(folder / "features").create(SEGMENT, rows=rows, dim=DIM, dtype="int8", attributes={})
    segment = SegmentRow(id=SEGMENT, rows=rows, dim=DIM, dtype="int8", shard_rows=CHUNK_ROWS, complete=False)
    new = [NewShard({"start": shard.start, "stop": shard.stop}, units=shard.rows) for shard in plan(rows)]

    def before(session: Session, _: JobRow) -> list[NewShard]:
        session.add(segment)
        return new

    Jobs(catalog).create(id="grad_1", kind="gradients", request={}, plan={"segments": [SEGMENT]}, before=before)
    began = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        work = partial(_work, url, folder, shard_seconds)
        found = together(pool.map(work, [f"worker-{number}" for number in range(processes)]))
    assert Jobs(catalog).get("grad_1").status == "succeeded"
    catalog.close()
    return found, time.monotonic() - began


def _work(url: str, folder: Path, shard_seconds: float, name: str) -> Seconds:
    """Do shards until none waits."""
    jobs, store, turns = TimedJobs(Catalog(url)), FeatureStore(folder / "features"), Turns()
    seconds = TimedJobs.seconds
    while True:
        before = _in_line(seconds)
        claim = jobs.claim(name, kinds=KINDS, turns=turns) if jobs.waiting(kinds=KINDS) else None
        if claim is None:
            return dict(seconds)
        jobs.upcoming(claim)
        with Heartbeat(jobs, claim, leaving=threading.Event()) as heartbeat:
            for step in range(10):
                time.sleep(shard_seconds / 10)
                heartbeat.report((step + 1) * CHUNK_ROWS // 10)
            digest = store.write(SEGMENT, start=claim.payload["start"], attempt=claim.token, block=_block())
            _commit(jobs, store, claim, digest)
        seconds["shard"].append(_in_line(seconds) - before)


def _commit(jobs: Jobs, store: FeatureStore, claim: Claim, digest: str) -> None:
    """Commit and publish, as worker/chunks.py does."""
    chunk = NewChunk(SEGMENT, claim.payload["start"], claim.payload["stop"], digest)
    assert jobs.succeed(claim, chunks=[chunk])
    mine = jobs.unpublished(attempt=claim.token)
    began = time.perf_counter()
    for one in mine:
        store.publish(one.segment, start=one.start, attempt=one.attempt, digest=one.digest)
    TimedJobs.seconds["files"].append(time.perf_counter() - began)
    jobs.published(mine)


def _in_line(seconds: Seconds) -> float:
    return sum(sum(seconds[name]) for name in IN_LINE)


def _block() -> Block:
    numbers = np.ones(CHUNK_ROWS, np.float32)
    return Block(
        features=np.ones((CHUNK_ROWS, DIM), np.float32), norms=numbers, raw_norms=numbers, losses=numbers,
        tokens=np.ones(CHUNK_ROWS, np.int32), reasons=[None] * CHUNK_ROWS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
