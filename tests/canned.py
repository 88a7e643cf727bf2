"""A real HTTP server on a socket that says what a test has written down, and remembers what it was asked."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def parts(self) -> dict[str, tuple[str | None, bytes]]:
        """The parts of a multipart body: name → (filename, content)."""
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message: Any = BytesParser().parsebytes(head + self.body)
        found: dict[str, tuple[str | None, bytes]] = {}
        for part in message.get_payload():
            name = part.get_param("name", header="content-disposition")
            found[name] = (part.get_filename(), part.get_payload(decode=True))
        return found


@dataclass(frozen=True)
class Said:
    """An answer; `json` or `body`. With `breaks_after` the connection ends after so many bytes of the body."""

    json: Any = None
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    breaks_after: int | None = None


Answerer = Callable[[Asked], Said]


class CannedServer:
    """Answers with `answerer` on a free port of this machine, in threads, until it is closed."""

    def __init__(self, answerer: Answerer, *, port: int = 0) -> None:
        self.asked: list[Asked] = []
        self._open: list[socket.socket] = []
        self.answerer = answerer
        canned = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                return None

            def _answer(self) -> None:
                canned._answer(self)

            do_GET = do_POST = do_PATCH = do_DELETE = _answer  # noqa: N815  # http.server's names

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def process_request(self, request: Any, client_address: Any) -> None:
                canned._open.append(request)
                super().process_request(request, client_address)

            def handle_error(self, *_: Any) -> None:
                return None  # clients that go away are part of the tests

        self._server = Server(("127.0.0.1", port), Handler)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop as a killed server does: connections that are kept alive end, too."""
        self._server.shutdown()
        self._thread.join()
        for connection in self._open:
            with suppress(OSError):  # ended already
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        address = urlsplit(handler.path)
        asked = Asked(
            handler.command,
            unquote(address.path),
            parse_qs(address.query),
            handler.headers,
            b"".join(_body(handler)),
        )
        self.asked.append(asked)
        said = self.answerer(asked)
        body = said.body if said.body is not None else b"" if said.json is None else json.dumps(said.json).encode()
        if said.breaks_after == 0:
            _break(handler)
            return
        handler.send_response(said.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **said.headers}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[: said.breaks_after])
        if said.breaks_after is not None:
            handler.wfile.flush()
            _break(handler)


def in_turn(*answers: Said) -> Answerer:
    """Give these answers one after the other, the last one for good."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def _break(handler: BaseHTTPRequestHandler) -> None:
    """End a connection in the midst of an answer."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def _body(handler: BaseHTTPRequestHandler) -> Iterable[bytes]:
    if handler.headers.get("Transfer-Encoding") == "chunked":
        while size := int(handler.rfile.readline(), 16):
            yield handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
    else:
        yield handler.rfile.read(int(handler.headers.get("Content-Length", 0)))


# Bodies -----------------------------------------------------------------------------------------------------------

NOW = "2026-01-02T03:04:05Z"


def dataset(name: str = "pool", **changes: Any) -> dict[str, Any]:
    return {
        "id": f"ds_{name}",
        "name": name,
        "rows": 3,
        "bytes": 30,
        "origins": {"a": 3},
        "prefix": None,
        "sources": [],
        "created_at": NOW,
        **changes,
    }


def uploaded(name: str = "pool", **changes: Any) -> dict[str, Any]:
    report = {"rows": 3, "skipped": 0, "problems": [], "notes": [], "total_notes": 0}
    return {**dataset(name), "created": True, "report": report, **changes}


def task(name: str = "mmlu", **changes: Any) -> dict[str, Any]:
    return {
        "id": f"task_{name}",
        "name": name,
        "kind": "mmlu",
        "validation": 5,
        "test": 10,
        "subtasks": [{"name": "anatomy", "validation": 5, "test": 10, "metric": "choice"}],
        "notes": [],
        "created_at": NOW,
        **changes,
    }


def job(status: str, *, kind: str = "finetune", result: Any = None, **changes: Any) -> dict[str, Any]:
    """A job of any kind; a succeeded one has a result."""
    prefix = {
        "finetune": "ft",
        "gradients": "grad",
        "conversion": "conv",
        "evaluation": "eval",
        "scoring": "score",
        "validation": "val",
        "attribution": "attr",
        "comparison": "cmp",
    }[kind]
    request = {
        "finetune": {"dataset": "ds_pool", "model": "tiny"},
        "gradients": {"dataset": "ds_pool", "run": "run_1"},
        "conversion": {"dataset": "ds_pool", "dtype": "int8"},
        "evaluation": {"finetune": "ft_1", "tasks": ["mmlu"]},
        "scoring": {"recipe": {}},
        "validation": {"dataset": "ds_pool", "task": "mmlu", "model": "tiny"},
        "attribution": {"rows": [{"prompt": "Who?", "completion": "He."}], "k": 1},
        "comparison": {"dataset": "ds_pool", "tasks": ["mmlu"], "k": 2, "train": True, "model": "tiny"},
    }[kind]
    done = {"queued": 0, "running": 4}.get(status, 10)
    return {
        "id": f"{prefix}_1",
        "kind": kind,
        "name": None,
        "status": status,
        "progress": {"done": done, "total": 10, "unit": "steps", "rate": 2.0, "eta_seconds": 3.0},
        "created_at": NOW,
        "started_at": None if status == "queued" else NOW,
        "finished_at": NOW if status in {"succeeded", "failed", "cancelled"} else None,
        "error": None,
        "request": request,
        "result": (result or RESULTS[kind]) if status == "succeeded" else None,
        **changes,
    }


FEATURES: dict[str, Any] = {
    "weights": None,
    "kind": "adam",
    "adam": "less",
    "reduction": "mean",
    "projection": "blocks",
    "seed": 0,
    "dim": 8192,
    "dtype": "float16",
    "converted_from": None,
    "template": "tulu",
    "max_length": 2048,
    "precision": "float32",
    "quantisation": None,
    "projection_version": 1,
}
FEATURE_SET: dict[str, Any] = {
    "id": "feat_1",
    "dataset": "ds_pool",
    "task": None,
    "checkpoint": "ck_1",
    **FEATURES,
    "rows": 3,
    "excluded": 0,
    "bytes": 98304,
}
RESULTS: dict[str, Any] = {
    "finetune": {
        "run": "run_1",
        "checkpoints": ["ck_1"],
        "rows": 3,
        "skipped_rows": 0,
        "steps": 10,
        "tokens": 99,
        "precision": "float32",
        "loss_curve": [{"step": 1, "epoch": 0.5, "loss": 2.5, "learning_rate": 1e-5}],
        "seconds": 1.5,
    },
    "gradients": {
        "feature_sets": [FEATURE_SET],
        "rows": 3,
        "computed_rows": 3,
        "excluded": [],
        "total_excluded": 0,
        "tokens": 99,
        "token_budget": 8192,
        "seconds": 1.5,
    },
    "conversion": {"feature_sets": [FEATURE_SET], "rows": 3, "converted_rows": 3, "seconds": 0.5},
    "evaluation": {
        "rows": [
            {
                "model": model,
                "task": "task_mmlu",
                "task_name": "mmlu",
                "subtask": None,
                "examples": 10,
                "loss": loss,
                "loss_interval": {"low": loss - 0.1, "high": loss + 0.1},
                "metric": "choice",
                "value": 0.5,
                "interval": None,
                "unparsed": 0,
            }
            for model, loss in (("base", 2.5), ("tuned", 2.0))
        ],
        "seconds": 1.5,
    },
    "scoring": {"scores": "score_1", "rows": 3, "seconds": 0.5},
    "validation": {
        "kind": "lds",
        "scores": [
            {
                "label": label,
                "recipe": None,
                "precondition": "none",
                "mixing": [],
                "value": value,
                "interval": {"low": value - margin, "high": value + margin},
                "difference": None if label == "adam" else value - 0.3,
                "difference_interval": None if label == "adam" else {"low": -0.4, "high": -0.2},
                "unscored_rows": 0,
                "targets": [{"row": 0, "subtask": "anatomy", "value": value}],
                "points": [{"seed": 0, "predicted": 1.5, "loss": 2.0, "random_loss": None}],
            }
            for label, value, margin in (("adam", 0.3, 0.1), ("random", 0.0, 0.1))
        ],
        "rows": 3,
        "left_out_targets": 0,
        "trainings": 8,
        "tokens": 99,
        "seconds": 1.5,
    },
    "attribution": {
        "recipe": {
            **FEATURES,
            "datasets": ["ds_pool"],
            "checkpoints": ["ck_1", "ck_2"],
            "checkpoint_weights": [0.75, 0.25],
            "run": "run_1",
            "query_kind": "sgd",
            "origins": [],
            "k": 1,
        },
        "data": [
            {
                "reason": None,
                "loss": 1.5,
                "tokens": 2,
                **{
                    end: [
                        {
                            "rank": 1,
                            "dataset": "ds_pool",
                            "row": row,
                            "id": f"row-{row}",
                            "origin": "dolly",
                            "score": 4 * part,
                            "per_checkpoint": [3 * part, part],
                            "text": f"text {row}\nsecond line",
                        }
                    ]
                    for end, row, part in (("most", 7, 0.125), ("least", 2, -0.0625))
                },
            }
        ],
        "searches": [
            {
                "dataset": "ds_pool",
                "method": "exact",
                "rows": 3,
                "index": None,
                "recall": None,
                "candidates": None,
                "seconds": 0.25,
            }
        ],
        "computed_rows": 2,
        "gradient_seconds": 0.5,
        "seconds": 1.0,
    },
}


def comparison_estimate() -> dict[str, Any]:
    return {
        "contestants": ["influence", "random"],
        "left_out": RESULTS["comparison"]["left_out"],
        "trainings": 11,
        "reused_trainings": 1,
        "rows": 2,
        "tokens": 99,
        "seconds": 2.0,
        "basis": "measured",
        "memory_bytes": 4000,
    }


def validation_estimate() -> dict[str, Any]:
    return {
        "trainings": 64,
        "reused_trainings": 8,
        "rows": 3,
        "tokens": 99,
        "seconds": 2.0,
        "basis": "measured",
        "memory_bytes": 4000,
    }


def estimate() -> dict[str, Any]:
    return {
        "rows": 3,
        "tokens": 99,
        "bytes": 1000,
        "free_bytes": 5000,
        "seconds": 2.0,
        "basis": "estimated",
        "memory_bytes": 4000,
        "reused_rows": 1,
    }


def row(rank: int) -> dict[str, Any]:
    return {
        "rank": rank,
        "dataset": "ds_pool",
        "row": 10 * rank,
        "id": f"r{rank}",
        "origin": "a",
        "score": 1 / rank,
        "task": "mmlu",
        "subtask": "anatomy",
        "shot": None,
    }


def base_model() -> dict[str, Any]:
    """A base model registered as a checkpoint."""
    unknown = ("name", "run", "revision", "epoch", "step", "learning_rate", "template", "max_length")
    return {
        "id": "ck_1",
        **dict.fromkeys(unknown),
        "model": "org/base",
        "method": "none",
        "has_moments": False,
        "moments_note": "a base model has none",
        "parameters": 0,
        "precision": "float32",
        "bytes": 400,
        "created_at": NOW,
    }


def recipe() -> dict[str, Any]:
    return {
        "method": "influence",
        "datasets": ["ds_pool"],
        "tasks": ["task_mmlu"],
        "checkpoints": ["ck_1"],
        "checkpoint_weights": [1.0],
        "run": "run_1",
        **FEATURES,
        "task_kind": "sgd",
        "aggregate": "less",
        "combine": "max",
        "selection_seed": None,
        "pct": 0.05,
        "k": None,
        "exclude": [],
    }


def compared(label: str, method: str, *, loss: float, difference: float | None) -> dict[str, Any]:
    """A contestant's row."""
    return {
        "contestant": label,
        "task": "task_mmlu",
        "task_name": "mmlu",
        "method": method,
        "selection": f"sel_{method}",
        "draws": [],
        "recipe": {**recipe(), "method": method},
        "rows": 2,
        "origins": {"flan": 2},
        "cost": {
            "scoring_seconds": 0.5,
            "choosing_seconds": 0.25,
            "rests_on": [{"job": "grad_1", "kind": "gradients", "seconds": 1.5}],
            "rests_on_seconds": 1.5,
        },
        "loss": {
            "value": loss,
            "interval": {"low": loss - 0.1, "high": loss + 0.1},
            "by_seed": [loss],
            "difference": difference,
            "difference_interval": difference and {"low": difference - 0.1, "high": difference + 0.1},
        },
    }


RESULTS["comparison"] = {
    "pool": 3,
    "pool_origins": {"flan": 3},
    "tasks": [
        {
            "task": "task_mmlu",
            "task_name": "mmlu",
            "base_loss": 2.5,
            "base_interval": {"low": 2.4, "high": 2.6},
            "measured_rows": 5,
            "left_out_rows": 0,
        }
    ],
    "rows": [
        compared("influence", "influence", loss=2.0, difference=-0.25),
        compared("random", "random", loss=2.25, difference=None),
    ],
    "pairs": [
        {"task": "task_mmlu", "contestants": ["influence", "random"], "shared": 1, "jaccard": 0.3333, "share": 0.5}
    ],
    "left_out": [{"method": "rds", "task": None, "detail": "POST /gradients computes them"}],
    "against": "random",
    "trainings": 3,
    "tokens": 99,
    "seconds": 1.5,
}


def selection(count: int, *, start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """A selection of `count` rows and the page of them from `start` to `stop`, counted from 0."""
    stop = count if stop is None else min(stop, count)
    return {
        "id": "sel_1",
        "name": None,
        "recipe": recipe(),
        "count": count,
        "pool": 20 * count,
        "left_out": {},
        "origins": {"a": count},
        "pool_origins": {"a": 20 * count},
        "data": [row(rank) for rank in range(start + 1, stop + 1)],
        "has_more": stop < count,
        "created_at": NOW,
    }


def problem(status: int, detail: str, **changes: Any) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": "Refused",
        "status": status,
        "detail": detail,
        "instance": "req_7",
        "errors": [],
        "total_errors": 0,
        **changes,
    }


def page(items: list[dict[str, Any]], asked: Asked, *, size: int) -> Said:
    """The page of a list that a request asks for."""
    ids = [item["id"] for item in items]
    start = ids.index(asked.query["after"][0]) + 1 if "after" in asked.query else 0
    return Said({"data": items[start : start + size], "has_more": start + size < len(items)})
