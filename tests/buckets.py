"""A real S3 API server on a loopback port, with a bucket that outlives its being stopped and started again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx
import pytest
from moto.server import ThreadedMotoServer

from tests.services import free_port

NAME = "bucket"
URL = f"s3://{NAME}/some/prefix"


class Requests(logging.Handler):
    """The requests that the server was asked, as it logs them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of the server's log."""
        text = record.getMessage()
        if "/some/prefix/" in text or "prefix=some" in text:
            self.seen.append(text)


class BucketServer:
    """moto's server: what is in its bucket stays over `stop` and `start`."""

    def __init__(self) -> None:
        self._port = free_port()
        self._server: ThreadedMotoServer | None = None
        self.requests = Requests()

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables that lead a process here."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }  # fmt: skip

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, again on the same port."""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=True)
        self._server.start()

    def stop(self) -> None:
        """Answer nobody any more."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def empty(self) -> None:
        """Have an empty bucket."""
        self.remove()
        httpx.put(f"{self.url}/{NAME}").raise_for_status()
        self.requests.seen.clear()

    def remove(self) -> None:
        """Have no bucket."""
        httpx.post(f"{self.url}/moto-api/reset").raise_for_status()

    def __enter__(self) -> BucketServer:
        self.start()
        log = logging.getLogger("werkzeug")
        log.addHandler(self.requests)
        log.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("werkzeug").removeHandler(self.requests)
        self.stop()


@contextmanager
def leading_to(server: BucketServer) -> Iterator[None]:
    """Set this process's variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield
