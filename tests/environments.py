"""Virtual environments with exactly the distributions that a requirement declares, made offline in about a second.

What is declared is linked from the environment that runs the tests, so nothing is downloaded, and what is not declared
cannot be imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

IMPORT_ALL = """
import importlib, pkgutil, sys
from fnmatch import fnmatch
left_out = ["*.__main__", *sys.argv[2].split(",")]
for package in sys.argv[1].split(","):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not any(fnmatch(module.name, pattern) for pattern in left_out):
            importlib.import_module(module.name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


class Environment:
    """A virtual environment away from the tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self._elsewhere = folder / "elsewhere"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self._elsewhere.mkdir()
        self._linked = folder / "linked"
        self._linked.mkdir()
        self.see(self._linked)

    def see(self, *folders: Path) -> None:
        """Make what lies in these folders importable."""
        site = next(self.folder.glob("lib/python3*/site-packages"))
        with (site / "seen.pth").open("a") as file:
            file.writelines(f"{folder}\n" for folder in folders)

    def link(self, requirements: Iterable[str]) -> None:
        """Make the installed distributions that the requirements need importable, and no others."""
        for name in closure(requirements):
            distribution = metadata.distribution(name)
            for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                link = self._linked / top
                if not link.exists():
                    link.symlink_to(Path(str(distribution.locate_file(top))))

    def install(self, *requirements: str) -> None:
        """Install wheels without an index: pip refuses one whose requirements are not there already."""
        pip = [sys.executable, "-m", "pip", f"--python={self.bin / 'python'}", "install", "--quiet", "--no-index"]
        subprocess.run([*pip, "--disable-pip-version-check", *requirements], check=True)

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in a folder with nothing in it."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GRADSTORE"))
        }
        environment["PATH"] = f"{self.bin}{os.pathsep}{environment['PATH']}"
        done = subprocess.run(
            command, cwd=self._elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done

    def import_all(self, *packages: str, leave_out: Iterable[str] = ()) -> set[str]:
        """Import the packages' modules, but for such names (`*` as in files); returns the top-level names loaded."""
        done = self.run(self.bin / "python", "-c", IMPORT_ALL, ",".join(packages), ",".join(leave_out))
        return set(done.stdout.split())


def closure(requirements: Iterable[str]) -> set[str]:
    """The names of all installed distributions that the requirements need, directly and through each other."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in found:
                found.add((name, extra))
                waiting.extend(_needed(name, extra))
    return {name for name, _ in found}


def _needed(name: str, extra: str) -> Iterator[Requirement]:
    for text in metadata.requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement
