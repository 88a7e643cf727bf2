"""`gradstore serve`: the API, and beside it a worker."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import typer
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from datastore import logs, tracing
from datastore.console import opened
from datastore.keys import Keys
from datastore.options import configured
from datastore.processes import KeptProcess, environment
from datastore.settings import Settings
from service.app import create_app
from service.dependencies import Backend
from service.door import is_loopback
from service.protocol import MAX_HEAD_BYTES, Protocol

DRAIN = 10  # seconds that requests at work have when the server is asked to stop


class Server(uvicorn.Server):
    """uvicorn with what has to happen when it is ready and when it is asked to stop."""

    def __init__(self, app: FastAPI, worker: KeptProcess | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=DRAIN,
            )
        )
        self.backend: Backend = app.state.backend
        self.worker = worker
        self.url = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, start the worker, and say so."""
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if self.worker is not None:
            self.worker.start()
        store = self.backend.settings.data.absolute()
        worker = "with a worker" if self.worker else "without a worker"
        typer.echo(f"gradstore is ready at {self.url} ({worker}; store: {store}). Ctrl-C stops it.", err=True)
        typer.echo(f"The dashboard is at {self.url}/dashboard/", err=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the streams end, then the connections, then the worker."""
        self.backend.stopping.set()
        try:
            await super().shutdown(sockets)
        finally:
            if self.worker is not None:
                self.worker.stop()


def serve(
    *,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on, else 127.0.0.1; beyond this machine it needs a key.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on, else 8000; 0 takes a free one.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the store, else gradstore-data.")] = None,
    allow: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="<path>",
            exists=True,
            file_okay=False,
            help="Folder whose models, tasks and checkpoints may be named; repeatable.",
        ),
    ] = None,
    worker: Annotated[bool | None, typer.Option("--worker/--no-worker", help="Start a worker beside the API.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Device of the worker: auto (the default), cpu, cuda:1, all, spread.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key every request must carry; better as a variable.")] = None,
) -> None:
    """Serve the API, and start a worker beside it. What is left out comes from the environment (GRADSTORE_…)."""
    settings = configured(
        host=host,
        port=port,
        data=data,
        allowed_roots=tuple(allow) if allow else None,
        embedded_worker=worker,
        device=device,
        api_key=SecretStr(api_key) if api_key else None,
    )
    _refuse_strangers(settings)
    logs.begin(settings)
    tracing.begin_process(settings.otlp_endpoint, part="api")
    _refuse_unusable(settings.data)
    worker_beside = _worker_beside(settings) if settings.embedded_worker else None
    with listen(settings) as listener, suppress(KeyboardInterrupt):
        Server(create_app(settings), worker_beside).run(sockets=[listener])


def _worker_beside(settings: Settings) -> KeptProcess:
    return KeptProcess("worker.command", name="embedded worker", environment=environment(settings))


def _refuse_strangers(settings: Settings) -> None:
    """Raise typer.BadParameter where the server would listen to a network and nobody had a key."""
    if settings.api_key is None and not is_loopback(settings.host) and not _has_keys(settings):
        raise typer.BadParameter(
            f"on {settings.host} the network reaches the store, and nobody has a key: make one with gradstore keys "
            "create, set GRADSTORE_API_KEY, or listen on 127.0.0.1"
        )


def _has_keys(settings: Settings) -> bool:
    """Whether the catalog has a key that lets requests in; one that is not there yet is not made for it."""
    if not settings.catalog and not settings.data.exists():
        return False
    with opened(settings) as catalog:
        return Keys(catalog).exist(usable=True)


def _refuse_unusable(data: Path) -> None:
    """Make the store's folder; exits with a reason where there cannot be one, or nothing can be written there."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=data):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        typer.echo(f"the store cannot be at {data.absolute()}: {reason}; name another folder with --data", err=True)
        sys.exit(1)


def listen(settings: Settings) -> socket.socket:
    """A listening socket; exits with a reason where there cannot be one.

    It says that it is TCP's, which `create_server` leaves open: asyncio turns Nagle's algorithm off for such sockets
    only, and with it on an answer of two parts waits 40 ms for the client's delayed acknowledgement.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        created = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        typer.echo(f"cannot listen on {settings.host} port {settings.port}: {reason}; try another --port", err=True)
        sys.exit(1)
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=created.detach())
