"""Spans of OpenTelemetry: the API's and the workers' are of one trace, and there are none unless asked for."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from datastore import tracing
from tests.processes import ServiceProcess, wait_for
from tests.serving import jsonl, serving
from tests.tiny import save_tiny_model
from tests.workplace import Workplace

ID = "trace-me"


def need_the_extra() -> None:
    """Skip where the packages of the extra `telemetry` are not installed."""
    reason = "the packages of the extra `telemetry` are not installed"
    pytest.importorskip("opentelemetry.sdk.trace", reason=reason)
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason=reason)


def test_a_request_and_the_shards_it_starts_are_one_trace(tmp_path: Path) -> None:
    need_the_extra()
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    place = Workplace.at(tmp_path)
    settings = place.context.settings
    exporter = InMemorySpanExporter()
    tracing.configure("", part="test", exporter=exporter)
    with serving(settings.data, allowed_roots=settings.allowed_roots) as service:
        pool = service.pool(4)["id"]
        service.http.headers["X-Request-ID"] = ID
        service.finetune(dataset=pool, model=str(place.model), epochs=1, max_length=32)
        assert service.http.get("/datasets/unknown").status_code == 404
        assert service.http.get("/ready").status_code == 200
        assert place.work() == ["succeeded"]
    spans = {span.name: span for span in exporter.get_finished_spans()}  # the service has sent them before it ended
    assert spans.keys() == {"POST /datasets", "POST /finetunes", "GET /datasets/{reference}", "shard finetune"}
    request, shard, other = (spans[name] for name in ("POST /finetunes", "shard finetune", "POST /datasets"))
    assert request.context.trace_id == shard.context.trace_id == tracing.ids(ID)[0] != other.context.trace_id
    assert request.parent.span_id == shard.parent.span_id == tracing.ids(ID)[1]
    assert request.attributes["http.response.status_code"] == 202
    assert request.attributes["gradstore.request"] == ID
    assert shard.attributes["gradstore.kind"] == "finetune"
    assert shard.attributes["gradstore.outcome"] == "succeeded"
    assert shard.end_time > shard.start_time


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A collector's address, and the spans that it was sent, each with the name of its service."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                [name] = [it.value.string_value for it in resource.resource.attributes if it.key == "service.name"]
                spans.extend((name, span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_processes_send_their_spans_to_the_collector_before_they_end(tmp_path: Path) -> None:
    need_the_extra()
    model = save_tiny_model(tmp_path / "model")
    with (
        collector() as (endpoint, spans),
        ServiceProcess(tmp_path / "store", allow=tmp_path, otlp_endpoint=endpoint) as service,
    ):
        with httpx.Client(base_url=service.url, headers={"X-Request-ID": ID}) as http:
            pool = http.post("/datasets", files={"file": ("pool.jsonl", jsonl(4))}).json()["id"]
            wanted = {"dataset": pool, "model": str(model), "epochs": 1, "max_length": 32}
            job = http.post("/finetunes", json=wanted).raise_for_status().json()["id"]
        with service.client() as store:
            store.finetunes.wait(job, timeout=120)
        wait_for(lambda: "shard succeeded" in service.log)
        service.stop()
    found = {(name, span.name) for name, span in spans if span.trace_id == tracing.ids(ID)[0].to_bytes(16)}
    requests = {("gradstore-api", f"POST /{noun}") for noun in ("datasets", "finetunes")}
    assert found == requests | {("gradstore-worker", "shard finetune")}


def test_nothing_is_imported_and_nothing_sent_unless_it_is_asked_for() -> None:
    program = (
        "import sys; from datastore import tracing; tracing.configure('', part='api'); "
        "end = tracing.begin('GET', request='1'); end(name='GET /', attributes={'a': 1}, error=True); tracing.close(); "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_spans_without_the_packages_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(tracing.NoTelemetry, match=r"GRADSTORE_OTLP_ENDPOINT .* 'gradstore-server\[telemetry\]'"):
        tracing.configure("http://127.0.0.1:4318/v1/traces", part="api")


def test_ids_are_those_of_the_request() -> None:
    assert tracing.ids("a") == tracing.ids("a") != tracing.ids("b")
    trace_id, span_id = tracing.ids("a")
    assert 0 < trace_id < 1 << 128
    assert 0 < span_id < 1 << 64
