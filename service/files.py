"""Arrays and tables as the files that a request asks for by `format` or `Accept`: npy, safetensors and Parquet."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from gradstore.types import AnyJob
from gradstore.types import Request as RequestBody
from numpy.typing import NDArray
from pydantic import Field

from datastore.errors import InvalidInput
from datastore.feature_files import ArrayFile, safetensors_of
from datastore.leases import collection

NPY = "application/x-npy"
PARQUET = "application/vnd.apache.parquet"
SAFETENSORS = "application/x-safetensors"
Format = Literal["json", "npy", "parquet", "safetensors"]
ArrayFormat = Literal["npy", "safetensors"]


class ArrayQuery(RequestBody):
    """Which rows of an array are wanted, and how."""

    format: ArrayFormat | None = None
    """By default what `Accept` asks for, else npy."""
    start: int = Field(0, ge=0)
    """The first row."""
    stop: int | None = Field(None, ge=0)
    """The row after the last one; by default all rows."""

    def span(self, name: str, rows: int) -> tuple[int, int]:
        """First and last of the rows, as a slice has them. Raises `InvalidInput` where there are no such rows."""
        start, stop = self.start, rows if self.stop is None else self.stop
        if not start <= stop <= rows:
            raise InvalidInput(f"start and stop: {name} has the rows 0 to {rows}, and no rows {start}:{stop}")
        return start, stop

    def form(self, request: Request) -> ArrayFormat:
        """The format that is named, else the one that the request accepts, else npy."""
        accepted = wanted_type(request, [NPY, SAFETENSORS])
        return self.format or ("safetensors" if accepted == SAFETENSORS else "npy")


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


def array(file: ArrayFile, name: str, form: ArrayFormat, *, tag: str, of: AnyJob) -> Response:
    """A file of numbers of a job, made while it is sent; raises what reading its first rows raises."""
    headers = {
        "Content-Disposition": f'attachment; filename="{name}.{form}"',
        "Content-Length": str(file.length),
        "ETag": tag,
        "Link": f'<{collection(of.kind)}/{of.id}>; rel="describedby"; type="application/json"',
    }
    pieces = iter(file.pieces())
    begun = list(islice(pieces, 2))  # what is wrong with the first rows is answered, and breaks no answer off
    media_type = SAFETENSORS if form == "safetensors" else NPY
    return StreamingResponse(chain(begun, pieces), media_type=media_type, headers=headers)


def tag(*parts: str) -> str:
    """An entity tag of what decides the bytes of a file that is made while it is sent."""
    return f'"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"'


def _download(content: io.BytesIO, media_type: str, filename: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return Response(content.getvalue(), media_type=media_type, headers=headers)
