"""What many clients at once get from one service: answers, errors, latencies, and whether its memory grows.

    pip install locust
    python -m benchmarks.load --clients 200 --minutes 10

A store with a scored pool is made in a temporary folder; a service in a process of its own answers Locust's clients
(benchmarks/load_clients.py), each of which asks once a second: known selections, known scores, a job, small uploads
that are deleted again. Locust has processes of its own on the same machine, so a latency is the answer's and Locust's.
Ends with status 1 where an answer was 500 or more, or where memory grew by more than `MOST_GROWTH` after the first
fifth of the time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from benchmarks.sampling import sampled
from benchmarks.scoring import Pool
from tests.processes import ServiceProcess

CLIENTS = Path(__file__).with_name("load_clients.py")
MOST_GROWTH = 0.05
SETTLED = 0.2
"""Part of the time after which memory is expected to be what it stays."""


@dataclass(frozen=True)
class Answers:
    """What Locust saw of one kind of request."""

    name: str
    count: int
    failures: int
    median: float
    """Milliseconds."""
    p99: float
    """Milliseconds."""


def resident(pid: int) -> int:
    """A process's resident memory, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(seen: list[tuple[float, int]]) -> float:
    """By how much of itself memory grew: the mean of the last fifth to that of the first one after it settled."""
    numbers = [size for _, size in seen[int(len(seen) * SETTLED) :]]
    part = max(1, len(numbers) // 5)
    first, last = numbers[:part], numbers[-part:]
    return (sum(last) / len(last)) / (sum(first) / len(first)) - 1


def ask(url: str, *, job: str, clients: int, seconds: int, folder: Path) -> list[Answers]:
    """Have Locust's clients ask."""
    command = [
        sys.executable,
        "-m",
        "locust",
        "--headless",
        "--locustfile",
        str(CLIENTS),
        "--host",
        url,
        "--csv",
        "load",
    ]
    command += ["--users", str(clients), "--spawn-rate", str(max(1, clients // 10)), "--run-time", f"{seconds}s"]
    environment = {**os.environ, "LOAD_JOB": job}
    done = subprocess.run(
        [*command, "--exit-code-on-error", "0", "--only-summary"], cwd=folder, env=environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    with (folder / "load_stats.csv").open() as table:
        return [
            Answers(
                row["Name"], int(row["Request Count"]), int(row["Failure Count"]), float(row["50%"]), float(row["99%"])
            )
            for row in csv.DictReader(table)
        ]


def waiting_job(http: httpx.Client) -> str:
    """A job that waits, since there is no worker."""
    body = {"dataset": "pool", "run": "warm-up", "dims": [256], "max_length": 32}
    answer = http.post("/gradients", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--json", type=Path, default=None, help="write what was measured there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = Pool(folder, options.rows, options.dim, "int8")
        data = pool.store.settings.data
        with (
            ServiceProcess(data, "--no-worker", allow=data) as server,
            httpx.Client(base_url=server.url, timeout=120) as http,
        ):
            known = http.get("/select", params={"task": "mmlu", "dataset": "pool", "pct": 0.05})
            assert known.status_code == 200, known.text
            job = waiting_job(http)
            with sampled(partial(resident, server.pid), every=1) as seen:
                answers = ask(
                    server.url, job=job, clients=options.clients, seconds=round(60 * options.minutes), folder=folder
                )
    print(f"{options.clients} clients, {options.minutes:g} minutes, {options.rows:,} rows × {options.dim:,}\n")
    print("| request | answers | failures | median, ms | p99, ms |\n|---|---|---|---|---|")
    for one in answers:
        print(f"| {one.name} | {one.count:,} | {one.failures} | {one.median:.0f} | {one.p99:.0f} |")
    grown = growth(seen)
    print(f"\nresident memory: {seen[0][1] / 1e6:.0f} MB at first, {seen[-1][1] / 1e6:.0f} MB at the end, {grown:+.1%}")
    if options.json is not None:
        found = [vars(one) for one in answers]
        options.json.write_text(json.dumps({"answers": found, "growth": grown, "memory": seen}, indent=1))
    if any(one.failures for one in answers) or grown > MOST_GROWTH:
        sys.exit(1)


if __name__ == "__main__":
    main()
