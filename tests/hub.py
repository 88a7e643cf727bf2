"""A Hugging Face Hub on loopback, as far as huggingface_hub asks one: the only stand-in among these tests.

`huggingface_hub` reads its variables once, when it is imported: `use` sets them for this process and those it starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

BASES = ("org/base", "org/other", "org/llama", "org/tiny")
"""Models that tests name and nobody loads."""


@dataclass
class Repository:
    """A model's files by commit, and what its branches point to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit that a branch or a commit is."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Refusal(Exception):
    """An answer without what was asked for."""

    status: int
    code: str


class Hub:
    """The hub: what is published on it, and whether it answers."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self._trouble: int | float | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._cache = tempfile.TemporaryDirectory(prefix="hub-cache-")
        for base in BASES:
            self.publish(base, {"config.json": b"{}"})

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def use(self) -> None:
        """Let this process and those it starts ask this hub, and keep downloads in a folder of its own."""
        os.environ |= {"HF_ENDPOINT": self.url, "HF_HOME": self._cache.name, "HF_HUB_DISABLE_XET": "1"}
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
            os.environ.pop(name, None)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._cache.cleanup()

    def publish(self, model: str, files: Path | dict[str, bytes], *, branch: str = "main", gated: bool = False) -> str:
        """Put files on a branch and return their commit."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in sorted(files.iterdir())}
        repository = self.repositories.setdefault(model, Repository())
        digest = hashlib.sha1(model.encode(), usedforsecurity=False)
        for name, content in files.items():
            digest.update(name.encode() + content)
        commit = digest.hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        repository.gated = gated
        return commit

    @contextmanager
    def answering(self, status: int) -> Iterator[None]:
        """Answer everything with a status; 0: close the connection instead."""
        self._trouble = status
        yield
        self._trouble = None

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Take so long for each answer."""
        self._trouble = seconds
        yield
        self._trouble = None

    def before(self) -> None:
        """Do what `answering` and `waiting` ask for. Raises `Refusal`."""
        if isinstance(self._trouble, float):
            time.sleep(self._trouble)
        elif self._trouble is not None:
            raise Refusal(self._trouble, "")

    def find(self, model: str, revision: str, *, token: str | None) -> tuple[str, dict[str, bytes]]:
        """Commit and files of a revision. Raises `Refusal`."""
        repository = self.repositories.get(model)
        if repository is None:
            raise Refusal(401, "RepoNotFound")  # the hub does not tell strangers what is private
        if repository.gated and token is None:
            raise Refusal(401, "GatedRepo")
        commit = repository.commit(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound")
        return commit, repository.commits[commit]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        try:
            self.hub.before()
            headers, body = self._api(path) if path.startswith("/api/") else self._file(path)
        except Refusal as refusal:
            if refusal.status == 0:
                self.connection.close()
                return
            self.send_response(refusal.status)
            self.send_header("X-Error-Code", refusal.code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _find(self, model: str, revision: str) -> tuple[str, dict[str, bytes]]:
        return self.hub.find(model, revision, token=self.headers.get("Authorization"))

    def _file(self, path: str) -> tuple[dict[str, str], bytes]:
        """GET or HEAD /org/name/resolve/revision/file."""
        model, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, name = map(unquote, rest.partition("/"))
        commit, files = self._find(model, revision)
        if name not in files:
            raise Refusal(404, "EntryNotFound")
        etag = hashlib.sha256(files[name]).hexdigest()
        return {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "none"}, files[name]

    def _api(self, path: str) -> tuple[dict[str, str], bytes]:
        """GET /api/models/org/name, …/revision/REVISION, …/tree/REVISION[/FOLDER]."""
        org, name, *rest = map(unquote, path.removeprefix("/api/models/").split("/"))
        what, revision, *folder = [*rest, "main"] if rest else ["revision", "main"]
        commit, files = self._find(f"{org}/{name}", revision)
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            answer: Any = {"id": f"{org}/{name}", "sha": commit, "siblings": siblings, "tags": []}
        elif what == "tree" and not folder:
            answer = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}
                for name, content in files.items()
            ]
        else:
            raise Refusal(404, "EntryNotFound")
        return {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""
