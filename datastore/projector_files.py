"""Trained projectors, a folder each under the job's id, which names all that they were made from.

    <root>/proj_…/projector.safetensors   the network (`space.…`) and what rows are standardised with (`standard.…`)
                  manifest.json           dims, config, seed, capabilities and streams; how the training went; the
                                          SHA-256 of the other file

Both are there or neither, and never changed: a training that is repeated finds the first one's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from datastore.depot import LOCAL, Depot
from datastore.durable import unfinished, write_file
from datastore.errors import Damaged
from datastore.identity import sha256_of
from datastore.kept_folders import KeptFolders

WEIGHTS = "projector.safetensors"
MANIFEST = "manifest.json"


class ProjectorFiles(KeptFolders):
    """The projectors under one folder: originals, see `KeptFolders`."""

    def __init__(self, root: Path, *, depot: Depot = LOCAL) -> None:
        super().__init__(root, pattern="proj_*", depot=depot)

    def keep(self, id: str, manifest: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Keep a projector whose network `write` puts into a file; where there is one already, that one stays."""
        with unfinished(self._unfinished, id) as partial:
            write(partial / WEIGHTS)
            content = {**manifest, "sha256": sha256_of(partial / WEIGHTS)}
            write_file(partial / MANIFEST, json.dumps(content, allow_nan=False).encode())
            self._depot.keep(partial, self.root / id)

    def manifest(self, id: str) -> dict[str, Any]:
        """What is known of a projector. Raises `Damaged` where it is missing or cannot be read."""
        self._depot.ensure(self.root / id)
        try:
            found: dict[str, Any] = json.loads((self.root / id / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise self._damaged(id, str(error)) from error
        return found

    def weights(self, id: str) -> Path:
        """The file with a projector's network, which is what was written. Raises `Damaged`."""
        path = self.root / id / WEIGHTS
        wanted = self.manifest(id).get("sha256")
        with suppress(FileNotFoundError):
            if sha256_of(path) == wanted:
                return path
        raise self._damaged(id, f"{WEIGHTS} is missing, or does not match its checksum")

    def _damaged(self, id: str, why: str) -> Damaged:
        return Damaged(f"the projector {id} cannot be read ({why}): delete it, and train it again")
