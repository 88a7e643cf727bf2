"""A chat endpoint on a socket, whose replies a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


def chat(text: object) -> Answer:
    """An answer of the chat API that says a text."""
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def failing(status: int, **headers: str) -> Answer:
    """An answer that is none."""
    return status, headers, b"no"


@dataclass
class Endpoint:
    """A chat endpoint that is at work, and what it was asked."""

    answer: Callable[[str], Answer]
    """What to answer to the text of the last message."""
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def questions(self) -> list[str]:
        """What the last message of each request said behind the list of capabilities."""
        return [body["messages"][-1]["content"].partition("\n\nRequest:\n")[2] for body in self.asked]


@contextmanager
def endpoint(answer: Callable[[str], Answer]) -> Iterator[Endpoint]:
    """An endpoint on a free port of this machine."""
    made = Endpoint(answer)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                made.asked.append(body)
                made.headers.append({name.lower(): value for name, value in self.headers.items()})
                made.paths.append(self.path)
                status, headers, content = made.answer(body["messages"][-1]["content"])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
