"""Arrays and tables as the files that a request asks for by `format` or `Accept`: npy, safetensors and Parquet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fastapi import Request, Response
from numpy.typing import NDArray

from datastore.feature_files import safetensors_of

NPY = "application/x-npy"
PARQUET = "application/vnd.apache.parquet"
SAFETENSORS = "application/x-safetensors"
Format = Literal["json", "npy", "parquet", "safetensors"]


def wanted_type(request: Request, offered: Sequence[str]) -> str | None:
    """The first media type of the request's `Accept` that is offered; None leaves it to the route's own."""
    for part in request.headers.get("accept", "").split(","):
        media_type = part.partition(";")[0].strip().lower()
        if media_type in offered:
            return media_type
    return None


def wanted_format(request: Request, named: Format | None) -> Format:
    """The format that a request names, else the one it accepts, else JSON."""
    accepted: dict[str | None, Format] = {NPY: "npy", PARQUET: "parquet", SAFETENSORS: "safetensors"}
    return named or accepted.get(wanted_type(request, [NPY, PARQUET, SAFETENSORS]), "json")


def npy(array: NDArray[Any], name: str) -> Response:
    """An array as `name.npy`."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return _download(buffer, NPY, f"{name}.npy")


def parquet(table: pa.Table, name: str) -> Response:
    """A table as `name.parquet`."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return _download(buffer, PARQUET, f"{name}.parquet")


def safetensors(arrays: Mapping[str, NDArray[Any]], name: str, *, metadata: str) -> Response:
    """Arrays as `name.safetensors`, with what they are."""
    return _download(io.BytesIO(safetensors_of(arrays, metadata=metadata)), SAFETENSORS, f"{name}.safetensors")


def _download(content: io.BytesIO, media_type: str, filename: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return Response(content.getvalue(), media_type=media_type, headers=headers)
