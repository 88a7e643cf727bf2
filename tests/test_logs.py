"""The log of a process: one line an event, whoever writes it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CONFIGURE, IMPORT = "from datastore import logs; logs.configure()", "import huggingface_hub.utils.logging as hub"


@pytest.mark.parametrize("order", [(CONFIGURE, IMPORT), (IMPORT, CONFIGURE)], ids=["before", "after"])
def test_a_line_of_the_hubs_library_is_written_once(order: tuple[str, str]) -> None:
    program = "\n".join([*order, "hub.get_logger('huggingface_hub.file_download').warning('slow')"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    [line] = done.stderr.splitlines()
    assert line.endswith(" WARNING huggingface_hub.file_download: slow")
