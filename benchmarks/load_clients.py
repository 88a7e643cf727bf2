"""What a client of the load test does (benchmarks/load.py); read by Locust, not imported."""

from __future__ import annotations

import json
import os
from uuid import uuid4

from locust import FastHttpUser, constant_throughput, task

JOB = os.environ["LOAD_JOB"]
QUERY = "task=mmlu&dataset=pool&pct=0.05"
UPLOADED_ROWS = 50


class Client(FastHttpUser):
    """Asks once a second: mostly what is known, now and then something new."""

    wait_time = constant_throughput(1)

    @task(40)
    def select(self) -> None:
        """A selection that is known."""
        self.client.get(f"/select?{QUERY}", name="GET /select, known")

    @task(20)
    def scores(self) -> None:
        """A page of scores that are known."""
        self.client.get("/scores?task=mmlu&dataset=pool&limit=100&after=500", name="GET /scores, known")

    @task(35)
    def job(self) -> None:
        """A look at a job that waits."""
        self.client.get(f"/jobs/{JOB}", name="GET /jobs/{id}")

    @task(5)
    def upload(self) -> None:
        """A small dataset that nobody has sent before, and its deletion."""
        mark = uuid4().hex
        rows = [{"prompt": f"{mark} {number}", "completion": "yes"} for number in range(UPLOADED_ROWS)]
        content = "".join(json.dumps(row) + "\n" for row in rows)
        body = (
            f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n{content}\r\n'
            f"--{mark}--\r\n"
        )
        headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        answer = self.client.post("/datasets", data=body, headers=headers, name="POST /datasets")
        if answer.status_code == 201:
            self.client.delete(f"/datasets/{answer.json()['id']}", name="DELETE /datasets/{id}")
