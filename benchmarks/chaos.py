"""Harm at random, for minutes: what is killed, stopped, cut off and damaged, and whether every job comes out right.

    python -m benchmarks.chaos --minutes 5 --seed 0

An API and two workers over PostgreSQL and Redis, each reached over a wire that can be cut, are harmed again and again
while a client uploads pools, starts jobs and reads what is done. In the end every job has to have succeeded, with the
chunks, byte for byte, that a store nobody disturbed has, and the doctor has to find nothing. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from gradstore.errors import GradstoreError
from gradstore.types import GradientsRequest
from rich.console import Console
from rich.table import Table

from datastore.findings import mended
from tests.faults import LEASE, Team, WorkerProcess
from tests.services import PostgresServer, RedisServer
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered

WORKERS = 2
POOL_ROWS = 1500  # two shards
PAUSE = 2.0  # seconds between two harms, on average
CALM = 300.0  # seconds that the team has to finish in when the harm is over


class Chaos:
    """A team, harmed with dice."""

    def __init__(self, team: Team, seed: int) -> None:
        self.team, self.random = team, random.Random(seed)  # noqa: S311 - a game of dice
        self.done: Counter[str] = Counter()
        self.refused = 0
        self.jobs: dict[str, range] = {}
        """Every job that was started, and which rows it is of."""

    # Harm ---------------------------------------------------------------------------------------------------------

    def kill_a_worker(self) -> None:
        """And hire another."""
        worker = self._worker()
        worker.kill()
        self._replace(worker)

    def stall_a_worker(self) -> None:
        """Until its lease has run out."""
        worker = self._worker()
        worker.signal(signal.SIGSTOP)
        time.sleep(LEASE + 1)
        worker.signal(signal.SIGCONT)

    def kill_the_api(self) -> None:
        """And start it again."""
        self.team.service.kill()
        self.team.service.start()

    def kill_redis(self) -> None:
        """And start it again, with its data or without."""
        assert self.team.redis is not None
        self.team.redis.kill()
        if self.random.random() < 0.5:
            self.team.redis.forget()
        self.team.redis.start()

    def kill_postgres(self) -> None:
        """And start it again, after a while."""
        assert self.team.postgres is not None
        self.team.postgres.kill()
        time.sleep(self.random.uniform(0, LEASE + 1))
        self.team.postgres.start()

    def harm_a_wire(self) -> None:
        """Cut it, or have it lose everything in silence, for a while that may be longer than a lease."""
        wire = self.random.choice([self.team.to_postgres, self.team.to_redis])
        assert wire is not None
        self.random.choice([wire.cut, wire.swallow])()
        time.sleep(self.random.uniform(0.5, LEASE + 2))
        wire.heal()

    def damage_a_chunk(self) -> None:
        """Turn a bit of a published chunk over or cut it, and have the doctor mend it beside the running service."""
        chunks = sorted(self.team.place.context.settings.features.glob("seg_*/data.zarr/features/c.*"))
        if not chunks:
            return
        path = self.random.choice(chunks)
        try:
            content = bytearray(path.read_bytes())
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            path.write_bytes(content[: self.random.choice([len(content), len(content) // 2])])
        except FileNotFoundError:
            return
        self.team.mend()

    def harms(self) -> list[Callable[[], None]]:
        """All kinds."""
        return [
            self.kill_a_worker, self.stall_a_worker, self.kill_the_api, self.kill_redis, self.kill_postgres,
            self.harm_a_wire, self.damage_a_chunk,
        ]  # fmt: skip

    # Running ------------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Do harm for so long, while jobs are started; each kind of harm is done once before one is done again."""
        over = threading.Event()
        client = threading.Thread(target=self._use, args=(over,), name="client")
        client.start()
        until, bag = time.monotonic() + seconds, list[Callable[[], None]]()
        try:
            while time.monotonic() < until:
                bag = bag or self.random.sample(self.harms(), k=len(self.harms()))
                harm = bag.pop()
                harm()
                self.done[harm.__name__.replace("_", " ")] += 1
                time.sleep(self.random.uniform(0, 2 * PAUSE))
        finally:
            over.set()
            client.join()

    def settle(self) -> list[str]:
        """Wait for every job, and return those that have not succeeded."""
        self.team.mend()
        until = time.monotonic() + CALM
        while time.monotonic() < until and self._open():
            time.sleep(0.5)
        return self._open()

    def _use(self, over: threading.Event) -> None:
        """Upload pools and start their jobs until it is over; what is refused meanwhile is asked for again."""
        first = 0
        while not over.is_set():
            rows = range(first, first + POOL_ROWS)
            try:
                self.jobs[self.team.start(rows)] = rows
            except (GradstoreError, AssertionError):
                self.refused += 1
                over.wait(0.5)
            else:
                first += POOL_ROWS
                while self._at_work() > 1 and not over.is_set():
                    over.wait(0.5)

    def _at_work(self) -> int:
        return len(self._open())

    def _open(self) -> list[str]:
        return [job for job in list(self.jobs) if self.team.status(job) != "succeeded"]

    def _worker(self) -> WorkerProcess:
        return self.random.choice(self.team.workers)

    def _replace(self, worker: WorkerProcess) -> None:
        self.team.workers.remove(worker)
        self.team.hire(far=self.random.random() < 0.5)


def undisturbed(folder: Path, model: Path, pools: list[range]) -> dict[tuple[str, int], str]:
    """The chunks of the same jobs in a store of their own, computed by one worker in this process."""
    place = Workplace.at(folder, model=model)
    checkpoint = place.checkpoint().id
    for rows in pools:
        dataset = place.pool(numbered(rows)).id
        place.start(
            GradientsRequest(dataset=dataset, checkpoints=[checkpoint], dims=[32], kinds=["sgd"], token_budget=2048)
        )
    place.work()
    found = Team.published(place)
    place.context.catalog.close()
    return found


def chaos(folder: Path, *, seconds: float, seed: int) -> bool:
    """Do it, print what was done and what came of it, and say whether all is right."""
    model = save_tiny_model(folder / "model", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    with ExitStack() as stack:
        postgres = stack.enter_context(PostgresServer())
        redis = stack.enter_context(RedisServer(folder / "redis"))
        team = stack.enter_context(Team(folder / "team", model=model, postgres=postgres, redis=redis))
        team.ready(*(team.hire(far=far) for far in (False, *[True] * (WORKERS - 1))))
        game = Chaos(team, seed)
        game.run(seconds)
        began = time.monotonic()
        open_jobs = game.settle()
        recovered = time.monotonic() - began
        chunks, findings = team.digests(), [mended(each) for each in team.findings(older_than=3600)]
        rows = sum(team.rows(job) for job in game.jobs)
    wanted = undisturbed(folder / "undisturbed", model, list(game.jobs.values()))
    expected = POOL_ROWS * len(game.jobs)
    table = Table("what", "how often", title=f"chaos, seed {seed}, {seconds:.0f} s")
    for harm, times in sorted(game.done.items()):
        table.add_row(harm, str(times))
    table.add_section()
    table.add_row("requests refused meanwhile, and sent again", str(game.refused))
    table.add_row("jobs started, not succeeded", f"{len(game.jobs)}, {len(open_jobs)}")
    table.add_row("rows expected, found", f"{expected:,}, {rows:,}")
    table.add_row(
        "chunks as undisturbed, other or missing", f"{_same(chunks, wanted)}, {len(wanted) - _same(chunks, wanted)}"
    )
    table.add_row("left for the doctor", str(len(findings)))
    table.add_row("seconds from the last harm to the last job", f"{recovered:.0f}")
    Console(width=120).print(table)
    for finding in findings:
        print(finding.kind, finding.place, finding.detail)
    return not open_jobs and rows == expected and chunks == wanted and not findings and bool(game.jobs)


def _same(chunks: dict[tuple[str, int], str], wanted: dict[tuple[str, int], str]) -> int:
    return sum(chunks.get(key) == digest for key, digest in wanted.items())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        sys.exit(0 if chaos(Path(folder), seconds=60 * given.minutes, seed=given.seed) else 1)


if __name__ == "__main__":
    main()
