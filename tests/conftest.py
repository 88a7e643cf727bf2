"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.buckets import BucketServer, leading_to
from tests.hub import Hub
from tests.services import PostgresServer, RedisServer
from tests.serving import service, shared_service
from tests.stores import store

__all__ = ["service", "shared_service", "store"]

REPOSITORY = Path(__file__).resolve().parent.parent

THREADS = "1"  # of torch in this process: bits are promised for one number of threads, and tests run side by side
HUB = pytest.StashKey[Hub]()


def pytest_configure(config: pytest.Config) -> None:
    """Set the number of threads and put a hub in the real one's place, before torch and huggingface_hub come in."""
    os.environ["OMP_NUM_THREADS"] = THREADS  # torch reads it when it is imported
    config.stash[HUB] = Hub()
    config.stash[HUB].use()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Take it away."""
    config.stash[HUB].close()


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Hub:
    """The hub that every test asks; what one publishes there stays, under names of its own."""
    return request.config.stash[HUB]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of 16 hidden numbers in a folder of this machine."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "base", hidden_size=16, intermediate_size=16)


@pytest.fixture(scope="module")
def frozen() -> Iterator[None]:
    """As in a worker of its own: collections that free a training's memory need not look at all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real rows beside the repository; absent on other machines."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real data (../shared/data) is not beside the repository")
    return folder


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A redis-server of the test's own; skips with a reason where the program is missing."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture(scope="module")
def bucket_server() -> Iterator[BucketServer]:
    """An S3 API server of a module's own."""
    with BucketServer() as server:
        yield server


@pytest.fixture
def bucket(bucket_server: BucketServer) -> Iterator[BucketServer]:
    """An empty bucket, to which the variables of this process lead."""
    bucket_server.empty()
    with leading_to(bucket_server):
        yield bucket_server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server of the tests' own; skips with a reason where the programs are missing."""
    with PostgresServer() as server:
        yield server
