"""The client against a real server on a socket: what it sends, repeats, follows, and makes of refusals."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gradstore
import pytest
from gradstore import (
    AsyncGradientStore,
    Conflict,
    ConnectionFailed,
    GradientStore,
    Invalid,
    JobFailed,
    MissingExtra,
    NotFound,
    RequestTimeout,
    ServerError,
    Unavailable,
    UnexpectedAnswer,
    WaitTimeout,
    errors,
    frames,
)
from gradstore import _endpoints as endpoints
from gradstore._flows import Answer
from gradstore.client import Resource, call, each
from gradstore.types import (
    AttributionRequest,
    CheckpointRegister,
    Contestant,
    EvaluationRequest,
    FinetuneRequest,
    GradientsRequest,
    ImportRequest,
    LoraSettings,
    Problem,
    ProblemItem,
    ValidatedRecipe,
)
from pydantic import BaseModel

from tests import canned
from tests.canned import Answerer, Asked, CannedServer, Said, in_turn
from tests.conftest import REPOSITORY
from tests.services import free_port


@contextmanager
def serving(answerer: Answerer | Said, *, retries: int = 3) -> Iterator[tuple[CannedServer, GradientStore]]:
    """A server that answers so, and a client of it that does not pause long."""
    with (
        CannedServer(answerer if callable(answerer) else in_turn(answerer)) as server,
        GradientStore(server.url, retries=retries, backoff=0.01) as store,
    ):
        yield server, store


def asynchronously(answerer: Answerer, use: Callable[[AsyncGradientStore], Any]) -> Any:
    """Run a coroutine with an awaiting client of a server that answers so."""

    async def run(url: str) -> Any:
        async with AsyncGradientStore(url, backoff=0.01) as store:
            return await use(store)

    with CannedServer(answerer) as server:
        return asyncio.run(run(server.url))


# Both clients -----------------------------------------------------------------------------------------------------


def methods(resource: Any) -> dict[str, call[..., Any] | each[..., Any]]:
    """Every method of a client, its resources' included: dotted name → descriptor."""
    found = {}
    for name, value in inspect.getmembers_static(resource):
        if isinstance(value, call | each):
            found[name] = value
        elif isinstance(value, Resource):
            found |= {f"{name}.{inner}": method for inner, method in methods(value).items()}
    return found


def reached(store: Any, name: str) -> Any:
    for part in name.split("."):
        store = getattr(store, part)
    return store


def test_both_clients_have_the_same_methods_and_one_of_them_awaits() -> None:
    blocking, awaiting = GradientStore(), AsyncGradientStore()
    names = methods(blocking)
    assert names.keys() == methods(awaiting).keys()
    assert {"select", "datasets.upload", "jobs.events", "finetunes.wait"} <= names.keys()
    public = {name for name in dir(GradientStore) if not name.startswith("_")}
    assert public == {name for name in dir(AsyncGradientStore) if not name.startswith("_")}
    for name, descriptor in names.items():
        one, other = reached(blocking, name), reached(awaiting, name)
        assert inspect.signature(one) == inspect.signature(other)
        assert inspect.getdoc(one), f"{name} has no docstring"
        assert not inspect.iscoroutinefunction(one)
        assert inspect.iscoroutinefunction(other) is isinstance(descriptor, call)
    blocking.close()
    asyncio.run(awaiting.close())


def test_help_writes_out_what_a_method_takes() -> None:
    with GradientStore() as store:
        parameters = inspect.signature(store.finetunes.create).parameters
        assert parameters["model"].default is inspect.Parameter.empty
        assert parameters["epochs"].default is None
        assert store.finetunes.create.__qualname__ == "Finetunes.create"


@pytest.mark.parametrize(
    ("fields", "model", "positional"),
    [
        (endpoints.GradientsFields, GradientsRequest, {"dry_run"}),
        (endpoints.FinetuneFields, FinetuneRequest, {"dry_run"}),
        (endpoints.EvaluationFields, EvaluationRequest, set()),
        (endpoints.AttributionFields, AttributionRequest, {"rows"}),
        (endpoints.CheckpointFields, CheckpointRegister, {"path"}),
        (endpoints.ImportFields, ImportRequest, {"path"}),
    ],
)
def test_a_method_takes_exactly_the_fields_of_its_request(
    fields: type, model: type[BaseModel], positional: set[str]
) -> None:
    hints = get_type_hints(fields)
    assert hints.keys() == model.model_fields.keys() - positional
    for name, hint in hints.items():
        field = model.model_fields[name]
        assert (type(None) in get_args(hint)) is not field.is_required(), name
        assert _literals(hint) == _literals(field.annotation), name


def _literals(hint: Any) -> set[str]:
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return {value for part in get_args(hint) for value in _literals(part)}


def test_a_users_program_is_checked_by_its_types_and_those_of_the_pages_are_right(tmp_path: Path) -> None:
    programs = {"program": PROGRAM}
    for page in ("docs/client.md", "docs/quickstart.md", "client/README.md", "README.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / page).read_text(), re.MULTILINE | re.DOTALL)
        assert blocks, page
        name = re.sub(r"\W", "_", page)
        programs |= {f"{name}_{number}": block for number, block in enumerate(blocks)}
    for name, text in programs.items():
        (tmp_path / f"{name}.py").write_text(text)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(tmp_path)]
    done = subprocess.run(mypy, capture_output=True, text=True, check=False, cwd=tmp_path)
    wrong = [f"program:{number}" for number, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")]
    assert len(wrong) == 5
    assert [":".join(found) for found in re.findall(r"(\w+)\.py:(\d+): error", done.stdout)] == wrong, done.stdout


def test_the_page_of_the_client_names_every_call_and_every_error() -> None:
    page = (REPOSITORY / "docs/client.md").read_text()
    with GradientStore() as store:
        assert not [name for name in methods(store) if f"`{name}`" not in page]
    kinds = [name for name in vars(errors) if name in gradstore.__all__ and name != "GradstoreError"]
    assert len(kinds) > 15
    assert not [name for name in kinds if f"`{name}`" not in page]


PROGRAM = """
from collections.abc import AsyncIterator, Iterator
from typing import assert_type
from gradstore import AsyncGradientStore, GradientStore
from gradstore.types import Dataset, SelectedRow

def flow(store: GradientStore) -> None:
    pool = store.datasets.upload("pool.jsonl", name="tulu")
    warmup = store.finetunes.wait(store.finetunes.create(dataset=pool.id, model="m", fraction=0.05), progress=True)
    store.gradients.wait(store.gradients.create(dataset=pool.id, run=warmup.result.run))
    selection = store.select(task="mmlu", pct=0.05)
    tuned = store.finetunes.wait(store.finetunes.create(selection=selection.id, model="m", epochs=None))
    store.evaluations.wait(store.evaluations.create(finetune=tuned.id, tasks=["mmlu"])).result.to_pandas()
    assert_type(store.datasets.list(), Iterator[Dataset])
    assert_type(store.datasets.get("x"), Dataset)
    store.select(task="mmlu", pkt=0.05)  # wrong
    store.finetunes.create(model="m", epochs="4")  # wrong
    store.tasks.upload("x", name="x")  # wrong
    store.finetunes.get("x").result.run  # wrong

async def awaited(store: AsyncGradientStore) -> None:
    assert_type(await store.datasets.get("x"), Dataset)
    assert_type(store.datasets.list(), AsyncIterator[Dataset])
    assert_type((await store.select(task=["mmlu"], k=5)).data, list[SelectedRow])
    store.datasets.get("x").name  # wrong
"""


# Where it connects ------------------------------------------------------------------------------------------------


def test_the_constructor_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSTORE_URL", raising=False)
    with GradientStore() as store:
        assert store.url == "http://localhost:8000"
    monkeypatch.setenv("GRADSTORE_URL", "http://elsewhere:1/")
    with GradientStore() as store:
        assert store.url == "http://elsewhere:1"
    with GradientStore("https://here/prefix/") as store:
        assert store.url == "https://here/prefix"


def test_an_address_without_a_scheme_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="http://"):
        GradientStore("localhost:8000")


def test_the_key_and_the_version_travel_with_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_API_KEY", "secret")
    with serving(Said(canned.dataset())) as (server, store):
        store.datasets.get("pool")
    assert server.asked[0].headers["Authorization"] == "Bearer secret"
    assert server.asked[0].headers["User-Agent"].startswith("gradstore/")


@pytest.mark.parametrize("name", ["a b", "50%25", "ünïcode ☃", "what?#&=", "a+b", 'quo"te'])
def test_any_name_reaches_the_server_as_it_is(name: str) -> None:
    with serving(Said(canned.dataset())) as (server, store):
        store.datasets.get(name)
    assert server.asked[0].path == f"/datasets/{name}"


def test_a_prefix_in_the_address_is_kept() -> None:
    with (
        CannedServer(in_turn(Said(canned.dataset()))) as server,
        GradientStore(f"{server.url}/api/v1/") as store,
    ):
        store.datasets.get("pool")
    assert server.asked[0].path == "/api/v1/datasets/pool"


def test_an_empty_name_asks_nothing() -> None:
    with serving(Said(canned.dataset())) as (server, store):
        with pytest.raises(ValueError, match="empty"):
            store.datasets.delete("")
        assert not server.asked


# Retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_passing_failure_is_tried_again(status: int) -> None:
    failure = Said(canned.problem(status, "later"), status=status)
    with serving(in_turn(failure, failure, Said(canned.dataset()))) as (server, store):
        assert store.datasets.get("pool").id == "ds_pool"
    assert len(server.asked) == 3


def test_a_broken_connection_is_tried_again() -> None:
    broken, cut = Said(canned.dataset(), breaks_after=0), Said(canned.dataset(), breaks_after=10)
    with serving(in_turn(broken, cut, Said(canned.dataset()))) as (server, store):
        assert store.datasets.get("pool").id == "ds_pool"
    assert len(server.asked) == 3


def test_a_retried_post_repeats_its_key_and_another_post_has_another() -> None:
    failures = (Said(status=503), Said(canned.job("queued"), breaks_after=0), Said(status=502))
    with serving(in_turn(*failures, Said(canned.job("queued"), status=202))) as (server, store):
        store.finetunes.create(dataset="ds_pool", model="tiny")
        store.finetunes.create(dataset="ds_pool", model="tiny")
        store.datasets.list()
    keys = [asked.headers["Idempotency-Key"] for asked in server.asked]
    assert len(keys) == 5
    assert len(set(keys[:4])) == 1
    assert len(keys[0]) >= 16
    assert keys[4] not in keys[:4]


def test_a_get_carries_no_idempotency_key() -> None:
    with serving(Said(canned.dataset())) as (server, store):
        store.datasets.get("pool")
    assert "Idempotency-Key" not in server.asked[0].headers


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    with serving(Said(canned.problem(status, "no"), status=status)) as (server, store):
        with pytest.raises(errors.APIError):
            store.finetunes.create(model="tiny")
        assert len(server.asked) == 1


def test_retries_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Said(canned.problem(503, "the broker is away"), status=503), retries=2) as (server, store):
        with pytest.raises(Unavailable, match="broker"):
            store.health()
        assert len(server.asked) == 3


def test_nobody_listening_says_what_to_start() -> None:
    with (
        GradientStore(f"http://127.0.0.1:{free_port()}", retries=1, backoff=0.01) as store,
        pytest.raises(ConnectionFailed, match="gradstore serve"),
    ):
        store.health()


def test_a_server_that_comes_up_late_is_reached() -> None:
    port = free_port()
    late = CannedServer(in_turn(Said(canned.dataset())), port=port)
    late._server.server_close()
    with GradientStore(f"http://127.0.0.1:{port}", retries=8, backoff=0.05) as store:
        results: list[str] = []
        asking = threading.Thread(target=lambda: results.append(store.datasets.get("pool").id))
        asking.start()
        time.sleep(0.2)
        with CannedServer(in_turn(Said(canned.dataset())), port=port):
            asking.join(timeout=20)
    assert results == ["ds_pool"]


def test_a_silent_server_is_a_timeout() -> None:
    released = threading.Event()

    def silent(_: Asked) -> Said:
        released.wait(10)
        return Said(canned.dataset())

    with CannedServer(silent) as server, GradientStore(server.url, timeout=0.1, retries=0) as store:
        with pytest.raises(RequestTimeout, match="in time"):
            store.datasets.get("pool")
        released.set()


def test_the_pause_the_server_asks_for_is_kept() -> None:
    with serving(in_turn(Said(status=429, headers={"Retry-After": "1"}), Said(canned.dataset()))) as (_, store):
        started = time.monotonic()
        store.datasets.get("pool")
        assert time.monotonic() - started >= 1


def test_a_pause_may_be_asked_for_as_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    asked = Answer(503, {"retry-after": date}).retry_after()
    assert asked is not None
    assert 15 < asked <= 20
    assert Answer(503, {"retry-after": "soon"}).retry_after() is None
    assert Answer(503, {}).retry_after() is None


def test_a_delete_whose_answer_was_lost_counts_as_done() -> None:
    gone = Said(canned.problem(404, "no such dataset"), status=404)
    with serving(in_turn(Said(breaks_after=0), gone)) as (_, store):
        store.datasets.delete("pool")
    with serving(gone) as (_, store), pytest.raises(NotFound):
        store.datasets.delete("pool")


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequest),
        (401, errors.NotAuthenticated),
        (403, errors.NotAllowed),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (413, errors.TooLarge),
        (418, errors.APIError),
        (422, errors.Invalid),
        (429, errors.TooManyRequests),
        (500, errors.ServerError),
        (503, errors.Unavailable),
        (507, errors.NotEnoughSpace),
    ],
)
def test_each_status_has_its_error(status: int, kind: type[errors.APIError]) -> None:
    refusal = Said(canned.problem(status, "because"), status=status, headers={"X-Request-ID": "req_8"})
    with serving(refusal, retries=0) as (_, store), pytest.raises(kind) as caught:
        store.health()
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert caught.value.problem.detail == "because"
    assert caught.value.request_id == "req_8"


def test_a_refused_upload_names_its_first_lines_and_counts_the_rest(tmp_path: Path) -> None:
    lines = [{"detail": "not JSON", "line": number} for number in range(1, 21)]
    refusal = canned.problem(422, "100 rows cannot be taken", errors=lines, total_errors=100)
    (tmp_path / "pool.jsonl").write_text("x")
    with serving(Said(refusal, status=422)) as (_, store), pytest.raises(Invalid) as caught:
        store.datasets.upload(tmp_path / "pool.jsonl")
    message = str(caught.value)
    assert message.startswith("100 rows cannot be taken\n  line 1: not JSON\n")
    assert message.count("\n") == 11
    assert message.endswith("… and 90 more")


def test_a_place_is_named_however_it_is_given() -> None:
    items = [ProblemItem(parameter="pct", detail="5 % is 0.05"), ProblemItem(pointer="/epochs", detail="too many")]
    problem = Problem(type="about:blank", title="Invalid", status=422, detail="no", errors=items)
    assert errors.describe(problem) == "no\n  pct: 5 % is 0.05\n  /epochs: too many"


def test_a_proxys_page_is_an_error_with_its_text() -> None:
    html = Said(status=500, body=b"<html>Bad\n gateway</html>", headers={"Content-Type": "text/html"})
    with serving(html) as (_, store), pytest.raises(ServerError, match="<html>Bad gateway</html>"):
        store.health()


@pytest.mark.parametrize("body", [b"<html>hello</html>", b'{"unrelated": 1}', b""], ids=["html", "json", "nothing"])
def test_another_program_at_the_address_is_named(body: bytes) -> None:
    with serving(Said(body=body)) as (_, store), pytest.raises(UnexpectedAnswer, match="gradstore server"):
        store.health()


def test_a_redirect_is_not_followed_but_told() -> None:
    moved = Said(status=301, headers={"Location": "https://elsewhere/health"})
    with serving(moved) as (_, store), pytest.raises(UnexpectedAnswer, match="https://elsewhere/health"):
        store.health()


def test_an_older_client_reads_a_newer_servers_answers() -> None:
    newer = canned.job("succeeded", hue="blue")
    newer["request"]["invented_later"] = 1
    newer["result"]["also_later"] = [2]
    with serving(Said(newer)) as (_, store):
        assert store.finetunes.get("ft_1").request.model == "tiny"
        assert store.finetunes.wait("ft_1").result.run == "run_1"
        assert store.jobs.get("ft_1").model_dump()["request"]["invented_later"] == 1


# Lists ------------------------------------------------------------------------------------------------------------


def test_a_list_walks_all_pages_and_no_further_than_it_is_read() -> None:
    items = [canned.dataset(str(number)) for number in range(7)]
    with serving(lambda asked: canned.page(items, asked, size=3)) as (server, store):
        found = store.datasets.list()
        assert not server.asked
        assert [next(found).id for _ in range(2)] == ["ds_0", "ds_1"]
        assert len(server.asked) == 1
        assert [item.id for item in found] == ["ds_2", "ds_3", "ds_4", "ds_5", "ds_6"]
    assert [asked.query.get("after") for asked in server.asked] == [None, ["ds_2"], ["ds_5"]]


def test_a_list_keeps_its_filter_on_every_page() -> None:
    jobs = [canned.job("failed", id=f"ft_{number}") for number in range(3)]
    with serving(lambda asked: canned.page(jobs, asked, size=2)) as (server, store):
        assert len(list(store.jobs.list(kind="finetune", status="failed"))) == 3
    assert all(asked.query["kind"] == ["finetune"] and asked.query["status"] == ["failed"] for asked in server.asked)


def test_the_awaiting_client_lists_gets_and_deletes() -> None:
    items = [canned.dataset(str(number)) for number in range(5)]

    async def use(store: AsyncGradientStore) -> list[str]:
        await store.datasets.delete("pool")
        return [item.id async for item in store.datasets.list()]

    def answer(asked: Asked) -> Said:
        return Said(status=204) if asked.method == "DELETE" else canned.page(items, asked, size=2)

    assert asynchronously(answer, use) == [f"ds_{number}" for number in range(5)]


# Uploads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' * 5000)
    return path


def test_an_upload_sends_the_file_with_its_name_and_length(pool: Path) -> None:
    with serving(Said(canned.uploaded(), status=201)) as (server, store):
        stored = store.datasets.upload(pool, name="tulu", on_error="skip", append_to="ds_0", replace=True)
    assert stored.created
    parts = server.asked[0].parts
    assert parts["file"] == ("pool.jsonl", pool.read_bytes())
    assert {name: value for name, (_, value) in parts.items() if name != "file"} == {
        "name": b"tulu",
        "on_error": b"skip",
        "append_to": b"ds_0",
        "replace": b"true",
    }
    assert int(server.asked[0].headers["Content-Length"]) > pool.stat().st_size


def test_a_retried_upload_sends_the_whole_file_again(pool: Path) -> None:
    with (
        serving(in_turn(Said(status=503), Said(breaks_after=0), Said(canned.uploaded()))) as (server, store),
        pool.open("rb") as file,
    ):
        file.seek(35)
        store.datasets.upload(file)
        assert not file.closed
    assert [asked.parts["file"] for asked in server.asked] == [("pool.jsonl", pool.read_bytes()[35:])] * 3
    assert len({asked.headers["Idempotency-Key"] for asked in server.asked}) == 1


def test_a_pipe_is_sent_once() -> None:
    def piped(store: GradientStore) -> None:
        reading, writing = os.pipe()
        with os.fdopen(writing, "wb") as end:
            end.write(b"one\ntwo\n")
        with os.fdopen(reading, "rb") as file:
            store.datasets.upload(file, filename="pool.jsonl")

    with serving(Said(canned.uploaded())) as (server, store):
        piped(store)
    assert server.asked[0].parts["file"] == ("pool.jsonl", b"one\ntwo\n")
    with serving(in_turn(Said(status=503), Said(canned.uploaded()))) as (server, store):
        with pytest.raises(ConnectionFailed, match="pipe"):
            piped(store)
        assert len(server.asked) == 1


def test_a_folder_is_zipped_on_its_way(tmp_path: Path) -> None:
    folder = tmp_path / "mmlu"
    (folder / "dev").mkdir(parents=True)
    (folder / "dev" / "anatomy_dev.csv").write_text("question,A,B,C,D,A\n")
    (folder / "large.bin").write_bytes(os.urandom(3_000_000))
    (folder / ".hidden").write_text("no")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("no")
    with serving(in_turn(Said(status=503), Said(canned.task(), status=201))) as (server, store):
        store.tasks.upload(folder, name="mmlu", kind="mmlu")
    first, second = (asked.parts["files"] for asked in server.asked)
    assert first == second, "a retry must send the same bytes, or the server refuses its key"
    filename, content = second
    assert filename == "mmlu.zip"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["dev/anatomy_dev.csv", "large.bin"]
        assert archive.read("large.bin") == (folder / "large.bin").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"mmlu"}


def test_what_cannot_be_sent_is_said_before_anything_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with serving(Said(canned.task())) as (server, store):
        with pytest.raises(FileNotFoundError):
            store.datasets.upload(tmp_path / "missing.jsonl")
        with pytest.raises(ValueError, match="holds no files"):
            store.tasks.upload(tmp_path / "empty", name="x", kind="jsonl")
        with pytest.raises(TypeError, match="binary"):
            store.datasets.upload(io.StringIO("text"))  # type: ignore[arg-type]  # the mistake under test
        assert not server.asked


def test_an_upload_shows_its_progress_on_stderr(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Said(canned.uploaded())) as (_, store):
        store.datasets.upload(pool, progress=True)
        shown = capsys.readouterr()
        store.datasets.upload(pool)
    assert "pool.jsonl: 100%" in shown.err
    assert not shown.out
    assert not capsys.readouterr().err


def test_the_awaiting_client_uploads_and_retries(pool: Path) -> None:
    sent = []

    def answer(asked: Asked) -> Said:
        sent.append(asked.parts["file"][1])
        return Said(status=503) if len(sent) == 1 else Said(canned.uploaded())

    async def use(store: AsyncGradientStore) -> str:
        return (await store.datasets.upload(pool)).id

    assert asynchronously(answer, use) == "ds_pool"
    assert sent == [pool.read_bytes()] * 2


# Requests ---------------------------------------------------------------------------------------------------------


def test_only_what_is_given_is_sent() -> None:
    with serving(Said(canned.job("queued"), status=202)) as (server, store):
        store.finetunes.create(model="tiny", dataset="ds_pool", epochs=None, lora=LoraSettings(r=8))
    assert server.asked[0].json == {
        "model": "tiny",
        "dataset": "ds_pool",
        "lora": {"r": 8},
    }


def test_one_value_stands_for_a_list_of_one() -> None:
    with serving(Said(canned.job("queued", kind="evaluation"), status=202)) as (server, store):
        store.evaluations.create(finetune="ft_1", tasks="mmlu")
    with serving(Said(canned.job("queued", kind="gradients"), status=202)) as (other, store):
        store.gradients.create(task="mmlu", checkpoints="ck_1", dims=4096)
    assert server.asked[0].json == {"finetune": "ft_1", "tasks": ["mmlu"]}
    assert other.asked[0].json == {"task": "mmlu", "checkpoints": ["ck_1"], "dims": [4096]}


def test_scores_to_judge_are_bodies_or_mappings() -> None:
    with serving(Said(canned.job("queued", kind="validation"), status=202)) as (server, store):
        wanted = [ValidatedRecipe(kind="adam", label="mine"), {"control": "random"}]
        store.validations.create(dataset="pool", task="mmlu", model="tiny", scores=wanted, lora=LoraSettings(r=8))
    assert server.asked[0].json == {
        "dataset": "pool", "task": "mmlu", "model": "tiny", "lora": {"r": 8},
        "scores": [{"kind": "adam", "label": "mine"}, {"control": "random"}],
    }  # fmt: skip
    with serving(Said(canned.validation_estimate())) as (server, store):
        assert store.validations.estimate(dataset="pool", task="mmlu", model="tiny").trainings == 64
    assert server.asked[0].json["dry_run"] is True


def test_comparing_begins_the_job_and_waits_for_its_table() -> None:
    def answer(asked: Asked) -> Said:
        return Said(canned.job("queued" if asked.method == "POST" else "succeeded", kind="comparison"))

    with serving(answer) as (server, store):
        found = store.compare(
            dataset="pool", tasks="mmlu", k=2, contestants=[Contestant(method="bm25"), {"kind": "adam"}]
        )
    assert [row.contestant for row in found.result.rows] == ["influence", "random"]
    assert server.asked[0].json == {
        "dataset": "pool", "tasks": ["mmlu"], "k": 2, "contestants": [{"method": "bm25"}, {"kind": "adam"}],
    }  # fmt: skip
    assert (server.asked[1].method, server.asked[1].path) == ("GET", "/comparisons/cmp_1")
    with serving(Said(canned.comparison_estimate())) as (server, store):
        assert store.comparisons.estimate(dataset="pool", tasks="mmlu", pct=0.05).trainings == 11
    assert server.asked[0].json["dry_run"] is True


def test_an_estimate_is_a_dry_run_of_the_same_request() -> None:
    with serving(Said(canned.estimate())) as (server, store):
        assert store.gradients.estimate(dataset="ds_pool", run="run_1").rows == 3
        assert store.finetunes.estimate(dataset="ds_pool", model="tiny").tokens == 99
    assert [asked.json.pop("dry_run") for asked in server.asked] == [True, True]
    assert [asked.path for asked in server.asked] == ["/gradients", "/finetunes"]


def test_a_name_can_be_taken_away() -> None:
    with serving(Said(canned.dataset())) as (server, store):
        store.datasets.rename("pool", None)
        store.datasets.rename("ds_pool", "new")
    assert [asked.json for asked in server.asked] == [{"name": None}, {"name": "new"}]
    assert {asked.method for asked in server.asked} == {"PATCH"}


# Waiting ----------------------------------------------------------------------------------------------------------


def test_wait_returns_the_job_when_it_has_succeeded() -> None:
    states = [Said(canned.job(status)) for status in ("queued", "running", "running", "succeeded")]
    with serving(in_turn(*states)) as (server, store):
        done = store.finetunes.wait("ft_1", poll=0.01)
    assert done.status == "succeeded"
    assert done.result.loss_curve[0].loss == 2.5
    assert {asked.path for asked in server.asked} == {"/finetunes/ft_1"}
    assert len(server.asked) == 4


def test_wait_raises_with_the_reason_of_a_failed_job() -> None:
    reason = canned.problem(500, "the loss is not finite at step 3", instance="log_9")
    with (
        serving(in_turn(Said(canned.job("running")), Said(canned.job("failed", error=reason)))) as (_, store),
        pytest.raises(JobFailed, match="ft_1 failed: the loss is not finite") as caught,
    ):
        store.jobs.wait("ft_1", poll=0.01)
    assert caught.value.job.id == "ft_1"
    assert caught.value.problem is not None
    assert caught.value.request_id == "log_9"


def test_a_cancelled_job_is_no_success() -> None:
    with serving(Said(canned.job("cancelled"))) as (_, store), pytest.raises(JobFailed, match="cancelled"):
        store.finetunes.wait("ft_1")


def test_wait_ends_at_its_timeout_with_the_last_state() -> None:
    with serving(Said(canned.job("running"))) as (_, store):
        started = time.monotonic()
        with pytest.raises(WaitTimeout, match="running") as caught:
            store.finetunes.wait("ft_1", timeout=0.3, poll=0.1)
        assert 0.3 <= time.monotonic() - started < 3
    assert caught.value.job is not None
    assert caught.value.job.progress.done == 4
    assert isinstance(caught.value, TimeoutError)


def test_wait_outlives_a_restart_of_the_server() -> None:
    first = CannedServer(in_turn(Said(canned.job("running"))))
    with GradientStore(first.url, retries=0, backoff=0.01) as store:
        results: list[str] = []
        waiting = threading.Thread(target=lambda: results.append(store.finetunes.wait("ft_1", poll=0.02).status))
        with first:
            waiting.start()
            while not first.asked:
                time.sleep(0.01)
        time.sleep(0.2)
        with CannedServer(in_turn(Said(status=503), Said(canned.job("succeeded"))), port=first.port):
            waiting.join(timeout=20)
    assert results == ["succeeded"]


def test_wait_gives_up_on_a_server_that_stays_away_when_its_time_is_over() -> None:
    with GradientStore(f"http://127.0.0.1:{free_port()}", backoff=0.01) as store:
        started = time.monotonic()
        with pytest.raises(WaitTimeout, match="has not answered"):
            store.finetunes.wait("ft_1", timeout=0.3)
        assert time.monotonic() - started < 3


def test_wait_does_not_repeat_a_refusal() -> None:
    with serving(Said(canned.problem(404, "no such job"), status=404)) as (server, store):
        with pytest.raises(NotFound):
            store.jobs.wait("ft_9")
        assert len(server.asked) == 1


def test_wait_asks_as_seldom_as_the_server_wants() -> None:
    running = Said(canned.job("running"), headers={"Retry-After": "1"})
    with serving(in_turn(running, Said(canned.job("succeeded")))) as (server, store):
        started = time.monotonic()
        store.jobs.wait("ft_1", poll=0.01)
        assert time.monotonic() - started >= 1
    assert len(server.asked) == 2


def test_wait_shows_the_servers_own_rate_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    states = [Said(canned.job(status)) for status in ("queued", "running", "succeeded")]
    with serving(in_turn(*states)) as (_, store):
        store.jobs.wait("ft_1", progress=True, poll=0.01)
    shown = capsys.readouterr()
    assert not shown.out
    assert "finetune ft_1" in shown.err
    assert "4/10 steps" in shown.err
    assert "2 steps/s, 0:00:03 left" in shown.err
    assert "10/10" in shown.err


def test_the_awaiting_client_waits_without_holding_the_loop() -> None:
    states = in_turn(*[Said(canned.job("running"))] * 5, Said(canned.job("succeeded")))

    async def use(store: AsyncGradientStore) -> tuple[str, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        ticking = asyncio.create_task(tick())
        done = await store.finetunes.wait("ft_1", poll=0.05)
        ticking.cancel()
        return done.result.run, ticks

    run, ticks = asynchronously(states, use)
    assert run == "run_1"
    assert ticks > 5


def sse(*jobs: dict[str, Any]) -> bytes:
    return b"".join(b"event: progress\ndata: " + json.dumps(job).encode() + b"\n\n" for job in jobs)


def test_events_go_on_over_a_broken_connection() -> None:
    first = sse(canned.job("queued"), canned.job("running"))
    second = b": still here\n\n" + sse(canned.job("running"), canned.job("succeeded"), canned.job("succeeded"))
    stream = {"Content-Type": "text/event-stream"}
    broken = Said(body=first + b"data: {", headers=stream, breaks_after=len(first) + 3)
    with serving(in_turn(broken, Said(body=second, headers=stream))) as (server, store):
        assert [state.status for state in store.jobs.events("ft_1")] == ["queued", "running", "running", "succeeded"]
    assert [asked.path for asked in server.asked] == ["/jobs/ft_1/events"] * 2


def test_events_of_an_unknown_job_are_refused() -> None:
    with serving(Said(canned.problem(404, "none"), status=404)) as (_, store), pytest.raises(NotFound):
        next(store.jobs.events("ft_9"))


# Selection --------------------------------------------------------------------------------------------------------


def selecting(count: int, *, scored_after: int = 0) -> Answerer:
    """A service with a selection of `count` rows, whose scores are ready after so many looks at their job."""
    looks = 0

    def answer(asked: Asked) -> Said:
        nonlocal looks
        if asked.path.startswith("/jobs/"):
            looks += 1
            return Said(canned.job("succeeded" if looks >= scored_after else "running", kind="scoring"))
        if looks < scored_after:
            return Said(canned.job("queued", kind="scoring"), status=202, headers={"Location": "/jobs/score_1"})
        start = int(asked.query.get("after", ["0"])[0])
        return Said(canned.selection(count, start=start, stop=start + min(int(asked.query["limit"][0]), 1000)))

    return answer


def test_select_brings_all_chosen_rows() -> None:
    with serving(selecting(2500)) as (server, store):
        chosen = store.select(task="mmlu", pct=0.05)
    assert [row.rank for row in chosen.data] == list(range(1, 2501))
    assert not chosen.has_more
    assert [asked.path for asked in server.asked] == ["/select", "/selections/sel_1", "/selections/sel_1"]


@pytest.mark.parametrize("limit", [1, 10, 1000, 1500])
def test_select_brings_no_more_rows_than_wanted(limit: int) -> None:
    with serving(selecting(2500)) as (_, store):
        chosen = store.select(task="mmlu", pct=0.05, limit=limit)
    assert len(chosen.data) == limit
    assert chosen.count == 2500
    assert chosen.has_more


def test_select_follows_a_scoring_job() -> None:
    with serving(selecting(3, scored_after=2)) as (server, store):
        assert store.select(task="mmlu", k=3).count == 3
    assert [asked.path for asked in server.asked] == ["/select", "/jobs/score_1", "/jobs/score_1", "/select"]


def test_select_fails_with_its_scoring_job() -> None:
    def answer(asked: Asked) -> Said:
        status = "queued" if asked.path == "/select" else "failed"
        return Said(canned.job(status, kind="scoring"), status=202 if status == "queued" else 200)

    with serving(answer) as (_, store), pytest.raises(JobFailed):
        store.select(task="mmlu", k=3)


def test_select_says_exactly_what_was_asked() -> None:
    with serving(selecting(1)) as (server, store):
        store.select(
            task=["mmlu", "bbh"], dataset=("a", "b"), pct=0.05, run="r", kind="sgd", dim=64, exclude="sel_0", seed=0
        )
    query = server.asked[0].query
    assert float(query.pop("wait")[0]) <= 30
    assert query == {
        "task": ["mmlu", "bbh"],
        "dataset": ["a", "b"],
        "pct": ["0.05"],
        "run": ["r"],
        "kind": ["sgd"],
        "dim": ["64"],
        "exclude": ["sel_0"],
        "seed": ["0"],
        "limit": ["1000"],
    }


def test_select_chooses_again_by_a_recipe() -> None:
    with serving(lambda _: Said(canned.selection(1))) as (server, store):
        chosen = store.select(task="mmlu", pct=0.05, quota={"a": 0.5, "b": 0.25})
        store.select(recipe=chosen.recipe)
        store.select(recipe="sel_1")
        with pytest.raises(ValueError, match="leave out pct"):
            store.select(recipe="sel_1", pct=0.1)
    assert server.asked[0].query["quota"] == ["a:0.5", "b:0.25"]
    methods = [(asked.method, asked.path) for asked in server.asked[1:]]
    assert methods == [("POST", "/selections"), ("GET", "/selections/sel_1"), ("POST", "/selections")]
    assert json.loads(server.asked[1].body)["recipe"]["tasks"] == ["task_mmlu"]


def test_missing_gradients_are_a_conflict_that_says_what_to_post() -> None:
    detail = 'POST /gradients {"task": "mmlu", "run": "run_1"}'
    with (
        serving(Said(canned.problem(409, detail), status=409)) as (_, store),
        pytest.raises(Conflict, match="POST /gradients"),
    ):
        store.select(task="mmlu", pct=0.05)


def test_rows_of_a_selection_are_iterated_page_by_page() -> None:
    with serving(selecting(1500)) as (server, store):
        rows = store.selections.rows("sel_1")
        assert [next(rows).rank for _ in range(1000)] == list(range(1, 1001))
        assert len(server.asked) == 1
        assert [row.rank for row in rows] == list(range(1001, 1501))
        assert len(store.selections.get("sel_1").data) == 1500


def test_scores_are_iterated_in_the_order_of_the_pool() -> None:
    def answer(asked: Asked) -> Said:
        start = int(asked.query.get("after", ["0"])[0])
        stop = min(start + 1000, 2200)
        keys = ("dataset", "id", "origin", "task", "subtask")
        row = dict.fromkeys(keys, "a")
        data = [{**row, "row": number, "score": None if number == 5 else number / 7} for number in range(start, stop)]
        return Said({"recipe": canned.recipe(), "rows": 2200, "data": data, "has_more": stop < 2200})

    with serving(answer) as (_, store):
        scores = list(store.scores(task="mmlu"))
    assert [row.row for row in scores] == list(range(2200))
    assert scores[5].score is None


def test_scores_are_saved_in_the_format_of_the_paths_ending(tmp_path: Path) -> None:
    page = {"recipe": canned.recipe(), "rows": 0, "data": [], "has_more": False}

    def answer(asked: Asked) -> Said:
        return Said(page) if asked.headers["Accept"] == "application/json" else Said(body=b"array")

    with serving(answer) as (server, store):
        path = store.save_scores(tmp_path / "scores.npy", task="mmlu")
        with pytest.raises(ValueError, match=r"\.parquet"):
            store.save_scores(tmp_path / "scores.txt", task="mmlu")
    assert path.read_bytes() == b"array"
    assert server.asked[-1].headers["Accept"] == "application/x-npy"


def test_what_is_known_of_rows_is_iterated_page_by_page_or_saved(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Said:
        if asked.headers["Accept"] != "application/json":
            return Said(body=b"table")
        start = int(asked.query.get("after", ["0"])[0])
        stop = min(start + 1000, 1200)
        row = {"norm": 1.5, "raw_norm": None, "loss": 0.5, "tokens": 3, "reason": None}
        data = [{"row": number, **row} for number in range(start, stop)]
        return Said({"feature_set": canned.FEATURE_SET, "data": data, "has_more": stop < 1200})

    with serving(answer) as (server, store):
        assert [row.row for row in store.gradients.rows("grad_1", feature_set="feat_1")] == list(range(1200))
        path = store.gradients.save_rows("grad_1", tmp_path / "rows.parquet")
        with pytest.raises(ValueError, match=r"rows are saved as \.npy"):
            store.gradients.save_rows("grad_1", tmp_path / "rows.txt")
    assert path.read_bytes() == b"table"
    assert [asked.query.get("feature_set") for asked in server.asked] == [["feat_1"], ["feat_1"], None]
    assert server.asked[-1].headers["Accept"] == "application/vnd.apache.parquet"


# Downloads --------------------------------------------------------------------------------------------------------

ROWS = b"".join(b'{"prompt": "%d \xe2\x80\xa8", "completion": "\r"}\n' % number for number in range(20_000))


def content(*, ranges: bool, breaks: list[int], etags: tuple[str, ...] = ('"v1"',)) -> Answerer:
    """A file of ROWS whose sending breaks off after so many bytes, each time."""
    left, tags = list(breaks), list(etags)

    def answer(asked: Asked) -> Said:
        etag = tags.pop(0) if len(tags) > 1 else tags[0]
        start = int(asked.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in asked.headers else 0
        start = start if ranges and asked.headers.get("If-Range") in {None, etag} else 0
        return Said(
            status=206 if start else 200,
            body=ROWS[start:],
            headers={"ETag": etag, "Content-Type": "application/x-ndjson"},
            breaks_after=left.pop(0) if left else None,
        )

    return answer


@pytest.mark.parametrize("ranges", [True, False], ids=["with ranges", "without ranges"])
def test_a_download_goes_on_where_its_connection_broke(tmp_path: Path, ranges: bool) -> None:
    with serving(content(ranges=ranges, breaks=[100_000, 300_000, 10]), retries=5) as (server, store):
        path = store.datasets.download("pool", tmp_path / "rows.jsonl")
    assert path.read_bytes() == ROWS
    assert len(server.asked) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_download_that_changed_in_between_is_not_patched_together(tmp_path: Path) -> None:
    with (
        serving(content(ranges=True, breaks=[100_000], etags=('"v1"', '"v2"'))) as (_, store),
        pytest.raises(UnexpectedAnswer, match="changed"),
    ):
        store.datasets.download("pool", tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_download_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("old")
    with serving(content(ranges=True, breaks=[0] * 9), retries=1) as (_, store), pytest.raises(ConnectionFailed):
        store.datasets.download("pool", tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_lines_end_at_newlines_only_and_survive_a_break() -> None:
    with serving(content(ranges=True, breaks=[12_345])) as (_, store):
        assert list(store.datasets.lines("pool")) == ROWS.split(b"\n")[:-1]
    with serving(Said(body=b"a\n\nb")) as (_, store):
        assert list(store.selections.lines("sel_1")) == [b"a", b"", b"b"]


def test_lines_can_be_left_early() -> None:
    with serving(content(ranges=True, breaks=[])) as (_, store):
        first = next(store.datasets.lines("pool"))
        assert first == ROWS.split(b"\n", 1)[0]
        assert next(store.datasets.lines("pool")) == first


def test_the_awaiting_client_streams_and_resumes(tmp_path: Path) -> None:
    async def use(store: AsyncGradientStore) -> tuple[int, Path]:
        count = 0
        async for _ in store.datasets.lines("pool"):
            count += 1
        return count, await store.datasets.download("pool", tmp_path / "rows.jsonl")

    count, path = asynchronously(content(ranges=True, breaks=[50_000, 70_000, 60_000]), use)
    assert count == 20_000
    assert path.read_bytes() == ROWS


def test_an_adapter_is_unpacked_into_a_folder(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("adapter_config.json", "{}")
        archive.writestr("nested/adapter_model.safetensors", "weights")
    with serving(Said(body=packed.getvalue())) as (server, store):
        folder = store.finetunes.download("ft_1", tmp_path / "new" / "adapter")
        kept = store.checkpoints.download("ck_1", tmp_path / "adapter.zip")
        with pytest.raises(FileExistsError):
            store.finetunes.download("ft_1", folder)
    assert (folder / "nested" / "adapter_model.safetensors").read_text() == "weights"
    assert kept.read_bytes() == packed.getvalue()
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert [asked.path for asked in server.asked] == ["/finetunes/ft_1/content", "/checkpoints/ck_1/content"]


def test_a_selection_is_saved_as_rows_or_as_its_table(tmp_path: Path) -> None:
    with serving(Said(body=b"{}\n")) as (server, store):
        store.selections.save("sel_1", tmp_path / "best.jsonl")
        store.selections.save("sel_1", tmp_path / "best.csv")
        store.datasets.download("pool", tmp_path / "upload.gz", source="ab12")
        with pytest.raises(ValueError, match="selections export"):
            store.selections.save("sel_1", tmp_path / "best.parquet")
    assert [asked.headers["Accept"] for asked in server.asked[:2]] == ["application/x-ndjson", "text/csv"]
    assert server.asked[2].query == {"source": ["ab12"]}


# Tables -----------------------------------------------------------------------------------------------------------


def test_results_become_tables() -> None:
    with serving(selecting(3)) as (_, store):
        chosen = store.select(task="mmlu", k=3)
    frame = chosen.to_pandas()
    assert list(frame["rank"]) == [1, 2, 3]
    assert list(frame.columns) == list(canned.row(1))
    assert chosen.to_datasets()[1]["id"] == "r2"
    with serving(Said(canned.job("succeeded", kind="evaluation"))) as (_, store):
        measured = store.evaluations.wait("eval_1").result.to_pandas()
    assert list(measured["loss"]) == [2.5, 2.0]
    with serving(Said(canned.job("succeeded", kind="validation"))) as (_, store):
        judged = store.validations.wait("val_1").result.to_pandas()
    assert list(judged["label"]) == ["adam", "random"]
    with serving(Said(canned.job("succeeded", kind="comparison"))) as (_, store):
        assert list(store.comparisons.wait("cmp_1").result.to_pandas()["rows"]) == [2, 2]
    with serving(Said(canned.job("succeeded"))) as (_, store):
        assert list(store.finetunes.wait("ft_1").result.to_pandas()["loss"]) == [2.5]


def test_original_rows_become_a_dataset() -> None:
    with serving(Said(body=b'{"prompt": "a"}\n{"prompt": "b"}\n')) as (_, store):
        assert frames.to_datasets(store.selections.lines("sel_1"))["prompt"][:] == ["a", "b"]


def test_a_listed_selection_without_its_rows_gives_no_empty_table() -> None:
    listed = Said({"data": [canned.selection(3, stop=0)], "has_more": False})
    with serving(listed) as (_, store), pytest.raises(ValueError, match=r"selections\.get\('sel_1'\)"):
        next(store.selections.list()).to_pandas()


@pytest.mark.parametrize(("package", "convert"), [("pandas", frames.to_pandas), ("datasets", frames.to_datasets)])
def test_a_missing_extra_is_named(
    package: str, convert: Callable[[list[Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'gradstore\[{package}\]'"):
        convert([])


# Imports ----------------------------------------------------------------------------------------------------------


def test_the_client_loads_no_torch_no_numpy_and_no_web_framework() -> None:
    code = "import sys, gradstore.client, gradstore.recipes; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert {"gradstore", "httpx"} <= loaded
    assert not loaded & {"torch", "numpy", "pandas", "datasets", "fastapi", "starlette", "typer", "datastore"}


def test_the_service_does_not_load_the_client_with_the_types() -> None:
    code = "import sys, gradstore.types; print(*{name.partition('.')[0] for name in sys.modules})"
    assert "httpx" not in subprocess.check_output([sys.executable, "-c", code], text=True).split()


def test_every_public_name_can_be_imported() -> None:
    assert sorted(gradstore.__all__) == gradstore.__all__
    assert all(getattr(gradstore, name) is not None for name in gradstore.__all__)
    tree = {name for name in vars(errors) if isinstance(vars(errors)[name], type) and name in (errors.__doc__ or "")}
    assert {name for name in tree if issubclass(vars(errors)[name], errors.GradstoreError)} <= set(gradstore.__all__)
    with pytest.raises(AttributeError):
        _ = gradstore.nonsense
