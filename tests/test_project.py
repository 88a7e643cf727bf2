"""What the project promises about itself: its commands, its pages, its settings, its files."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import gradstore
import pytest
from gradstore._cli.selections import SCORING
from gradstore.types import SelectionMethod

from datastore.settings import Settings
from tests.conftest import REPOSITORY

CODE = ["client/gradstore", "datastore", "service", "worker", "tests", "benchmarks", "examples"]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "client/README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def python_files(*folders: str) -> Iterator[Path]:
    """All Python files below the folders."""
    for folder in folders:
        yield from sorted((REPOSITORY / folder).rglob("*.py"))


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def test_nothing_is_left_to_be_done_later() -> None:
    notes = ("TO" + "DO", "FIX" + "ME", "X" * 3)
    texts = {file: file.read_text() for file in [*python_files(*CODE), *PAGES]}
    assert not [f"{file}: {note}" for file, text in texts.items() for note in notes if re.search(rf"\b{note}\b", text)]


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert not [file for file in python_files(*CODE) if file.name in drawers]


def test_every_module_says_what_it_knows() -> None:
    assert not [
        file
        for file in python_files("client/gradstore", "datastore", "service", "worker")
        if not ast.get_docstring(ast.parse(file.read_text()))
    ]


def test_no_module_of_ours_is_exempt_from_a_check_as_a_whole() -> None:
    blanket = re.compile(r"#\s*(type: ignore(?!\[)|noqa(?!: [A-Z])|ruff: noqa|mypy: ignore-errors)")
    assert not [
        file for file in python_files(*CODE) if file.name != "test_project.py" and blanket.search(file.read_text())
    ]


def test_every_make_command_of_the_pages_exists() -> None:
    command = re.compile(r"(?:^    |`)make ([a-z]+)", re.MULTILINE)
    assert {name for page in PAGES for name in command.findall(page.read_text())} <= make_targets()


def test_every_make_target_is_a_script() -> None:
    for target in make_targets() - {"help"}:
        script = REPOSITORY / "scripts" / target
        assert script.is_file(), target
        assert script.stat().st_mode & 0o100, f"{script} is not executable"


def test_make_alone_says_what_there_is() -> None:
    # below `make test` make would say which folder it enters
    command = ["make", "--no-print-directory"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == make_targets()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_python_block_of_a_page_is_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        compile(block, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_option_of_a_pages_commands_exists(page: Path) -> None:
    known = set(re.findall(r"--[a-z][\w-]*", (REPOSITORY / "docs/cli.md").read_text()))
    commands = re.findall(
        r"^    gradstore (?!serve|worker|doctor|gc|keys|audit|backup|restore)(?:.*\\\n)*.*$",
        page.read_text(),
        re.MULTILINE,
    )
    assert not [
        option for command in commands for option in re.findall(r" (--[a-z][\w-]*)", command) if option not in known
    ]


def test_every_setting_is_documented_with_its_default() -> None:
    section = (REPOSITORY / "docs/deployment.md").read_text().partition("\n## One process")[0]
    documented = dict(re.findall(r"^\| `(GRADSTORE_\w+)` \| ?(?:`(.*?)`)? ?\|", section, re.MULTILINE))
    assert documented == {
        f"GRADSTORE_{name.upper()}": shown(field.default) for name, field in Settings.model_fields.items()
    }


def shown(default: object) -> str:
    """A default as the page shows it: as it would be set, and nothing for what is empty."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    return "" if default in (None, ()) else str(default)


@pytest.mark.parametrize("method", get_args(SelectionMethod))
def test_every_method_of_select_stands_wherever_methods_are_listed(method: str) -> None:
    listed = (REPOSITORY / "service/dashboard/pages/scores.js").read_text()
    assert f'["{method}", ' in listed.partition("METHODS = [")[2].partition("];")[0]
    assert f"`method={method}`" in (REPOSITORY / "docs/selection.md").read_text()
    assert method == "influence" or f"({method})" in SCORING["method"]
    for page in ("api", "glossary"):
        assert f"`{method}`" in (REPOSITORY / f"docs/{page}.md").read_text() or method == "influence"


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == gradstore.__version__


def test_the_image_has_the_torch_that_the_installation_has() -> None:
    installed = re.search(r"^TORCH=(\S+)", (REPOSITORY / "scripts/install").read_text(), re.MULTILINE)
    assert installed is not None
    assert f"torch=={installed[1]}\n" in (REPOSITORY / "Dockerfile").read_text()


def test_the_locks_hold_what_the_project_asks_for_and_agree() -> None:
    everything, image, api = (pins(REPOSITORY / f"requirements{name}.lock") for name in ("", "-image", "-service"))
    assert api <= image <= everything
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((REPOSITORY / "client/pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    run = [*project["dependencies"], *client["dependencies"], *client["optional-dependencies"]["cli"]]
    serve = [*run, *extras["service"]]
    run = [*serve, *extras["worker"]]
    for wanted, locked in ((serve, api), (run, image), (run + extras["dev"], everything)):
        names = {re.split(r"[\[><=; ]", text)[0] for text in wanted} - {"gradstore", "torch"}
        assert names <= {pin.partition("==")[0] for pin in locked}


def pins(lock: Path) -> set[str]:
    """The `name==version` of a lock, each of which must have a hash."""
    text = lock.read_text()
    found = re.findall(r"^([a-z0-9.-]+==[^ \\\n]+)[^\n]*\\\n    --hash=sha256:", text, re.MULTILINE)
    assert len(found) == len(re.findall(r"^\S", text, re.MULTILINE))
    return set(found)
