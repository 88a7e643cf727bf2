"""What a worker has opened: the parts of the store, the models in memory, and whether it has been asked to leave."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Self

import torch

from datastore.catalog import Catalog
from datastore.settings import Settings
from datastore.store import OpenStore, open_store
from datastore.turns import Turns
from worker.budgets import Budgets
from worker.loaded import Loaded
from worker.reading import Ahead


def worker_name() -> str:
    """A name that tells host and process, and that no other worker has or had."""
    return f"{socket.gethostname()}-{os.getpid()}-{token_hex(3)}"


@dataclass(frozen=True)
class Context(OpenStore):
    """Everything a shard may need."""

    loaded: Loaded
    budgets: Budgets = field(default_factory=Budgets)
    ahead: Ahead = field(default_factory=Ahead)
    turns: Turns = field(default_factory=Turns)
    owner: str = field(default_factory=worker_name)
    leaving: threading.Event = field(default_factory=threading.Event)
    """Set when the worker is asked to stop: the shard at hand is given back."""

    @classmethod
    def open(cls, settings: Settings, device: torch.device, *, spread: bool = False) -> Self:
        """Open the store and the catalog, whose schema is brought up to date; `spread`: models lie over all GPUs."""
        catalog = Catalog(settings.catalog_url)
        catalog.migrate()
        return cls(**vars(open_store(settings, catalog)), loaded=Loaded(device, spread=spread))

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.loaded.device
