"""Which device a worker computes on, and how many workers a command starts: names only, until one is really chosen.

A worker sees its own GPU alone: the Trainer would split batches over all that it sees. `spread` is the exception, for
models larger than one GPU: a single worker, whose models lie over all GPUs, layer after layer.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from gradstore.types import Memory

if TYPE_CHECKING:
    import torch

ALL, SPREAD = "all", "spread"
ONE = re.compile(r"auto|cpu|cuda(:\d+)?")


def workers(asked: str, processes: int) -> list[str]:
    """The device of each worker that is asked for: `processes` of them for each device.

    Raises typer.BadParameter for what is no device, and for `all` where there is no GPU.

    >>> workers("cuda:0,cuda:1", 2)
    ['cuda:0', 'cuda:0', 'cuda:1', 'cuda:1']
    """
    names = _gpus() if asked == ALL else asked.split(",")
    for name in names:
        if not (ONE.fullmatch(name) or asked == SPREAD):
            raise typer.BadParameter(
                f"{name!r} is no device; there are auto, cpu, cuda, cuda:0 and so on, several of them with commas, "
                f"{ALL} (a worker for each GPU) and {SPREAD} (one worker whose models lie over all GPUs)"
            )
    return [name for name in names for _ in range(processes)]


def threads(asked: int, processes: int) -> int:
    """CPU threads of each of some processes that share the cores: as many as asked for, else their part of the cores.

    More threads than cores stand in each other's way.
    """
    return asked or max(1, len(os.sched_getaffinity(0)) // processes)


def choose_device(name: str) -> torch.device:
    """The device of this worker: `auto` is the first GPU, else the CPU; `spread` is the first of all.

    Raises typer.BadParameter for a GPU that is not there.
    """
    index = int(name.partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = [one for one in visible.split(",") if one.strip()] if visible is not None else None
    if name not in {"cpu", SPREAD} and (shown is None or index < len(shown)):
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index) if shown is None else shown[index]
    import torch  # noqa: PLC0415 - it reads the variable above

    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available() and (shown is None or index < len(shown)):
        return torch.device("cuda", 0)
    if name != "auto":
        raise typer.BadParameter(f"there is no GPU {name!r} that torch {torch.__version__} can use")
    return torch.device("cpu")


def memory(device: torch.device) -> Memory:
    """The memory of a GPU, whoever uses it, or of this process and its machine."""
    if device.type == "cuda":
        import torch  # noqa: PLC0415 - heavy

        free, total = torch.cuda.mem_get_info(device)
        return Memory(used=total - free, total=total)
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1])  # pages
    return Memory(used=resident * page, total=os.sysconf("SC_PHYS_PAGES") * page)


def _gpus() -> list[str]:
    import torch  # noqa: PLC0415 - heavy, and asked for nothing but their number here

    if not torch.cuda.device_count():
        raise typer.BadParameter(f"there is no GPU that torch {torch.__version__} can use: name another device")
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
