"""Spans of requests and of shards, sent to a collector of OpenTelemetry's where one is configured; nothing otherwise.

The trace of a request has its id made of the request's own, as has the parent of its spans: a worker, which has the
request's id from the catalog, puts its spans into the same trace without having been told anything else. Requests that
were sent with the same `X-Request-ID` share a trace.

OpenTelemetry's packages are imported by `configure` only (the extra `telemetry`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

Attributes = Mapping[str, str | int | float]
End = Callable[..., None]
"""Ends a span: `end(name=…, attributes=…, error=…)`, of which all may be left out."""

FLUSH = 5000  # milliseconds that the last spans have to leave

_provider: TracerProvider | None = None


class NoTelemetry(ImportError):
    """Spans are wanted and the packages that make them are not installed."""


def configure(endpoint: str, *, part: str, exporter: SpanExporter | None = None) -> None:
    """Send spans to a collector (OTLP over HTTP, `http://host:4318/v1/traces`) from now on, as a `part` of gradstore.

    Does nothing without an endpoint. `exporter` takes the spans instead of the collector. Raises `NoTelemetry`.
    """
    global _provider  # noqa: PLW0603 - like logging, it is the process's
    if not endpoint and exporter is None:
        return
    try:
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

            exporter = OTLPSpanExporter(endpoint=endpoint)
    except ImportError as error:
        raise NoTelemetry(
            f"GRADSTORE_OTLP_ENDPOINT asks for spans, and {error.name} is not installed: "
            "pip install 'gradstore-server[telemetry]', or leave the variable out"
        ) from error
    _provider = TracerProvider(resource=Resource.create({"service.name": f"gradstore-{part}"}))
    _provider.add_span_processor(BatchSpanProcessor(exporter))


def begin_process(endpoint: str, *, part: str) -> None:
    """As `configure`; ends the process with the reason where nothing is installed that could send spans."""
    try:
        configure(endpoint, part=part)
    except NoTelemetry as error:
        sys.exit(str(error))


def close() -> None:
    """Send what has not been sent yet, and send nothing more."""
    global _provider  # noqa: PLW0603
    if _provider is not None:
        _provider.force_flush(FLUSH)
        _provider.shutdown()
        _provider = None


def begin(name: str, *, request: str | None, attributes: Attributes | None = None) -> End:
    """Begin a span in the trace of a request, or in one of its own; returns what ends it, in whatever thread."""
    if _provider is None:
        return _nothing
    from opentelemetry import trace  # noqa: PLC0415

    parent = None
    if request is not None:
        trace_id, span_id = ids(request)
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        parent = trace.set_span_in_context(
            trace.NonRecordingSpan(trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags))
        )
    given = {**(attributes or {}), **({"gradstore.request": request} if request else {})}
    span = _provider.get_tracer("gradstore").start_span(name, context=parent, attributes=given)

    def end(*, name: str | None = None, attributes: Attributes | None = None, error: bool = False) -> None:
        if name is not None:
            span.update_name(name)
        span.set_attributes(attributes or {})
        if error:
            span.set_status(trace.StatusCode.ERROR)
        span.end()

    return end


def ids(request: str) -> tuple[int, int]:
    """The trace's id (128 bits) and its spans' parent's (64 bits) of a request; neither is ever 0."""
    digest = sha256(request.encode()).digest()
    return int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:24]) or 1


def _nothing(*, name: str | None = None, attributes: Attributes | None = None, error: bool = False) -> None:
    """End a span that never was."""
