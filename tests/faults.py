"""A team that tests do harm to: a service, workers, their database and broker, and the network in between.

Everything is a process or a socket of the tests' own. A job is begun, harm is done while a shard is at work, and what
comes of it is compared with a run that nobody disturbed: the same chunks, byte for byte, and each row once.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from gradstore import GradientStore
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from datastore.doctor import examine
from datastore.findings import Finding, mended
from datastore.schema import ChunkRow, FeatureSegmentRow, JobFeatureRow, ShardRow
from tests.conftest import REPOSITORY
from tests.processes import PATIENCE, ServiceProcess, end_process, wait_for
from tests.services import PostgresServer, RedisServer
from tests.workplace import Workplace, numbered

LEASE = 3.0  # seconds
SHARDS = 3
ROWS = SHARDS * 1024 - 100
HOUR = 3600


class Wire:
    """A TCP connection's way to a server, which can be cut, or lose everything in silence."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._state = "whole"
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._over = False
        self._thread = threading.Thread(target=self._carry, name="wire", daemon=True)

    def cut(self) -> None:
        """Break all connections, and refuse new ones."""
        with self._lock:
            self._state = "cut"
            self._break()

    def swallow(self) -> None:
        """Keep all connections, take new ones, and carry nothing: nobody is told."""
        with self._lock:
            self._state = "silent"

    def heal(self) -> None:
        """Carry again; connections of the time of silence are broken, as by a router that has forgotten them."""
        with self._lock:
            if self._state == "silent":
                self._break()
            self._state = "whole"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over = True
        self._thread.join()
        self._break()
        self._listener.close()
        self._selector.close()

    def _carry(self) -> None:
        while not self._over:
            for key, _ in self._selector.select(0.05):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif self._state != "silent":
                        self._pass_on(key.fileobj)
            if self._state == "silent":
                time.sleep(0.02)  # what waits to be read is ready all the time

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self._state == "cut":
            near.close()
            return
        try:
            far = socket.create_connection(("127.0.0.1", self._to), timeout=5)
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            one.settimeout(5)
            self._pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, one: object) -> None:
        assert isinstance(one, socket.socket)
        other = self._pairs.get(one)
        if other is None:
            return
        try:
            content = one.recv(1 << 16)
            if content:
                other.sendall(content)
                return
        except OSError:
            pass
        self._drop(one, other)

    def _drop(self, *ends: socket.socket) -> None:
        for end in ends:
            if self._pairs.pop(end, None) is not None:
                self._selector.unregister(end)
            end.close()

    def _break(self) -> None:
        while self._pairs:
            one, other = next(iter(self._pairs.items()))
            self._drop(one, other)


class Clock:
    """The wall clock of the processes that are started with it, by libfaketime; time that is measured goes on as it is.

    Raises `LookupError` where the library is not installed (`apt-get install faketime`).
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
        if self._library is None:
            raise LookupError("libfaketime is not installed")
        self.jump_to(0)

    def jump_to(self, seconds: int) -> None:
        """Be so many seconds ahead of the real time from now on; negative ones, behind."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}s\n")
        new.replace(self._file)

    @property
    def environment(self) -> dict[str, str]:
        """What a process is started with."""
        return {
            "LD_PRELOAD": str(self._library), "FAKETIME_TIMESTAMP_FILE": str(self._file), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip


class WorkerProcess:
    """`gradstore worker` in a process that is killed, stopped and woken."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.command"], cwd=REPOSITORY, env=environment, stdout=output, stderr=output
            )
        self.pid = self._process.pid

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Ask it to leave, and see that it does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
        end_process(self._process)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)


class Team:
    """A service and workers over one store; with servers, over PostgreSQL and Redis, reached by wires."""

    def __init__(
        self, folder: Path, *, model: Path, postgres: PostgresServer | None = None, redis: RedisServer | None = None
    ) -> None:
        self.folder, self.postgres, self.redis = folder, postgres, redis
        self._stack = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        catalog = postgres.database() if postgres is not None else ""
        self.place = Workplace.at(folder, model=model, catalog=catalog, lease=LEASE)
        self.place.checkpoint()
        self.place.pool(numbered(range(ROWS)), name="pool")
        self.to_postgres = self._stack.enter_context(Wire(postgres.port)) if postgres is not None else None
        self.to_redis = self._stack.enter_context(Wire(redis.port)) if redis is not None else None
        self._near = {"catalog": catalog, "broker": redis.url if redis is not None else ""}
        self._far = {
            "catalog": _over(self._near["catalog"], self.to_postgres),
            "broker": _over(self._near["broker"], self.to_redis),
        }
        settings = {"lease": LEASE, "max_attempts": 20, "poll_interval": 0.05}
        self.service = ServiceProcess(
            self.place.context.settings.data, "--no-worker", allow=folder, **settings, **self._near
        )
        self._settings = {**settings, "data": self.place.context.settings.data, "device": "cpu", "threads": 1}
        self.workers: list[WorkerProcess] = []
        self._hired = 0
        self.undisturbed: dict[tuple[str, int], str] = {}

    def __enter__(self) -> Self:
        self._stack.enter_context(self.service)
        self._stack.callback(self._stop_workers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        self.place.context.catalog.close()

    def hire(self, *, far: bool = False, clock: Clock | None = None) -> WorkerProcess:
        """Start a worker, over the wires if it is `far`, and by a clock of its own."""
        chosen = {**self._settings, **(self._far if far else self._near)}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADSTORE_")}
        environment |= {f"GRADSTORE_{name.upper()}": str(value) for name, value in chosen.items()}
        environment |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        environment |= clock.environment if clock is not None else {}
        self._hired += 1
        worker = WorkerProcess(self.folder / f"worker-{self._hired}.log", environment)
        self.workers.append(worker)
        return worker

    def ready(self, *workers: WorkerProcess) -> None:
        """Wait until these workers look for work."""
        for worker in workers:
            wait_for(lambda log=worker.log: "worker ready" in log.read_text(), patience=3 * PATIENCE)

    def begin(self) -> str:
        """Start the job, by the API."""
        with self.service.client() as store:
            return self._begin(store, "pool")

    def _begin(self, store: GradientStore, dataset: str) -> str:
        checkpoint = self.place.context.catalog.checkpoints(limit=1).data[0].id
        job = store.gradients.create(
            dataset=dataset, checkpoints=[checkpoint], dims=[32], kinds=["sgd"], token_budget=2048
        )
        return job.id

    def mid_shard(self, worker: WorkerProcess | None = None) -> None:
        """Wait until a shard, or one of this worker's, is at work."""

        wait_for(
            lambda: any(worker is None or f"-{worker.pid}-" in owner for owner in self._owners()), patience=2 * PATIENCE
        )

    def _owners(self) -> list[str]:
        """Who is at a shard."""
        query = select(ShardRow.owner).where(ShardRow.status == "running")
        with self.place.context.catalog.reading() as session:
            return [str(owner) for owner in session.scalars(query)]

    def finish(self, job: str) -> None:
        """Wait until the job has succeeded."""

        def over() -> bool:
            try:
                status = self.place.job(job).status
            except SQLAlchemyError:
                return False
            assert status not in {"failed", "cancelled"}, self.place.job(job).error
            return status == "succeeded"

        wait_for(over, patience=2 * PATIENCE)

    def all_at_work_again(self) -> None:
        """Wait until each worker has been seen at a shard: one that heard of a job too late is given another job."""
        away = {worker.pid for worker in self.workers}
        deadline = time.monotonic() + 2 * PATIENCE
        while away:
            job = self.begin()
            while self.place.job(job).status in {"queued", "running"}:
                away -= {pid for pid in away for owner in self._owners() if f"-{pid}-" in owner}
                time.sleep(0.02)
            self.finish(job)
            self.forget(job)
            assert time.monotonic() < deadline, f"these do nothing any more: {away}"

    def start(self, rows: range) -> str:
        """Upload a pool of these rows and start its job, by the API."""
        pool = self.folder / f"pool-{rows.start}.jsonl"
        pool.write_text("".join(json.dumps(row) + "\n" for row in numbered(rows)))
        with self.service.client() as store:
            return self._begin(store, store.datasets.upload(pool).id)

    def status(self, job: str) -> str:
        """A job's status, as soon as the catalog answers."""
        while True:
            with suppress(SQLAlchemyError):
                return self.place.job(job).status
            time.sleep(0.1)

    def mend(self) -> None:
        """Have the doctor mend what it finds, beside the running team; unfinished work of this hour is left alone."""
        while True:
            with suppress(SQLAlchemyError):
                for finding in self.findings():
                    mended(finding)
                return
            time.sleep(0.1)

    def digests(self) -> dict[tuple[str, int], str]:
        """What the published chunks are, by segment and first row."""
        return self.published(self.place)

    @staticmethod
    def published(place: Workplace) -> dict[tuple[str, int], str]:
        """What the published chunks of a store are, by segment and first row."""
        with place.context.catalog.reading() as session:
            rows = session.scalars(select(ChunkRow).where(ChunkRow.published.is_(True)))
            return {(row.segment_id, row.start): row.digest for row in rows}

    def rows(self, job: str) -> int:
        """Rows that the job's feature sets have, each counted as often as it was committed."""
        with self.place.context.catalog.reading() as session:
            return session.scalar(
                select(func.sum(ChunkRow.stop - ChunkRow.start))
                .join(FeatureSegmentRow, FeatureSegmentRow.segment_id == ChunkRow.segment_id)
                .join(JobFeatureRow, JobFeatureRow.feature_set_id == FeatureSegmentRow.feature_set_id)
                .where(JobFeatureRow.job_id == job, ChunkRow.published.is_(True))
            ) or 0  # fmt: skip

    def findings(self, *, older_than: float = HOUR) -> list[Finding]:
        """What the doctor finds."""
        return list(examine(self.place.context, older_than=older_than, deep=True))

    def forget(self, job: str) -> None:
        """Delete the job and its features, so that they are computed anew."""
        self.place.context.features.remove(job)

    def forget_all(self) -> None:
        """Wait for what is at work, and delete all jobs of gradients and their features."""
        for job in self.place.context.jobs.page(kind="gradients", limit=100).data:
            self.finish(job.id)
            self.forget(job.id)

    def _stop_workers(self) -> None:
        for worker in self.workers:
            worker.stop()


def _over(url: str, wire: Wire | None) -> str:
    """The URL of a server as it is reached over a wire."""
    if wire is None:
        return url
    head, _, tail = url.rpartition(":")
    return f"{head}:{wire.port}/{tail.partition('/')[2]}"
