"""What can be configured, from the environment (`GRADSTORE_…`) and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Read once when a process starts, and passed on; docs/deployment.md lists every variable."""

    model_config = SettingsConfigDict(env_prefix="GRADSTORE_", frozen=True)

    data: Path = Path("gradstore-data")
    """Folder of the store: datasets, tasks, checkpoints, features, scores and the SQLite catalog."""
    catalog: str = ""
    """SQLAlchemy URL of the catalog; empty: SQLite inside the data folder."""
    broker: str = ""
    """Redis URL of the Celery broker; empty: workers poll the catalog."""
    host: str = "127.0.0.1"
    """Address the API listens on; anything but loopback needs `api_key`."""
    port: int = Field(8000, ge=0, le=65535)
    """Port the API listens on; 0 takes a free one."""
    api_key: SecretStr | None = None
    """Key that every request must carry as `Authorization: Bearer …`."""
    allowed_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders (separated by `:`) inside which models, tasks and checkpoints may be named by path."""
    embedded_worker: bool = True
    """Whether `gradstore serve` starts a worker of its own."""
    max_upload_bytes: int = Field(64 * 2**30, ge=1)
    """Largest upload, in bytes, before decompression."""
    select_wait: float = Field(30.0, ge=0)
    """Seconds that GET /select and GET /scores wait for scores before they answer 202."""
    poll_interval: float = Field(0.2, gt=0)
    """Seconds between two looks of an idle worker into the catalog."""
    lease: float = Field(30.0, gt=0)
    """Seconds after which a shard whose worker stopped its heartbeat is given to another."""
    max_attempts: int = Field(3, ge=1)
    """Times a shard is tried before its job fails."""
    shard_rows: int = Field(1024, ge=1024, multiple_of=1024)
    """Rows of a shard: a whole number of 1,024-row chunks."""
    features_url: str = ""
    """Bucket with features (`s3://bucket/prefix`) that are read where the data folder has none; the `AWS_…` variables
    hold its keys."""
    features_cache_bytes: int = Field(64 * 2**30, ge=0)
    """Most bytes of the cache of what was read from the bucket, in the data folder."""
    device: str = "auto"
    """Device of a worker: `auto`, `cpu`, `cuda` or `cuda:0`; `all`, or several with commas: a worker for each;
    `spread`: one worker, whose models lie over all GPUs."""
    processes: int = Field(1, ge=1)
    """Workers for each device, on one machine."""
    threads: int = Field(0, ge=0)
    """CPU threads of a worker; 0: its part of the cores."""

    @field_validator("allowed_roots", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(Path(part) for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @property
    def catalog_url(self) -> str:
        """The catalog's SQLAlchemy URL."""
        return self.catalog or f"sqlite:///{(self.data / 'catalog.sqlite3').absolute()}"

    @property
    def datasets(self) -> Path:
        """Folder of the datasets' rows and uploads."""
        return self.data / "datasets"

    @property
    def tasks(self) -> Path:
        """Folder of the tasks' rows."""
        return self.data / "tasks"

    @property
    def checkpoints(self) -> Path:
        """Folder of adapters and moments."""
        return self.data / "checkpoints"

    @property
    def features(self) -> Path:
        """Folder of the Zarr groups."""
        return self.data / "features"

    @property
    def features_cache(self) -> Path:
        """Folder of what was read from the bucket."""
        return self.data / "features-cache"

    @property
    def scores(self) -> Path:
        """Folder of cached scores."""
        return self.data / "scores"

    @property
    def indexes(self) -> Path:
        """Folder of the indexes that attributions search."""
        return self.data / "indexes"

    @property
    def questions(self) -> Path:
        """Folder of the features of attributions' questions."""
        return self.data / "questions"

    @property
    def ngrams(self) -> Path:
        """The runs of words of tasks' rows, for finding them in a pool."""
        return self.data / "ngrams"

    @property
    def selections(self) -> Path:
        """Folder of the selections' rows."""
        return self.data / "selections"

    @property
    def trainings(self) -> Path:
        """Folder of what the trainings of validations came to."""
        return self.data / "trainings"

    @property
    def imports(self) -> Path:
        """Folder of uploaded features that are not imported yet."""
        return self.data / "imports"

    @property
    def work(self) -> Path:
        """Folder of unfinished fine-tunes, resumed by their next attempt."""
        return self.data / "work"
