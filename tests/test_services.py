from __future__ import annotations

from pathlib import Path

import pytest
import redis

from tests.services import RedisServer, require_binary


@pytest.mark.services
def test_redis_keeps_what_it_acknowledged_over_a_kill(redis_server: RedisServer) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        client.set("shard", "3")
    redis_server.kill()
    redis_server.start()
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.get("shard") == b"3"


def test_a_missing_program_skips_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSTORE_REQUIRE_SERVICES", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-server is not installed"):
        require_binary("no-such-server")


def test_a_missing_program_fails_a_test_where_services_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_REQUIRE_SERVICES", "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-server is not installed"):
        require_binary("no-such-server")


def test_a_program_is_found_by_its_name() -> None:
    assert Path(require_binary("sh")).is_file()
