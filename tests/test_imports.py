"""Imports go one way: gradstore.types ← datastore ← {service, worker}; each package loads only what is its business."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.environments import IMPORT_ALL, Environment

OURS = {"gradstore": "client", "datastore": ".", "service": ".", "worker": "."}
MAY_IMPORT = {
    "gradstore": [],
    "datastore": ["gradstore.__version__", "gradstore.types*"],
    "service": ["gradstore.__version__", "gradstore.types*", "datastore.*"],
    "worker": ["gradstore.__version__", "gradstore.types*", "datastore.*"],
}
KNOW_CELERY = {"service/queue.py", "worker/celery_app.py"}
ENGINE = [
    f"worker.{name}"
    for name in (
        *("models", "batches", "layouts", "losses", "taps", "sites"),
        *("packing", "directions", "projection", "sums", "features", "gradients"),
    )
]
NEEDS_TRITON = "worker.kernels"  # imported where there is a GPU


def modules(package: str) -> Iterator[Path]:
    """All Python files of a package, relative to the folder it is imported from."""
    root = REPOSITORY / OURS[package]
    yield from (file.relative_to(root) for file in sorted((root / package).rglob("*.py")))


def imports(package: str, module: Path) -> Iterator[tuple[str, int]]:
    """What a file imports anywhere in it, modules or names of modules, with lines; relative ones made absolute."""
    for node in ast.walk(ast.parse((REPOSITORY / OURS[package] / module).read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.parts[: len(module.parts) - node.level]) if node.level else ""
            yield from ((".".join(filter(None, (base, node.module, alias.name))), node.lineno) for alias in node.names)


def loaded_by(package: str) -> set[str]:
    """The top-level names that importing every module of a package loads in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package, NEEDS_TRITON],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def fits(package: str, name: str) -> bool:
    """Whether a package may import the module of this name."""
    top = name.partition(".")[0]
    return top not in OURS or top == package or any(fnmatch(name, allowed) for allowed in MAY_IMPORT[package])


@pytest.mark.parametrize("package", OURS)
def test_a_package_imports_only_those_before_it(package: str) -> None:
    wrong = [
        f"{module}:{line} imports {name}"
        for module in modules(package)
        for name, line in imports(package, module)
        if not fits(package, name)
    ]
    assert not wrong


def test_an_import_against_the_direction_is_seen() -> None:
    assert not fits("datastore", "service.app")
    assert not fits("datastore", "gradstore.client")
    assert not fits("worker", "service.queue")


def test_only_the_queue_and_the_workers_celery_module_know_celery() -> None:
    knowing = {
        module.as_posix()
        for package in OURS
        for module in modules(package)
        for name, _ in imports(package, module)
        if name.partition(".")[0] in {"celery", "kombu"}
    }
    assert knowing <= KNOW_CELERY


@pytest.mark.parametrize(
    ("package", "not_its_business"),
    [
        ("gradstore", {"torch", "numpy", "fastapi", "starlette", "celery", "sqlalchemy", "pandas", "datasets"}),
        ("datastore", {"torch", "transformers", "peft", "fastapi", "starlette", "celery", "httpx"}),
        ("service", {"torch", "transformers", "peft", "accelerate"}),
        ("worker", {"fastapi", "starlette", "uvicorn"}),
    ],
)
def test_importing_a_package_loads_only_its_business(package: str, not_its_business: set[str]) -> None:
    assert not loaded_by(package) & not_its_business


def test_the_gradient_engine_needs_torch_transformers_peft_and_numpy_only(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.link(["torch", "transformers", "peft", "numpy"])
    environment.see(REPOSITORY, REPOSITORY / "client")
    environment.run(environment.bin / "python", "-c", f"import {', '.join(ENGINE)}")


def test_the_benchmark_of_gradients_needs_torch_transformers_peft_and_numpy_only(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.link(["torch", "transformers", "peft", "numpy"])
    environment.see(REPOSITORY)  # and not the client: a bare GPU machine has no pydantic
    run = ["-m", "benchmarks.gradients", "--preset", "tiny", "--rounds", "1", "--only", "less blocks", "--no-memory"]
    environment.run(environment.bin / "python", *run, "--device", "cpu")
