"""The dashboard: pages for a browser, static files that ask the same API as everybody.

They are read once, when the app is made, and sent with entity tags. They hold no data, so they are open to whoever
reaches the server; what they ask for needs the key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated

from fastapi import Depends, Request, Response
from fastapi.responses import RedirectResponse

from datastore.errors import NotFound
from service.routing import Router

FOLDER = Path(__file__).resolve().parent.parent / "dashboard"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""Scripts, styles and answers from this server only, nothing inline, and no text that becomes HTML."""

router = Router(tag="dashboard")


class Files:
    """The dashboard's files by name, with their entity tags."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._contents = dict(_read(folder))
        self._tags = {name: hashlib.sha256(content).hexdigest()[:32] for name, content in self._contents.items()}

    def answer(self, name: str) -> Response:
        """A file. Raises `NotFound`."""
        if name not in self._contents:
            raise NotFound("page", name, collection="/dashboard/")
        headers = {"ETag": f'"{self._tags[name]}"', "Content-Security-Policy": POLICY}
        return Response(self._contents[name], media_type=MEDIA_TYPES[PurePosixPath(name).suffix], headers=headers)


def _read(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in MEDIA_TYPES:
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def _files(request: Request) -> Files:
    files: Files = request.app.state.dashboard
    return files


FilesDep = Annotated[Files, Depends(_files)]


@router.get("/", include_in_schema=False)
def to_dashboard() -> Response:
    """Where a browser is sent that knows the server's address only; relative, since a proxy may serve below a path."""
    return RedirectResponse("dashboard/")


@router.get("/dashboard", include_in_schema=False)
def to_its_folder() -> Response:
    """The address without its slash, from which the pages' own addresses would lead elsewhere."""
    return RedirectResponse("dashboard/")


@router.get("/dashboard/", include_in_schema=False)
def index(files: FilesDep) -> Response:
    """The page that all pages are on."""
    return files.answer("index.html")


@router.get("/dashboard/{name:path}", include_in_schema=False)
def file(name: str, files: FilesDep) -> Response:
    """A script, a style sheet or a picture of the dashboard."""
    return files.answer(name)
