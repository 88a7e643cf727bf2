"""What can be configured, from the environment (`GRADSTORE_…`) and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Read once when a process starts, and passed on; docs/deployment.md lists every variable."""

    model_config = SettingsConfigDict(env_prefix="GRADSTORE_", frozen=True, hide_input_in_errors=True)

    data: Path = Path("gradstore-data")
    """Folder of the store: datasets, tasks, checkpoints, features, scores and the SQLite catalog."""
    catalog: str = Field("", repr=False)
    """SQLAlchemy URL of the catalog; empty: SQLite inside the data folder."""
    broker: str = Field("", repr=False)
    """Redis URL of the Celery broker; empty: workers poll the catalog."""
    host: str = "127.0.0.1"
    """Address the API listens on; anything but loopback needs `api_key`."""
    port: int = Field(8000, ge=0, le=65535)
    """Port the API listens on; 0 takes a free one."""
    api_key: SecretStr | None = None
    """Key that permits everything, beside those of `gradstore keys`; requests carry it as `Authorization: Bearer …`."""
    requests_per_minute: int = Field(6000, ge=1)
    """Requests a minute of a key of `gradstore keys` that was made without a limit of its own."""
    audit_days: int = Field(365, ge=1)
    """Days that an entry of the audit log is kept."""
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
    store: str = Field("", pattern=r"^(s3://[^/]+(/.*)?)?$")
    """Bucket of the store (`s3://bucket/prefix`), of which the data folder is a cache; the `AWS_…` variables hold its
    keys. Empty: the data folder is the store."""
    cache_bytes: int = Field(64 * 2**30, ge=0)
    """Most bytes that the data folder keeps of what lies in the bucket: half of them chunks of features."""
    device: str = "auto"
    """Device of a worker: `auto`, `cpu`, `cuda` or `cuda:0`; `all`, or several with commas: a worker for each;
    `spread`: one worker, whose models lie over all GPUs."""
    concurrency: int = Field(1, ge=1)
    """Workers for each device, on one machine."""
    metrics_listen: str = ""
    """Address and port (`127.0.0.1:9100`) where a worker shows its metrics to Prometheus; empty: nowhere."""
    otlp_endpoint: str = ""
    """Address of an OpenTelemetry collector (`http://host:4318/v1/traces`) that spans are sent to; empty: none are."""
    log_format: Literal["text", "json"] = "text"
    """How the log's lines are written: `text` for people, `json` for programs."""
    threads: int = Field(0, ge=0)
    """CPU threads of a worker; 0: its part of the cores."""
    labellers: Annotated[tuple[str, ...], NoDecode] = ()
    """Base URLs (with commas) of OpenAI-compatible APIs that annotations may ask, such as `https://host/v1`: no other
    address is called. Of the service and its workers."""
    labeller_keys: SecretStr | None = Field(None, repr=False)
    """Their API keys (with commas, in the same order; nothing for one without), each sent to its own URL only."""

    @field_validator("allowed_roots", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(Path(part) for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @field_validator("labellers", mode="before")
    @classmethod
    def _urls(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(part.strip().rstrip("/") for part in parts if part.strip())

    @field_validator("labellers")
    @classmethod
    def _web_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            parts = urlsplit(url)
            if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.query:
                raise ValueError(
                    "each is an address such as https://host/v1, without a user, a password and a query: keys go into "
                    "GRADSTORE_LABELLER_KEYS"
                )
        return value

    @field_validator("api_key", "labeller_keys")
    @classmethod
    def _not_empty(cls, value: SecretStr | None) -> SecretStr | None:
        """An empty key is none: it would let in whoever sends an empty one."""
        return value or None

    @field_validator("metrics_listen")
    @classmethod
    def _an_address(cls, value: str) -> str:
        _, separator, port = value.rpartition(":")
        if value and not (separator and port.isdecimal() and int(port) <= 65535):
            raise ValueError(f"{value!r} is no address and port, such as 127.0.0.1:9100")
        return value

    @field_validator("labeller_keys")
    @classmethod
    def _a_key_each(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().split(",")) > len(info.data.get("labellers", ())):
            raise ValueError("there are more keys than GRADSTORE_LABELLERS; they stand in the same order")
        return value

    def labeller_key(self, url: str) -> str | None:
        """The API key that a labeller of this URL, one of `labellers`, is asked with."""
        keys = dict(zip(self.labellers, self._keys_of_labellers(), strict=False))
        return keys.get(url) or None

    def _keys_of_labellers(self) -> list[str]:
        if self.labeller_keys is None:
            return []
        return [key.strip() for key in self.labeller_keys.get_secret_value().split(",")]

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
    def estimates(self) -> Path:
        """Folder of the arrays that were estimated."""
        return self.data / "estimates"

    @property
    def trainings(self) -> Path:
        """Folder of what the trainings of validations came to."""
        return self.data / "trainings"

    @property
    def adapter_scores(self) -> Path:
        """Folder of what adapters make of the shots of tasks."""
        return self.data / "adapter-scores"

    @property
    def matrices(self) -> Path:
        """Folder of the rows of streams and of uploaded labels."""
        return self.data / "matrices"

    @property
    def projectors(self) -> Path:
        """Folder of trained projectors."""
        return self.data / "projectors"

    @property
    def imports(self) -> Path:
        """Folder of uploaded features that are not imported yet."""
        return self.data / "imports"

    @property
    def work(self) -> Path:
        """Folder of unfinished fine-tunes, resumed by their next attempt."""
        return self.data / "work"
