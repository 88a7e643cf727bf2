"""The compose files agree with each other, with the settings, and with the page that explains them."""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]  # its types are a distribution of their own

from datastore.settings import Settings
from tests.conftest import REPOSITORY

FILES = ["docker-compose.yml", "docker-compose.cpu.yml"]


def services(file: str) -> dict[str, dict[str, Any]]:
    """The services of a compose file."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((REPOSITORY / file).read_text())["services"]
    return found


def reserves_a_device(service: dict[str, Any]) -> bool:
    """Whether the service can only start where there is a GPU."""
    return bool(service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices"))


def test_with_the_cpu_override_no_service_that_starts_reserves_a_device() -> None:
    default, override = (services(file) for file in FILES)
    reserving = {name for name, service in default.items() if reserves_a_device(service)}
    assert reserving == {"worker"}
    assert all(override[name]["profiles"] for name in reserving)
    assert not any(reserves_a_device(service) for service in override.values())


def test_the_cpu_worker_is_the_gpu_worker_without_a_device() -> None:
    gpu, cpu = services(FILES[0])["worker"], services(FILES[1])["worker-cpu"]
    for key in (
        "command",
        "environment",
        "volumes",
        "depends_on",
        "healthcheck",
        "stop_grace_period",
        "init",
        "restart",
    ):
        assert cpu[key] == gpu[key], key
    assert cpu["image"] == services(FILES[1])["api"]["image"] != gpu["image"]


def test_the_services_set_variables_that_exist() -> None:
    settings = {f"GRADSTORE_{name.upper()}" for name in Settings.model_fields}
    for file in FILES:
        for name in ("api", "worker", "worker-cpu"):
            assert set(services(file).get(name, {}).get("environment", {})) <= settings


def test_no_secret_has_a_default() -> None:
    for file in FILES:
        text = (REPOSITORY / file).read_text()
        for name in ("GRADSTORE_API_KEY", "POSTGRES_PASSWORD"):
            assert set(re.findall(rf"\$\{{{name}(:?.)", text)) <= {":?"}


def test_every_variable_of_the_compose_files_is_documented() -> None:
    page = (REPOSITORY / "docs/deployment.md").read_text()
    used = {name for file in FILES for name in re.findall(r"\$\{([A-Z_]+)", (REPOSITORY / file).read_text())}
    assert used >= {"GRADSTORE_API_KEY", "TORCH_INDEX"}
    assert not [name for name in used if f"| `{name}` |" not in page]


def test_the_example_of_the_environment_names_known_variables_and_holds_no_secret() -> None:
    example = dict(
        line.split("=", 1)
        for line in (REPOSITORY / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    used = {name for file in FILES for name in re.findall(r"\$\{([A-Z_]+)", (REPOSITORY / file).read_text())}
    assert set(example) <= used
    assert not example["GRADSTORE_API_KEY"]
    assert not example["POSTGRES_PASSWORD"]


def test_redis_writes_down_what_it_acknowledges() -> None:
    command = services(FILES[0])["redis"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"


def test_every_server_says_whether_it_is_healthy_before_others_rely_on_it() -> None:
    default, override = (services(file) for file in FILES)
    for service in [*default.values(), *override.values()]:
        for name, relation in service.get("depends_on", {}).items():
            assert relation == {"condition": "service_healthy"}
            assert default[name]["healthcheck"]["test"]
