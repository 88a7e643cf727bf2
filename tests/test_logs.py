"""The log of a process: one line an event, whoever writes it, marked with the request and the job it belongs to."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from datastore import logs
from datastore.origin import request_id
from tests.processes import ServiceProcess, wait_for
from tests.services import RedisServer
from tests.serving import jsonl
from tests.tiny import save_tiny_model

CONFIGURE, IMPORT = "from datastore import logs; logs.configure()", "import huggingface_hub.utils.logging as hub"


@pytest.mark.parametrize("order", [(CONFIGURE, IMPORT), (IMPORT, CONFIGURE)], ids=["before", "after"])
def test_a_line_of_the_hubs_library_is_written_once(order: tuple[str, str]) -> None:
    program = "\n".join([*order, "hub.get_logger('huggingface_hub.file_download').warning('slow')"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    [line] = done.stderr.splitlines()
    assert line.endswith(" WARNING huggingface_hub.file_download: slow")


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A function that gives what was logged since it was last called, in the format that is asked for."""
    format: logs.Format = request.param
    written: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    handler = Kept()
    handler.setFormatter(logs.FORMATTERS[format]())
    logger = logging.getLogger("tests.logs")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def taken() -> list[str]:
        found = list(written)
        written.clear()
        return found

    yield taken
    logger.removeHandler(handler)
    logger.propagate = True


log = logging.getLogger("tests.logs")


@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_a_line_of_json_has_everything_that_is_known_and_stays_one_line(lines: Any) -> None:
    error = ValueError("two\nlines")
    log.error("it %s", "failed", exc_info=error, extra={"job": "ft_1", "seconds": 0.5, "path": Path("/a b")})
    [line] = lines()
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("Z")
    assert found.pop("traceback").endswith("ValueError: two\nlines")
    known = {"job": "ft_1", "seconds": 0.5, "path": "/a b"}
    assert found == {"level": "ERROR", "logger": "tests.logs", "message": "it failed", **known}


@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_lines_are_marked_with_what_is_worked_on_in_their_own_thread_only(lines: Any) -> None:
    def other() -> None:
        log.info("beside")

    token = request_id.set("req-1")
    with logs.about({"job": "ft_1", "shard": 3}):
        log.info("inside", extra={"shard": 4})
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    log.info("after")
    request_id.reset(token)
    log.info("outside")
    inside, beside, after, outside = (json.loads(line) for line in lines())
    assert (inside["request"], inside["job"], inside["shard"]) == ("req-1", "ft_1", 4)
    assert (after["request"], "job" in after) == ("req-1", False)
    assert not {"request", "job"} & (beside.keys() | outside.keys())


@pytest.mark.parametrize("lines", ["text"], indirect=True)
def test_a_line_of_text_has_the_same_behind_its_message(lines: Any) -> None:
    with logs.about({"job": "ft_1"}):
        log.info("done", extra={"reason": "no room", "seconds": 0.5})
    [line] = lines()
    assert line.endswith('Z INFO tests.logs: done job=ft_1 reason="no room" seconds=0.5')


@pytest.mark.services
@pytest.mark.slow
def test_one_search_for_a_requests_id_finds_the_api_the_message_and_the_worker(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """Three programs: `gradstore serve`, its worker, and redis between them."""
    model = save_tiny_model(tmp_path / "model")
    settings = {"log_format": "json", "broker": redis_server.url}
    with ServiceProcess(tmp_path / "store", allow=tmp_path, **settings) as service:
        with httpx.Client(base_url=service.url, headers={"X-Request-ID": "look-for-me"}) as http:
            pool = http.post("/datasets", files={"file": ("pool.jsonl", jsonl(4))}).json()["id"]
            wanted = {"dataset": pool, "model": str(model), "epochs": 1, "max_length": 32}
            job = http.post("/finetunes", json=wanted).raise_for_status().json()["id"]
        with service.client() as store:
            store.finetunes.wait(job, timeout=120)
        wait_for(lambda: all(text in service.log for text in ("shard succeeded", "ring heard")))
        lines = service.log.splitlines()
    found = [json.loads(line) for line in lines if "look-for-me" in line]
    told = {(line["logger"].partition(".")[0], line["message"]) for line in found}
    assert told >= {
        ("service", "request"), ("worker", "ring heard"), ("worker", "shard started"), ("worker", "shard succeeded"),
    }  # fmt: skip
    assert {line["job"] for line in found if line["message"].startswith("shard")} == {job}
    plain = [line for line in lines if not line.startswith("{")]
    assert len(plain) == 2, "where it is ready, and where its dashboard is, is said to people"


@pytest.mark.parametrize("code", [0x00, 0x0A, 0x0D, 0x1B, 0x7F, 0x9B], ids=hex)
def test_what_a_request_names_reaches_no_terminal_as_a_command(code: int) -> None:
    name = f"a{chr(code)}[31mred"
    error = LookupError(f"no dataset is called {name}")
    record = logging.LogRecord("service", logging.INFO, __file__, 1, "%s", (name,), (LookupError, error, None))
    record.path = f"/datasets/{name}"
    line = logs.TextFormatter().format(record)
    assert not set(line) & {chr(code)} - {"\n"}
    assert 'path="/datasets/a\\' in line
