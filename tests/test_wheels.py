"""The two distributions as other projects get them: built, installed away from the tree, with nothing undeclared."""

from __future__ import annotations

import email.message
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import gradstore
import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY
from tests.environments import Environment

pytestmark = pytest.mark.slow

CLIENT = "gradstore"
SERVER = "gradstore_server"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels, each built from its source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    for project in (REPOSITORY / "client", REPOSITORY):
        build = [sys.executable, "-m", "build", "--no-isolation", f"--outdir={folder}", str(project)]
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return {wheel.name.partition("-")[0]: wheel for wheel in folder.glob("*.whl")}


@pytest.fixture
def install(wheels: dict[str, Path], tmp_path: Path) -> Callable[..., Environment]:
    """Makes an environment of the client's wheel, with extras, and perhaps the server's, and what these declare."""

    def made(*, client: str, server: str | None = None) -> Environment:
        environment = Environment(tmp_path / "environment")
        chosen = {CLIENT: client} | ({SERVER: server} if server is not None else {})
        for name, extras in chosen.items():
            environment.link(declared(wheels[name], extras.split(",")))
        environment.install(
            *(f"{wheels[name]}[{extras}]" if extras else str(wheels[name]) for name, extras in chosen.items())
        )
        return environment

    return made


def wheel_metadata(wheel: Path) -> email.message.Message:
    """The METADATA file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def declared(wheel: Path, extras: list[str]) -> list[str]:
    """What a wheel with these extras requires beside the other wheel."""
    requirements = [Requirement(text) for text in wheel_metadata(wheel).get_all("Requires-Dist", [])]
    return [
        f"{requirement.name}[{','.join(requirement.extras)}]"
        for requirement in requirements
        if requirement.name != CLIENT
        and (
            requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ["", *extras])
        )
    ]


@pytest.mark.parametrize(
    ("name", "packages"), [(CLIENT, ["client/gradstore"]), (SERVER, ["datastore", "service", "worker"])]
)
def test_a_wheel_holds_every_file_of_its_packages_and_its_licence(
    wheels: dict[str, Path], name: str, packages: list[str]
) -> None:
    expected = {
        str(file.relative_to((REPOSITORY / package).parent))
        for package in packages
        for file in (REPOSITORY / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheels[name]) as archive:
        held = set(archive.namelist())
    assert expected == {file for file in held if ".dist-info/" not in file}
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in held)


def test_the_wheels_say_what_they_are(wheels: dict[str, Path]) -> None:
    client, server = wheel_metadata(wheels[CLIENT]), wheel_metadata(wheels[SERVER])
    for answer in (client, server):
        assert answer["Version"] == gradstore.__version__
        assert answer["License-Expression"] == "Apache-2.0"
        assert answer["Requires-Python"] == ">=3.11"
        assert answer["Description-Content-Type"] == "text/markdown"
    assert {"cli", "pandas", "datasets"} == set(client.get_all("Provides-Extra", []))
    assert {"service", "worker", "gpu", "quantised", "fuzz", "load", "telemetry", "dev"} == set(
        server.get_all("Provides-Extra", [])
    )


def test_the_client_alone_works_without_torch_numpy_or_a_web_framework(install: Callable[..., Environment]) -> None:
    loaded = install(client="").import_all("gradstore", leave_out=["gradstore.cli", "gradstore._cli*"])
    assert {"httpx", "pydantic", "tqdm"} <= loaded
    assert not loaded & {"torch", "numpy", "fastapi", "starlette", "celery", "sqlalchemy", "typer"}


def test_the_command_runs_from_the_client_with_its_cli(install: Callable[..., Environment]) -> None:
    environment = install(client="cli")
    assert gradstore.__version__ in environment.run("gradstore", "--version").stdout
    assert "Usage" in environment.run("gradstore", "--help").stdout


def test_the_datastore_needs_no_extra(install: Callable[..., Environment]) -> None:
    loaded = install(client="cli", server="").import_all("datastore")
    assert {"sqlalchemy", "pyarrow"} <= loaded
    assert not loaded & {"torch", "fastapi"}


def test_the_service_extra_is_all_the_service_needs(install: Callable[..., Environment]) -> None:
    environment = install(client="cli", server="service")
    loaded = environment.import_all("datastore", "service")
    assert "fastapi" in loaded
    assert "torch" not in loaded
    assert "--port" in environment.run("gradstore", "serve", "--help").stdout


def test_the_worker_extra_is_all_a_worker_needs(install: Callable[..., Environment]) -> None:
    environment = install(client="cli", server="worker")
    loaded = environment.import_all("datastore", "worker", leave_out=["worker.kernels"])
    assert "torch" in loaded
    assert "fastapi" not in loaded
    assert environment.run("gradstore", "worker", "--help").stdout
