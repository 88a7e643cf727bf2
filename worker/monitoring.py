"""What Prometheus sees of a worker's process: the shards it did, how they ended and how long they took.

What is in the catalog the API shows for all workers (service/store_metrics.py); this is what only the process knows. It
is shown on a port of its own where GRADSTORE_METRICS_LISTEN says so, and counted in any case.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

REGISTRY = CollectorRegistry()
BUCKETS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0, 1800.0, 7200.0)  # seconds: a small shard, a fine-tune
SHARDS = Counter("gradstore_worker_shards", "Shards by how they ended.", ("kind", "outcome"), registry=REGISTRY)
SECONDS = Histogram(
    "gradstore_worker_shard_seconds", "From the claim to the end.", ("kind",), buckets=BUCKETS, registry=REGISTRY
)
EXPIRIES = Counter(
    "gradstore_lease_expiries", "Shards put back by this process: their worker was gone.", registry=REGISTRY
)
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)


def show(listen: str) -> None:
    """Answer Prometheus at an address and port, `127.0.0.1:9100`, in a thread. Raises OSError where it is taken."""
    host, _, port = listen.rpartition(":")
    start_http_server(int(port), addr=host.strip("[]") or "127.0.0.1", registry=REGISTRY)


def next_port(listen: str, number: int) -> str:
    """The address of a machine's worker number 0, 1, …: each takes the next port.

    >>> next_port("127.0.0.1:9100", 2), next_port("", 2)
    ('127.0.0.1:9102', '')
    """
    if not listen:
        return ""
    host, _, port = listen.rpartition(":")
    return f"{host}:{int(port) + number}"
