"""The compose files agree with each other, with the settings, and with the page that explains them."""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]  # its types are a distribution of their own

from datastore.settings import Settings
from tests.conftest import REPOSITORY

FILES = ["docker-compose.yml", "docker-compose.cpu.yml"]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
OF_LIBRARIES = {"HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"}


def used_variables() -> set[str]:
    """What the compose files take from .env: to fill in, or to give on."""
    found = {name for file in FILES for name in re.findall(r"\$\{([A-Z0-9_]+)", (REPOSITORY / file).read_text())}
    environments = [service.get("environment", {}) for file in FILES for service in services(file).values()]
    return found | {name for environment in environments for name, value in environment.items() if value is None}


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
    differ = {"image", "build", "deploy"}
    assert set(gpu) - differ == set(cpu) - differ
    for key in set(gpu) - differ:
        assert cpu[key] == gpu[key], key
    assert cpu["image"] != gpu["image"]
    assert {**cpu["build"], "args": None} == {**gpu["build"], "args": None}


def test_every_container_is_hardened() -> None:
    default, override = (services(file) for file in FILES)
    for name, service in {**default, "worker-cpu": override["worker-cpu"]}.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == ("no" if name == "s3-bucket" else "unless-stopped"), name
        assert name == "redis" or service["tmpfs"][0].startswith("/tmp"), name  # noqa: S108
    for name in ("api", "worker"):
        assert "cap_add" not in default[name], name


def test_ours_are_built_from_the_dockerfiles_targets() -> None:
    default, override = (services(file) for file in FILES)
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)) - {"base"}
    built = [default["api"], default["worker"], override["worker-cpu"]]
    assert {service["build"]["target"] for service in built} == targets == {"service", "worker"}
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert all(set(service["build"]["args"]) <= arguments for service in built)
    assert (
        f"ARG BASE_IMAGE={default['api']['build']['args']['BASE_IMAGE'].partition(':-')[2].rstrip('}')}\n" in DOCKERFILE
    )


def test_every_target_runs_as_nobody_in_particular_and_says_whether_it_lives() -> None:
    for target in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[2:]:
        assert re.search(r"^USER gradstore$", target, re.MULTILINE)
        assert re.search(r"^HEALTHCHECK .*CMD", target, re.MULTILINE)


def test_every_image_is_pinned_to_a_version() -> None:
    images = [service["image"] for service in services(FILES[0]).values() if "build" not in service]
    assert len(images) == 4
    for image in images:
        default = re.fullmatch(r"\$\{[A-Z0-9_]+_IMAGE:-(.+)\}", image)
        assert default is not None, image
        assert re.search(r":(\d+\.\d+|RELEASE\.\d)", default[1]), image


def test_an_object_store_is_there_when_asked_for_only() -> None:
    default = services(FILES[0])
    assert {name for name, service in default.items() if service.get("profiles") == ["s3"]} == {"s3", "s3-bucket"}
    given = {name: value for name, value in default["worker"]["environment"].items() if name.startswith("AWS_")}
    assert set(given.values()) == {None}, "an empty AWS_ENDPOINT_URL is not the same as none"


def test_the_services_set_variables_that_exist() -> None:
    settings = {f"GRADSTORE_{name.upper()}" for name in Settings.model_fields}
    for file in FILES:
        for name in ("api", "worker", "worker-cpu"):
            assert set(services(file).get(name, {}).get("environment", {})) <= settings | OF_LIBRARIES


def test_no_secret_has_a_default() -> None:
    for file in FILES:
        text = (REPOSITORY / file).read_text()
        for name in ("GRADSTORE_API_KEY", "POSTGRES_PASSWORD"):
            assert set(re.findall(rf"\$\{{{name}(:?.)", text)) <= {":?"}


def test_every_variable_of_the_compose_files_is_documented() -> None:
    page = (REPOSITORY / "docs/deployment.md").read_text()
    used = used_variables()
    assert used >= {"GRADSTORE_API_KEY", "TORCH_INDEX", "HF_TOKEN"}
    assert not [name for name in used if f"| `{name}` |" not in page]


def test_the_example_of_the_environment_names_known_variables_and_holds_no_secret() -> None:
    example = dict(
        line.split("=", 1) for line in (REPOSITORY / ".env.example").read_text().splitlines() if re.match("[A-Z]", line)
    )
    assert set(example) <= used_variables()
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
            assert "build" in default[name] or default[name]["healthcheck"]["test"]
