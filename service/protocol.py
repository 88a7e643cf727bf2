"""What is no HTTP is answered with a problem, too: uvicorn answers such bytes itself, before any application."""

from __future__ import annotations

import secrets

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service import problems

MAX_HEAD_BYTES = 1 << 20
"""Of a request's line and headers: a thousand names of 255 letters fit into a query."""


class Protocol(H11Protocol):
    """HTTP/1.1 by h11."""

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read, and close the connection."""
        id = secrets.token_hex(8)
        detail = (
            f"{msg} It is not HTTP/1.1, or its line and headers are longer than {MAX_HEAD_BYTES:,} bytes: "
            "ask in several requests"
        )
        answer = problems.respond(problems.unreadable(detail, request_id=id))
        headers = [*answer.raw_headers, (b"x-request-id", id.encode()), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=answer.status_code, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
