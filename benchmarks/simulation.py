"""Whether catalog and dispatch keep up with a large job and many workers: everything real but the computing.

    python -m benchmarks.simulation --workers 256 --seconds 10 --duration 120
    python -m benchmarks.simulation --catalog postgresql+psycopg://postgres@localhost/empty …

The job has `--rows` at `--checkpoints`, of which the first half counts as done before, since what the catalog costs
might grow with what is done. Workers are threads of a few processes: each claims a shard, sleeps in place of computing
with its heartbeat going on, commits and publishes (records only, no bytes), shows itself and looks after the others.
Beside it a small job of another API key is started every few seconds. At `--seconds 10` time is that of real shards and
only a part of the job is done within `--duration`; shorter shards are a harder load, up to the most that there can be.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from gradstore.types import JobKind
from sqlalchemy import update
from sqlalchemy.orm import Session

from benchmarks.timing import LOOKS, WRITES, Seconds, TimedJobs, table, together
from datastore.catalog import Catalog
from datastore.leases import Jobs, NewChunk, NewShard
from datastore.schema import JobRow, SegmentRow, ShardRow
from datastore.shards import CHUNK_ROWS, plan
from datastore.turns import Turns
from worker.heartbeat import Heartbeat, Stopped

BIG, SMALL_SHARDS, SMALL_EVERY = "grad_big", 4, 10.0  # seconds
CARE_INTERVAL = 5.0  # seconds, as in worker/loop.py
KINDS: tuple[JobKind, ...] = ("gradients",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--catalog", default="", help="URL of an empty catalog, else SQLite in a new folder")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--processes", type=int, default=6, help="processes that the workers are threads of")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of a shard")
    parser.add_argument("--duration", type=float, default=120.0, help="seconds of the simulation")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        simulate(
            options.catalog or f"sqlite:///{folder}/catalog.sqlite3",
            rows=options.rows, checkpoints=options.checkpoints, workers=options.workers,
            processes=options.processes, shard_seconds=options.seconds, duration=options.duration,
        )  # fmt: skip


def simulate(
    url: str, *, rows: int, checkpoints: int, workers: int, processes: int, shard_seconds: float, duration: float
) -> None:
    """Run and print the tables."""
    catalog = Catalog(url)
    catalog.migrate()
    jobs = Jobs(catalog)
    began = time.monotonic()
    shards = _start(jobs, BIG, rows=rows, checkpoints=checkpoints)
    print(f"{shards:,} shards recorded in {time.monotonic() - began:.1f} s")
    with catalog.transaction() as session:
        half = update(ShardRow).where(ShardRow.job_id == BIG, ShardRow.number < shards // 2)
        session.execute(half.values(status="succeeded", done=ShardRow.units))
    several = multiprocessing.get_context("spawn")
    own = partial(_workers, url, workers // processes, shard_seconds, duration)
    with ProcessPoolExecutor(processes, mp_context=several) as pool:
        running = [pool.submit(own, number) for number in range(processes)]
        waits = _small_jobs(jobs, duration)
        found = [each.result() for each in running]
    seconds, done = together(own for own, _ in found), sum(count for _, count in found)
    ideal = workers / shard_seconds
    print(f"{done / duration:,.1f} shards/s of {ideal:,.1f} that {workers} workers would do without a catalog")
    print("\n".join(table(seconds, names=[*WRITES, *LOOKS], elapsed=duration)))
    held = sum(sum(seconds[name]) for name in WRITES) / duration
    print(f"callers in or before a writing transaction at a time: {held:,.1f}")
    print(f"small jobs of {SMALL_SHARDS} shards, seconds to their end: {_summary(waits)}")
    catalog.close()


def _start(jobs: Jobs, id: str, *, rows: int, checkpoints: int) -> int:
    """Start a job as the service records it; returns how many shards it has."""
    segments = [f"seg_{id}_{checkpoint}" for checkpoint in range(checkpoints)]

    def before(session: Session, _: JobRow) -> list[NewShard]:
        session.add_all(
            SegmentRow(id=segment, rows=rows, dim=8192, dtype="int8", shard_rows=CHUNK_ROWS, complete=False)
            for segment in segments
        )
        return [
            NewShard(
                {"start": shard.start, "stop": shard.stop, "checkpoint": f"ck_{segment}", "outputs": [
                    {"segment": segment, "base": 0, "rows": rows, "dim": 8192, "kind": "adam", "adam": "less"}
                ]},
                units=shard.rows,
            )
            for segment in segments
            for shard in plan(rows)
        ]  # fmt: skip

    jobs.create(id=id, kind="gradients", request={}, plan={"segments": segments}, before=before)
    return len(plan(rows)) * checkpoints


def _small_jobs(jobs: Jobs, duration: float) -> list[float]:
    """Start a small job every few seconds; returns how long those took that have ended."""
    began, started = time.monotonic(), dict[str, float]()
    waits: list[float] = []
    while time.monotonic() - began < duration:
        if len(started) + len(waits) <= (time.monotonic() - began) / SMALL_EVERY:
            id = f"grad_small_{len(started) + len(waits)}"
            _start(jobs, id, rows=SMALL_SHARDS * CHUNK_ROWS, checkpoints=1)
            with jobs.catalog.transaction() as session:
                session.get_one(JobRow, id).api_key = "key_small"
            started[id] = time.monotonic()
        ended = [id for id in started if jobs.get(id).finished]
        waits.extend(time.monotonic() - started.pop(id) for id in ended)
        time.sleep(0.2)
    return waits


def _workers(url: str, count: int, shard_seconds: float, duration: float, process: int) -> tuple[Seconds, int]:
    """Some workers in threads of this process; the seconds of their calls, and how many shards they did."""
    sys.setswitchinterval(1e-4)  # seconds: threads in place of processes are not to wait for each other's Python
    catalog = Catalog(url)
    jobs, leaving, done = TimedJobs(catalog), threading.Event(), list[int]()
    names = [f"host-{process}-{number}" for number in range(count)]
    threads = [threading.Thread(target=_work, args=(jobs, name, shard_seconds, leaving, done)) for name in names]
    threads += [threading.Thread(target=_care, args=(jobs, name, leaving)) for name in names]
    for thread in threads:
        thread.start()
    time.sleep(duration)
    leaving.set()
    for thread in threads:
        thread.join()
    catalog.close()
    return dict(jobs.seconds), len(done)


def _work(jobs: Jobs, name: str, shard_seconds: float, leaving: threading.Event, done: list[int]) -> None:
    turns, ahead = Turns(), None
    leaving.wait(random.uniform(0, shard_seconds))  # noqa: S311 - workers do not begin all at once
    while not leaving.is_set():
        claim = jobs.claim(name, kinds=KINDS, turns=turns, prefer=ahead) if jobs.waiting(kinds=KINDS) else None
        if claim is None:
            leaving.wait(0.2)
            continue
        upcoming = jobs.upcoming(claim)
        ahead = upcoming[0] if upcoming is not None else None
        rows = claim.payload["stop"] - claim.payload["start"]
        try:
            with Heartbeat(jobs, claim, leaving=leaving) as heartbeat:
                ends = time.monotonic() + shard_seconds
                while (left := ends - time.monotonic()) > 0:
                    leaving.wait(min(left, 0.25))
                    heartbeat.report(int(rows * (1 - max(left, 0) / shard_seconds)))
        except Stopped:
            jobs.release(claim)
            continue
        segment = claim.payload["outputs"][0]["segment"]
        jobs.succeed(claim, chunks=[NewChunk(segment, claim.payload["start"], claim.payload["stop"], "digest")])
        jobs.published(jobs.unpublished(attempt=claim.token))
        done.append(claim.shard)


def _care(jobs: Jobs, name: str, leaving: threading.Event) -> None:
    leaving.wait(random.uniform(0, CARE_INTERVAL))  # noqa: S311
    while not leaving.wait(CARE_INTERVAL):
        jobs.announce(name, device="none", job=BIG, flops={})
        jobs.sweep()
        jobs.unpublished()


def _summary(seconds: list[float]) -> str:
    if not seconds:
        return "none has ended"
    half, most = np.percentile(seconds, [50, 100])
    return f"{half:,.1f} in the half, {most:,.1f} at most, {len(seconds)} jobs"


if __name__ == "__main__":
    main()
