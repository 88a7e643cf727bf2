"""Uploads: a multipart body parsed while it arrives, its files written to the store's own disk, never held in memory.

Starlette's parser spools files to the system's temporary folder, which is often small or in memory, and knows no limit
on a file. Here the body goes in steps of 1 MiB through python-multipart's parser to a folder beside the datasets;
hashing it on the way (an Idempotency-Key must not come back with another file) costs about a second a gigabyte.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from anyio import CancelScope
from anyio.to_thread import run_sync
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from gradstore.types import ProblemItem
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from datastore.archives import safe_name, unpack
from datastore.errors import InvalidInput, TooLarge
from service.problems import Unreadable, UnsupportedMediaType

MEDIA_TYPE = "multipart/form-data"
STEP = 1 << 20  # bytes handed to the parser at once
MAX_FILES = 5000
MAX_FIELDS = 64
MAX_FIELD_BYTES = 1 << 16  # of all fields together
FILES, UNPACKED = "files", "unpacked"
"""Folders of a form."""

FormT = TypeVar("FormT", bound=BaseModel)


@dataclass(frozen=True)
class ReceivedFile:
    """A file of the form; `name` is relative and stays inside the form's folder."""

    field: str
    name: str
    path: Path
    bytes: int
    sha256: str


@dataclass
class Form:
    """A received form: its fields as text, its files in a folder of their own that goes with the request."""

    folder: Path
    fields: dict[str, str] = field(default_factory=dict)
    files: list[ReceivedFile] = field(default_factory=list)

    def read(self, model: type[FormT], *, files: Iterable[str]) -> FormT:
        """The fields as `model` has them; `files` are the names that the form's files may have."""
        allowed = set(files)
        stray = [file.field for file in self.files if file.field not in allowed]
        known = set(model.model_fields) | allowed
        if stray:
            wanted = " or ".join(f"{name!r}" for name in sorted(allowed))
            items = [ProblemItem(parameter=name, detail=f"files are sent as {wanted}") for name in dict.fromkeys(stray)]
            raise InvalidInput(f"the form has a file {stray[0]!r}; files are sent as {wanted}", errors=items)
        unsent = [name for name in self.fields if name in allowed and name not in model.model_fields]
        if unsent:
            detail = "this is a file: it needs a filename in its Content-Disposition"
            raise InvalidInput(f"{unsent[0]}: {detail}", errors=[ProblemItem(parameter=unsent[0], detail=detail)])
        try:
            return model.model_validate(self.fields)
        except ValidationError as error:
            errors = [{**item, "loc": ("form", *item["loc"])} for item in error.errors(include_context=False)]
            for item in errors:
                if item["type"] == "extra_forbidden":
                    item.update(type="unknown", msg=f"there is no such field; there are {', '.join(sorted(known))}")
            raise RequestValidationError(errors) from error

    def only_file(self, name: str) -> ReceivedFile:
        """The one file of the form."""
        if len(self.files) == 1:
            return self.files[0]
        detail = "send one file" if not self.files else f"send one file, not {len(self.files)}"
        raise InvalidInput(f"{name}: {detail}", errors=[ProblemItem(parameter=name, detail=detail)])

    def content(self) -> Path:
        """The folder of the files, or of what they are packed in. Raises `InvalidInput` and `TooLarge`."""
        if not self.files:
            detail = "send at least one file"
            raise InvalidInput(f"files: {detail}", errors=[ProblemItem(parameter="files", detail=detail)])
        if len(self.files) > 1:
            return self.folder / FILES
        file = self.files[0]
        with file.path.open("rb") as packed:
            unpack(packed, file.name, self.folder / UNPACKED)
        return self.folder / UNPACKED

    @property
    def fingerprint(self) -> bytes:
        """What makes two forms the same, however they were packed."""
        content = [sorted(self.fields.items()), [(file.field, file.name, file.sha256) for file in self.files]]
        return repr(content).encode()


@asynccontextmanager
async def received(request: Request, *, inside: Path) -> AsyncIterator[Form]:
    """Receive a multipart body into a new folder inside `inside`, deleted afterwards.

    Raises `Unreadable`, `TooLarge` and `InvalidInput`.
    """
    boundary = _boundary(request)
    parser = _FormParser(Form(await run_sync(_new_folder, inside)), boundary)
    try:
        pending = bytearray()
        async for chunk in request.stream():
            pending += chunk
            if len(pending) >= STEP:
                await run_sync(parser.write, bytes(pending))
                pending.clear()
        await run_sync(parser.finish, bytes(pending))
        yield parser.form
    finally:
        parser.close()
        with CancelScope(shield=True):
            await run_sync(shutil.rmtree, parser.form.folder)


def _new_folder(inside: Path) -> Path:
    inside.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="form-", dir=inside))


def _boundary(request: Request) -> bytes:
    _, options = parse_options_header(request.headers["content-type"])
    if not options.get(b"boundary"):
        raise Unreadable("the Content-Type of a form names its boundary: let the HTTP library make both")
    return options[b"boundary"]


class _FormParser:
    """Turns the events of python-multipart into fields and files."""

    def __init__(self, form: Form, boundary: bytes) -> None:
        self.form = form
        self._complete = False
        self._field_bytes = 0
        self._header_name, self._header_value = b"", b""
        self._disposition = b""
        self._name = ""
        self._value = bytearray()
        self._file: IO[bytes] | None = None
        self._file_name = ""
        self._digest = hashlib.sha256()
        events = (
            "part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "headers_finished",
            "end",
        )  # fmt: skip
        callbacks: Any = {f"on_{event}": getattr(self, f"_on_{event}") for event in events}
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise Unreadable(f"the form cannot be read: {error}") from error

    def write(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise Unreadable(f"the form cannot be read: {error}") from error

    def finish(self, data: bytes) -> None:
        """Take the last bytes of the body."""
        self.write(data)
        if not self._complete:
            raise Unreadable("the form ends before its last boundary: the upload was cut off")

    def close(self) -> None:
        """Close the file that an aborted upload left open."""
        if self._file is not None:
            self._file.close()

    def _on_part_begin(self) -> None:
        self._disposition = b""
        self._value.clear()
        self._file = None

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name, self._header_value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        if b"name" not in options:
            raise Unreadable("a part of the form has no name in its Content-Disposition")
        self._name = options[b"name"].decode(errors="replace")
        if b"filename" in options:
            self._open(options[b"filename"].decode(errors="replace"))
        elif len(self.form.fields) >= MAX_FIELDS:
            raise TooLarge(f"the form has more than {MAX_FIELDS} fields")

    def _open(self, filename: str) -> None:
        if len(self.form.files) >= MAX_FILES:
            raise TooLarge(f"the form has more than {MAX_FILES} files: send them as one zip")
        self._file_name = str(safe_name(filename))
        path = self.form.folder / FILES / self._file_name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
        except (FileExistsError, NotADirectoryError) as error:
            detail = f"the form has two files called {self._file_name!r}"
            raise InvalidInput(detail, errors=[ProblemItem(parameter=self._name, detail=detail)]) from error
        self._digest = hashlib.sha256()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        piece = memoryview(data)[start:end]
        if self._file is not None:
            self._file.write(piece)
            self._digest.update(piece)
            return
        self._field_bytes += len(piece)
        if self._field_bytes > MAX_FIELD_BYTES:
            raise TooLarge(f"the fields of the form hold more than {MAX_FIELD_BYTES:,} bytes; only files may be large")
        self._value += piece

    def _on_part_end(self) -> None:
        if self._file is not None:
            size = self._file.tell()
            self._file.close()
            path = self.form.folder / FILES / self._file_name
            self.form.files.append(ReceivedFile(self._name, self._file_name, path, size, self._digest.hexdigest()))
            self._file = None
            return
        if self._name in self.form.fields:
            detail = "the form has this field twice"
            raise InvalidInput(f"{self._name}: {detail}", errors=[ProblemItem(parameter=self._name, detail=detail)])
        try:
            self.form.fields[self._name] = self._value.decode()
        except UnicodeDecodeError as error:
            raise Unreadable(f"the field {self._name!r} is not UTF-8") from error

    def _on_end(self) -> None:
        self._complete = True


def form_of(request: Request) -> Form:
    """The form that came with a request. Raises `UnsupportedMediaType` where another kind of body came, or none."""
    form: Form | None = getattr(request.state, "form", None)
    if form is None:
        raise UnsupportedMediaType(f"send a form with the file in it, as {MEDIA_TYPE}")
    return form


def form_or_json(model: type[FormT]) -> Callable[[Request], Awaitable[Form | FormT]]:
    """A dependency: the form of a request, or its JSON body as `model`."""

    async def sent(request: Request) -> Form | FormT:
        body = await request.body() if getattr(request.state, "form", None) is None else b""
        if not body:
            return form_of(request)
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_url=False)]
            raise RequestValidationError(errors, body=_parsed(body)) from error

    return sent


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
