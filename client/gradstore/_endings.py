"""What a file is to be, by the ending of its path: the media type or the format in which it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast, get_args

from gradstore.types import ExportFormat, TableFormat, Trainer

NPY = "application/x-npy"
SAFETENSORS = "application/x-safetensors"


def array_type(path: str | os.PathLike[str], *, what: str) -> str:
    """The media type of an array saved under a path. Raises `ValueError` where these are saved as no such file."""
    return _media_type(path, {".npy": NPY, ".safetensors": SAFETENSORS}, what=what)


def table_type(path: str | os.PathLike[str], *, what: str) -> str:
    """The media type of numbers saved under a path. Raises `ValueError` where these are saved as no such file."""
    kinds = {".npy": NPY, ".safetensors": SAFETENSORS, ".parquet": "application/vnd.apache.parquet"}
    return _media_type(path, kinds, what=what)


def _media_type(path: str | os.PathLike[str], kinds: Mapping[str, str], *, what: str) -> str:
    if Path(path).suffix not in kinds:
        raise ValueError(f"{what} are saved as {' or '.join(kinds)}, not {Path(path).name}")
    return kinds[Path(path).suffix]


def content_format(path: str | os.PathLike[str]) -> Literal["csv", "ndjson"]:
    """What `selections_save` writes under a path, by its ending. Raises `ValueError` where it writes no such file."""
    kinds: dict[str, Literal["csv", "ndjson"]] = {"": "ndjson", ".jsonl": "ndjson", ".ndjson": "ndjson", ".csv": "csv"}
    if Path(path).suffix not in kinds:
        raise ValueError(
            f"the original rows are saved as .jsonl and their table as .csv, not {Path(path).name}: other files are "
            "written by selections export (.parquet, or a trainer's folder)"
        )
    return kinds[Path(path).suffix]


def export_format(path: str | os.PathLike[str]) -> ExportFormat:
    """The table that rows are exported as under a path. Raises `ValueError` where its ending names none."""
    formats = {f".{name}": name for name in get_args(TableFormat)}
    if Path(path).suffix not in formats:
        raise ValueError(
            f"rows are exported as {', '.join(formats)}, or as a folder by format={', '.join(get_args(Trainer))}: "
            f"{Path(path).name} says none of them"
        )
    return cast("ExportFormat", formats[Path(path).suffix])
