"""Exports through the real service, read by the libraries that people read them with."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from gradstore import GradientStore, Invalid, NotFound, __version__, cli
from gradstore.types import Provenance, SelectedRow
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from typer.testing import CliRunner

from datastore import exports, training_files
from datastore.errors import InvalidInput
from datastore.exports import COLUMNS
from datastore.provenance import card
from datastore.rows import Example, Message
from datastore.store import OpenStore
from datastore.strict_json import compact
from tests.serving import Service, problem_of
from tests.stores import Store, numbers

DIM = 16
LONG = "long " * 20_000


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


user, assistant = partial(turn, "user"), partial(turn, "assistant")
ROWS: list[dict[str, Any]] = [
    {"dataset": "flan", "id": "a", "messages": [user("hé\u2028 ☃ 😀"), assistant("=1+1")]},
    {"dataset": "flan", "id": 7, "messages": [user(LONG), assistant("b")], "meta": {"k": [1, 2]}},
    {"prompt": "=cmd|' /C calc'!A0", "completion": "+1", "score": 3.5, "meta": None},
    {"prompt": 'line\r\nline, "two"', "completion": " spaced", "score": 4},
    {"instruction": "translate", "input": "one", "output": "eins", "dataset": "alpaca", "free": "text"},
    {"messages": [turn("system", "s"), user("u"), user("v"), assistant("a")], "free": 5},
    {"messages": [user("u"), assistant("a"), turn("tool", "t"), assistant("c"), user("unanswered")]},
]
"""Rows that are awkward: of all shapes, texts that spreadsheets calculate, fields of several types, names we use."""


def work(service: Service) -> None:
    """Do the gradients shards that wait."""
    opened(service).work(drawn)


def opened(service: Service) -> Store:
    return Store(**{part.name: getattr(service.backend, part.name) for part in fields(OpenStore)})


def drawn(_checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """Features that depend on the row only."""
    return numbers("ck_0", start, stop, dim)


def selected(service: Service, lines: list[bytes], *, pools: int = 1, **params: Any) -> dict[str, Any]:
    """All rows of a pool, or of several, in the order of their scores."""
    service.task("target")
    service.http.post("/runs", json={"checkpoints": [service.checkpoint()["id"]], "name": "run"})
    bounds = [round(part * len(lines) / pools) for part in range(pools + 1)]
    names = [f"pool {number}" for number in range(pools)]
    for name, first, last in zip(names, bounds[:-1], bounds[1:], strict=True):
        assert service.upload(b"\n".join(lines[first:last]), name=name).is_success
    for owner in ({"dataset": name, "kinds": ["sgd"]} for name in names):
        assert service.http.post("/gradients", json={"run": "run", "dims": [DIM], **owner}).status_code == 202
    assert service.http.post("/gradients", json={"run": "run", "dims": [DIM], "task": "target"}).status_code == 202
    work(service)
    query = {"task": "target", "pct": 1, "dataset": names, **params}
    answer = service.http.get("/select", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture(scope="module")
def chosen(shared_service: Service) -> dict[str, Any]:
    """A selection of all awkward rows, from two pools."""
    return selected(shared_service, [json.dumps(row, ensure_ascii=False).encode() for row in ROWS], pools=2)


@pytest.fixture(scope="module")
def store(shared_service: Service) -> Iterator[GradientStore]:
    with GradientStore(shared_service.url) as client:
        yield client


def original(row: dict[str, Any]) -> dict[str, Any]:
    """The row that a place of the selection means."""
    return next(found for found in placed() if found["place"] == (row["dataset"], row["row"]))["values"]


PLACES: dict[str, int] = {}


def placed() -> Iterator[dict[str, Any]]:
    for dataset, first in PLACES.items():
        for number, values in enumerate(ROWS[first:]):
            yield {"place": (dataset, number), "values": values}


@pytest.fixture(scope="module", autouse=True)
def _places(chosen: dict[str, Any]) -> None:
    first, second = chosen["recipe"]["datasets"]
    PLACES.update({first: 0, second: round(len(ROWS) / 2)})


def added(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that stand beside a row."""
    return {column: row[name] for column, name in COLUMNS.items()}


def test_jsonl_has_the_rows_with_their_scores_or_byte_for_byte(
    service: Service, store: GradientStore, chosen: dict[str, Any], tmp_path: Path
) -> None:
    scored = store.selections.export(chosen["id"], tmp_path / "best.jsonl")
    found = [json.loads(line) for line in scored.read_bytes().split(b"\n")[:-1]]
    assert found == [{**original(row), **added(row)} for row in chosen["data"]]
    plain = store.selections.export(chosen["id"], tmp_path / "plain.jsonl", scores=False).read_bytes()
    assert plain == store.selections.save(chosen["id"], tmp_path / "content.jsonl").read_bytes()
    assert [json.loads(line) for line in plain.split(b"\n")[:-1]] == [original(row) for row in chosen["data"]]


def test_parquet_keeps_nested_values_and_says_where_it_comes_from(
    store: GradientStore, chosen: dict[str, Any], tmp_path: Path
) -> None:
    path = store.selections.export(chosen["id"], tmp_path / "best.parquet")
    table = pq.read_table(path)
    assert table.schema.names[: len(COLUMNS)] == list(COLUMNS)
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    assert table.schema.field("messages").type == pa.list_(message)
    assert table.schema.field("score").type == pa.float64()
    assert table.schema.field("id").type == table.schema.field("free").type == pa.string()  # numbers and texts
    for got, row in zip(table.to_pylist(), chosen["data"], strict=True):
        wanted = {**original(row), **added(row)}
        for name in ("id", "free"):
            if name in wanted:
                wanted[name] = json.dumps(wanted[name])
        assert {name: value for name, value in got.items() if value is not None} == {
            name: value for name, value in wanted.items() if value is not None
        }
    told = Provenance.model_validate_json(table.schema.metadata[b"gradstore"])
    assert told == store.selections.provenance(chosen["id"])
    frame = pd.read_parquet(path)
    assert frame["selection_rank"].tolist() == list(range(1, len(ROWS) + 1))
    plain = pq.read_table(store.selections.export(chosen["id"], tmp_path / "plain.parquet", scores=False))
    assert plain.schema.names == table.schema.names[len(COLUMNS) :]


def test_csv_is_read_by_pandas_and_calculates_nothing(
    store: GradientStore, chosen: dict[str, Any], tmp_path: Path
) -> None:
    path = store.selections.export(chosen["id"], tmp_path / "best.csv")
    frame = pd.read_csv(path, keep_default_na=False, dtype=str)
    assert len(frame) == len(ROWS)
    assert frame["selection_score"].astype(float).tolist() == [row["score"] for row in chosen["data"]]
    csv.field_size_limit(1 << 30)
    with path.open(newline="") as file:
        cells = list(csv.DictReader(file))
    for got, row in zip(cells, chosen["data"], strict=True):
        values = original(row)
        for name, value in values.items():
            if not isinstance(value, str):
                assert got[name] == ("" if value is None else json.dumps(value, ensure_ascii=False))
            elif value.startswith(("=", "+")):
                assert got[name] == f"'{value}"
            else:
                assert got[name] == value
        assert not any(cell.lstrip().startswith(("=", "+", "@")) for name, cell in got.items() if name not in COLUMNS)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "trl"])
def test_an_export_names_its_provenance_and_is_known_by_a_tag(
    shared_service: Service, chosen: dict[str, Any], form: str
) -> None:
    http, where = shared_service.http, f"/selections/{chosen['id']}/export"
    answer = http.get(where, params={"format": form})
    assert answer.status_code == 200, answer.text
    link = answer.headers["link"]
    assert link.endswith('rel="describedby"; type="application/json"')
    assert http.get(link.partition(">")[0].lstrip("<")).json()["selection"] == chosen["id"]
    assert http.get(where, params={"format": form}).content == answer.content
    tag = {"If-None-Match": answer.headers["etag"]}
    assert http.get(where, params={"format": form}, headers=tag).status_code == 304
    assert http.get(where, params={"format": form, "scores": False}, headers=tag).status_code == 200
    head = http.head(where, params={"format": form})
    assert (head.status_code, head.content) == (200, b"")


def test_what_cannot_be_exported_is_refused(
    shared_service: Service, store: GradientStore, chosen: dict[str, Any], tmp_path: Path
) -> None:
    problem_of(shared_service.http.get("/selections/nothing/export"), 404)
    problem = problem_of(shared_service.http.get(f"/selections/{chosen['id']}/export?format=xlsx"), 422)
    assert problem.errors[0].parameter == "format"
    with pytest.raises(ValueError, match=r"\.parquet.*llama-factory"):
        store.selections.export(chosen["id"], tmp_path / "best.xlsx")
    with pytest.raises(NotFound):
        store.selections.export("nothing", tmp_path / "best.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_rows_of_more_fields_than_a_table_has_columns_are_refused_in_words(
    service: Service, tmp_path: Path, form: str
) -> None:
    def line(number: int, fields: int) -> bytes:
        extra = {f"{number} {field}": field for field in range(fields)}
        return compact({"prompt": f"p {number}", "completion": "c"} | extra)

    service.upload(b"\n".join([line(0, exports.MOST_COLUMNS - 2), line(1, 0)]), name="as many")
    service.upload(b"\n".join(line(number, 300) for number in range(7)), name="too many")
    fits, breaks = (
        service.http.get("/select", params={"dataset": name, "method": "random", "pct": 1}).json()["id"]
        for name in ("as many", "too many")
    )
    where = f"/selections/{breaks}/export"
    for scores in (True, False):
        found = service.http.get(f"/selections/{fits}/export", params={"format": form, "scores": scores})
        assert found.status_code == 200
        problem = problem_of(service.http.get(where, params={"format": form, "scores": scores}), 422)
        assert (problem.type, problem.errors[0].parameter) == ("invalid-input", "format")
        assert "up to rank 4 have 1,202 different fields" in problem.detail
        assert "format=jsonl" in problem.detail
    assert service.http.head(where, params={"format": form}).status_code == 200  # for which no row is read
    assert len(service.http.get(where, params={"format": "jsonl"}).content.splitlines()) == 7
    with GradientStore(service.url) as store, pytest.raises(Invalid, match="1,202 different fields"):
        store.selections.export(breaks, tmp_path / f"best.{form}")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("best")]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_the_columns_are_found_in_one_pass_that_ends_where_they_are_too_many(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    read: list[int] = []

    def counted() -> Iterator[tuple[SelectedRow, bytes]]:
        for row, line in made([{str(number): number} for number in range(9)])():
            read.append(row.rank)
            yield row, line

    def export() -> bytes:
        if form == "csv":
            return b"".join(exports.table_csv(counted, scores=False))
        return b"".join(exports.parquet(counted, scores=False, metadata="{}"))

    monkeypatch.setattr(exports, "MOST_COLUMNS", 9)
    assert export()
    assert read == [*range(1, 10)] * 2
    read.clear()
    monkeypatch.setattr(exports, "MOST_COLUMNS", 4)
    with pytest.raises(InvalidInput, match="up to rank 5 have 5 different fields"):
        export()
    assert read == [1, 2, 3, 4, 5]


def test_one_line_of_datasets_loads_a_selection_from_the_server(
    shared_service: Service, chosen: dict[str, Any], tmp_path: Path
) -> None:
    from datasets import load_dataset

    url = f"{shared_service.url}/selections/{chosen['id']}/export?format=parquet"
    loaded = load_dataset("parquet", data_files=url, split="train", cache_dir=str(tmp_path))
    assert loaded["selection_rank"][:] == list(range(1, len(ROWS) + 1))
    texts = [original(row).get("messages") for row in chosen["data"]]
    assert [messages or None for messages in loaded["messages"]] == texts


# Trainers -----------------------------------------------------------------------------------------------------------


def folder_of(store: GradientStore, selection: str, trainer: Any, folder: Path) -> dict[str, bytes]:
    store.selections.export(selection, folder, format=trainer)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("trainer", ["trl", "axolotl", "llama-factory"])
def test_every_folder_of_a_trainer_is_loaded_by_datasets_and_has_its_card(
    store: GradientStore, chosen: dict[str, Any], tmp_path: Path, trainer: Any
) -> None:
    from datasets import load_dataset

    found = folder_of(store, chosen["id"], trainer, tmp_path / "folder")
    assert Provenance.model_validate_json(found["provenance.json"]) == store.selections.provenance(chosen["id"])
    text = found["README.md"].decode()
    front = yaml.safe_load(text.split("---\n")[1])
    configs = {config["config_name"]: config["data_files"] for config in front["configs"]}
    assert configs.keys() == {"messages", "prompt_completion"}
    assert front["size_categories"] == ["n<1K"]
    assert "flan" in text
    rows = pq.read_table(io.BytesIO(found["selection.parquet"])).to_pylist()
    assert [SelectedRow.model_validate(row).model_dump() for row in rows] == chosen["data"]
    rows = {
        name: len(load_dataset(str(tmp_path / "folder"), name, split="train", cache_dir=str(tmp_path / "cache")))
        for name in configs
    }
    left_out = len(found["left_out.jsonl"].splitlines()) if "left_out.jsonl" in found else 0
    assert rows == {"messages": 5 - left_out, "prompt_completion": 2}
    assert left_out == (trainer == "llama-factory")
    with zipfile.ZipFile(store.selections.export(chosen["id"], tmp_path / "folder.zip", format=trainer)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == found
        assert archive.testzip() is None


def test_trl_gets_its_two_types_and_a_script_that_is_python(
    store: GradientStore, chosen: dict[str, Any], tmp_path: Path
) -> None:
    found = folder_of(store, chosen["id"], "trl", tmp_path / "trl")
    messages = [json.loads(line)["messages"] for line in found["messages.jsonl"].decode().split("\n")[:-1]]
    assert all(set(turn) == {"role", "content"} for turns in messages for turn in turns)
    assert [{"role": "user", "content": "translate\n\none"}, {"role": "assistant", "content": "eins"}] in messages
    pairs = [json.loads(line) for line in found["prompt_completion.jsonl"].splitlines()]
    joined = {pair["prompt"] + pair["completion"] for pair in pairs}
    assert joined == {"=cmd|' /C calc'!A0 +1", 'line\r\nline, "two" spaced'}
    script = found["train.py"].decode()
    compile(script, "train.py", "exec")
    assert 'model="org/base"' in script


def test_axolotl_gets_a_configuration_that_is_yaml_and_names_what_is_there(
    store: GradientStore, chosen: dict[str, Any], tmp_path: Path
) -> None:
    found = folder_of(store, chosen["id"], "axolotl", tmp_path / "axolotl")
    configuration = yaml.safe_load(found["axolotl.yaml"])
    assert configuration["base_model"] == "org/base"
    for entry in configuration["datasets"]:
        first = json.loads(found[entry["path"]].splitlines()[0])
        if entry["type"] == "chat_template":
            turn = first[entry["field_messages"]][0]
            assert set(entry["message_property_mappings"].values()) == set(turn)
        else:
            assert {entry["type"][f"field_{name}"] for name in ("instruction", "input", "output")} == set(first)
            assert entry["type"]["no_input_format"].format(**first) == first["instruction"]
    assert [entry["path"] for entry in configuration["datasets"]] == ["messages.jsonl", "prompt_completion.jsonl"]


def test_llama_factory_finds_rows_it_can_take_by_their_description(
    store: GradientStore, chosen: dict[str, Any], tmp_path: Path
) -> None:
    found = folder_of(store, chosen["id"], "llama-factory", tmp_path / "factory")
    described = json.loads(found["dataset_info.json"])
    wanted = yaml.safe_load(found["train.yaml"])
    assert wanted["dataset"].split(",") == list(described)
    for entry in described.values():
        rows = json.loads(found[entry["file_name"]])
        assert all(column in row for row in rows for column in entry["columns"].values())
        if entry.get("formatting") == "sharegpt":
            tags = entry["tags"]
            for row in rows:
                assert taken_by_llama_factory(row["messages"], tags)
    (left_out,) = [json.loads(line) for line in found["left_out.jsonl"].splitlines()]
    assert "user turn in place 2" in left_out["reason"]
    assert chosen["data"][left_out["rank"] - 1]["row"] == left_out["row"]


def taken_by_llama_factory(turns: list[dict[str, str]], tags: dict[str, str]) -> bool:
    """The rule of its converter for sharegpt rows: a system turn, then asking and answering by turns, in pairs."""
    if turns[0][tags["role_tag"]] == tags["system_tag"]:
        turns = turns[1:]
    asking, answering = {tags["user_tag"], tags["observation_tag"]}, {tags["assistant_tag"]}
    places = zip(turns, [asking, answering] * len(turns), strict=False)
    return len(turns) % 2 == 0 and all(turn[tags["role_tag"]] in allowed for turn, allowed in places)


def test_a_selection_of_one_kind_has_no_empty_files() -> None:
    provenance = provenance_of(origins={"a": 1})
    row = SelectedRow(rank=1, dataset="ds", row=0, id=None, origin="a", score=1.0, task="t", subtask=None)
    example = Example(None, "a", prompt="p", completion="c")
    for trainer in ("trl", "axolotl", "llama-factory"):
        names = [
            name
            for name, pieces in training_files.files(trainer, lambda: [(row, example)], provenance)
            if b"".join(pieces)
        ]
        assert not [name for name in names if name.startswith(("messages", "left_out"))]
    unfit = Example(None, "a", messages=(Message("assistant", "first"),))
    files = {
        name: b"".join(pieces)
        for name, pieces in training_files.files("llama-factory", lambda: [(row, unfit)], provenance)
    }
    assert json.loads(files["dataset_info.json"]) == {}
    assert b"assistant turn in place 1" in files["left_out.jsonl"]


# The card -----------------------------------------------------------------------------------------------------------


def provenance_of(**changes: Any) -> Provenance:
    """A card that needs no store."""
    values: dict[str, Any] = {
        "selection": "sel_1", "name": None, "created_at": "2026-11-20T14:02:11Z", "gradstore": "0", "count": 1,
        "pool": 2, "left_out": {}, "origins": {}, "pool_origins": {}, "recipe": {"max_length": 8}, "datasets": [],
        "tasks": [], "checkpoints": [], "run": None, "excluded": [], "request": "GET /select?",
        "command": "gradstore select",
    }  # fmt: skip
    return Provenance.model_validate(values | changes)


def test_the_request_and_the_command_of_a_card_give_the_same_selection(
    shared_service: Service, store: GradientStore, chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    told = store.selections.provenance(chosen["id"])
    assert told.gradstore == __version__
    method, _, url = told.request.partition(" ")
    assert shared_service.http.request(method, url).json()["id"] == chosen["id"]
    asked = parse_qs(urlsplit(url).query)
    assert (asked["dataset"], asked["run"]) == (chosen["recipe"]["datasets"], [chosen["recipe"]["run"]])
    monkeypatch.setenv("GRADSTORE_URL", shared_service.url)
    program, *arguments = shlex.split(told.command)
    assert program == "gradstore"
    done = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["id"] == chosen["id"]


def test_a_recipe_that_answers_no_question_is_given_again_as_it_is(
    shared_service: Service, store: GradientStore, chosen: dict[str, Any]
) -> None:
    weights = [1.0, *[0.0] * (len(chosen["recipe"]["checkpoints"]) - 1)]
    sent = chosen["recipe"] | {"ngram": chosen["recipe"]["ngram"] + 1, "checkpoint_weights": weights, "aggregate": None}
    first = shared_service.http.post("/selections", json={"recipe": sent}).json()
    told = store.selections.provenance(first["id"])
    method, path, body = told.request.split(" ", 2)
    again = shared_service.http.request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert again.json()["id"] == first["id"]
    assert told.command == f"gradstore select --recipe {first['id']}"


def test_a_card_tells_names_files_and_trainings_and_outlives_what_it_names(service: Service, tmp_path: Path) -> None:
    service.pool(20, name="pool")
    service.task("target")
    finetune = service.finetune(dataset="pool", name="warm-up")
    run = service.train(tmp_path)["result"]["run"]
    for owner in ({"dataset": "pool", "kinds": ["sgd"]}, {"task": "target"}):
        service.http.post("/gradients", json={"run": run, "dims": [DIM], **owner})
    work(service)
    first = service.http.get("/select", params={"task": "target", "k": 1}).json()
    second = service.http.get("/select", params={"task": "target", "k": 2, "exclude": first["id"]}).json()
    where = f"/selections/{second['id']}/provenance"
    told = Provenance.model_validate(service.http.get(where).json())
    assert (told.datasets[0].name, told.tasks[0].name) == ("pool", "target")
    assert told.datasets[0].sources[0].sha256 == service.http.get("/datasets/pool").json()["sources"][0]["sha256"]
    assert told.run is not None
    assert told.run.finetune == finetune["id"]
    assert (told.run.training or {})["epochs"] == 2
    assert math.isclose(sum(one.weight or 0 for one in told.checkpoints), 1)
    assert [one.id for one in told.excluded] == [first["id"]]
    assert told.left_out == {"excluded": 1}
    page = service.http.get(where, headers={"Accept": "text/markdown"}).text
    assert page == service.http.get(f"{where}?format=markdown").text
    for wanted in (told.request, told.command, "learning_rate", finetune["id"], "org/base", "excluded"):
        assert wanted in page
    for job in service.http.get("/gradients").json()["data"]:
        assert service.http.delete(f"/gradients/{job['id']}").status_code == 204
    # what a recipe leaves out stays, so that the recipe gives the same rows again
    assert problem_of(service.http.delete(f"/selections/{first['id']}"), 409).type == "in-use"
    assert service.http.delete(f"/finetunes/{finetune['id']}").status_code == 204
    told = Provenance.model_validate(service.http.get(where).json())
    assert told.run is not None
    assert (told.run.id, told.run.training) == (run, None)
    assert [one.model for one in told.checkpoints] == [None, None]
    assert service.http.get(f"/selections/{second['id']}/export?format=trl").status_code == 200


@pytest.mark.parametrize("text", ["a | b", "a\n# b", "<script>", "`x`", "[a](b)", "\\"])
def test_a_strangers_text_is_only_text_on_the_page(text: str) -> None:
    page = card(provenance_of(name=text, origins={text: 1}, pool_origins={text: 2}))
    (row,) = [line for line in page.splitlines() if line.endswith(" | 1 | 2 |")]
    assert len(row.replace("\\\\", "").replace("\\|", "").split("|")) == 5
    assert "<script" not in page
    assert "\n# b" not in page.partition("---\n# ")[2]


def test_a_card_says_what_there_is_to_say_and_no_more() -> None:
    page = card(provenance_of(recipe={"run": None, "weights": [0.1 + 0.2]}, created_at="2026-11-20T14:02:11.123456Z"))
    assert "chosen by gradstore at 2026-11-20 14:02:11 UTC. This card is of gradstore 0." in page
    assert "| weights | \\[0.3\\] |" in page
    assert "| run |" not in page
    assert not {"## For what", "## By what"} & set(page.splitlines())


def test_a_recipe_is_shown_whatever_it_holds() -> None:
    page = card(provenance_of(recipe={"max_length": 8, "strategy": {"name": "balanced", "tau": 0.9}, "method": "bm25"}))
    assert '| strategy | {"name": "balanced", "tau": 0.9} |' in page
    assert "| method | bm25 |" in page


# Features -----------------------------------------------------------------------------------------------------------


def test_features_are_saved_as_they_were_computed(service: Service, tmp_path: Path) -> None:
    def with_gaps(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        found = drawn(checkpoint, start, stop, dim)
        found[np.arange(start, stop) % 100 == 3] = 0
        return found

    service.pool(1500, name="pool")
    service.http.post("/runs", json={"checkpoints": [service.checkpoint()["id"]], "name": "run"})
    body = {"dataset": "pool", "run": "run", "kinds": ["sgd"], "dims": [DIM], "dtype": "float32", "name": "grads"}
    assert service.http.post("/gradients", json=body).status_code == 202
    assert "is queued" in problem_of(service.http.get("/gradients/grads/features"), 409).detail
    opened(service).work(with_gaps)
    wanted = drawn("", 0, 1500, DIM)
    wanted[3::100] = np.nan
    with GradientStore(service.url) as store:
        whole = np.load(store.gradients.save_features("grads", tmp_path / "all.npy"))
        part = store.gradients.save_features("grads", tmp_path / "part.safetensors", start=1000, stop=1300)
        with pytest.raises(ValueError, match=r"\.safetensors"):
            store.gradients.save_features("grads", tmp_path / "all.csv")
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, wanted)
    with safe_open(part, framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("features"), wanted[1000:1300])
        told = json.loads(file.metadata()["gradstore"])
    assert (told["start"], told["stop"], told["dataset"]["name"], told["checkpoint"]["model"]) == (
        1000,
        1300,
        "pool",
        "org/base",
    )
    where = "/gradients/grads/features"
    for query in ("start=5&stop=4", "stop=1501", "start=1501"):
        problem_of(service.http.get(f"{where}?{query}"), 422)
    empty = np.load(io.BytesIO(service.http.get(f"{where}?start=7&stop=7").content))
    assert empty.shape == (0, DIM)
    answer = service.http.get(where)
    assert int(answer.headers["content-length"]) == len(answer.content)
    asked = service.http.get(where, headers={"Accept": "application/x-safetensors"})
    assert asked.content == service.http.get(f"{where}?format=safetensors").content


# Rows of any kind ---------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "messages", "selection_rank", "é"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
TABLES = st.lists(st.dictionaries(NAMES, VALUES, min_size=1, max_size=4), min_size=1, max_size=5)


def made(rows: list[dict[str, Any]]) -> Callable[[], Iterator[tuple[SelectedRow, bytes]]]:
    def rows_and_lines() -> Iterator[tuple[SelectedRow, bytes]]:
        for number, row in enumerate(rows):
            place = SelectedRow(
                rank=number + 1, dataset="ds", row=number, id=None, origin="o", score=0.5, task="t", subtask=None
            )
            yield place, compact(row)

    return rows_and_lines


def without_nulls(value: Any) -> Any:
    """A value as Parquet keeps it: a null field of an object is a missing one."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@settings(deadline=None, max_examples=60)
@given(TABLES)
def test_parquet_holds_any_rows_as_values_or_as_their_json(rows: list[dict[str, Any]]) -> None:
    content = b"".join(exports.parquet(made(rows), scores=True, metadata="{}"))
    table = pq.read_table(io.BytesIO(content))
    for got, row in zip(table.to_pylist(), rows, strict=True):
        for name, value in row.items():
            if name in COLUMNS:
                continue
            found = got[name]
            if isinstance(found, str) and found != value:
                found = json.loads(found)
            assert without_nulls(found) == without_nulls(value)
            assert isinstance(value, bool) == isinstance(found, bool)
        assert got["selection_score"] == 0.5


@settings(deadline=None, max_examples=40)
@given(TABLES)
def test_csv_and_jsonl_hold_any_rows(rows: list[dict[str, Any]]) -> None:
    lines = b"".join(exports.jsonl(made(rows), scores=False)).decode().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == rows
    text = b"".join(exports.table_csv(made(rows), scores=False)).decode()
    for got, row in zip(csv.DictReader(io.StringIO(text, newline="")), rows, strict=True):
        for name, value in row.items():
            cell = got[name]
            if isinstance(value, str):
                assert text_of(cell) == value
            else:
                assert cell == "" if value is None else json.loads(cell) == value


def text_of(cell: str) -> str:
    """The text that a cell of a CSV has, by the rule of docs/exports.md."""
    return cell[1:] if cell.startswith("'") and calculated(cell.lstrip("'")) else cell


def calculated(cell: str) -> bool:
    """Whether a spreadsheet reads a cell as a formula (OWASP, "CSV Injection")."""
    return cell.lstrip()[:1] in set("=+-@＝＋－＠") or cell[:1] in {"\t", "\r", "\n"}


IDS = [
    "=1+1",
    "'=1+1",
    "''=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\tx",
    "\r=1",
    " =1",
    "＝1+1",
    "'quoted'",
    "'",
    "007",
    "7",
    "1e5",
    "",
]
LONG_IDS = [
    "12345678901234567890123",
    12345678901234567890123,
    "9007199254740993",
    9007199254740993,
    7,
    7.0,
    True,
    None,
]


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("'=+-@\t\r\n ＝a1"), max_size=5))
def test_no_text_is_calculated_and_each_has_a_cell_of_its_own(text: str) -> None:
    cell = exports.uncalculated(text)
    assert not calculated(cell)
    assert text_of(cell) == text


def test_ids_are_exact_in_every_format() -> None:
    """The id that gradstore uses stands in a column of its own; the row's field is as it was, or its JSON."""
    ids = [*IDS, *LONG_IDS]
    known = [id if id is None or isinstance(id, str) else json.dumps(id) for id in ids]

    def rows() -> Iterator[tuple[SelectedRow, bytes]]:
        for (place, _), id, name in zip(made([{}] * len(ids))(), ids, known, strict=True):
            yield place.model_copy(update={"id": name}), compact({"id": id, "prompt": "p", "completion": "c"})

    lines = b"".join(exports.jsonl(rows, scores=True)).decode().split("\n")[:-1]
    assert [repr(json.loads(line)["id"]) for line in lines] == [repr(id) for id in ids]
    assert [json.loads(line)["selection_id"] for line in lines] == known
    table = pq.read_table(io.BytesIO(b"".join(exports.parquet(rows, scores=True, metadata="{}"))))
    assert table["selection_id"].to_pylist() == known
    assert [id and repr(json.loads(id)) for id in table["id"].to_pylist()] == [
        None if id is None else repr(id) for id in ids
    ]
    texts = b"".join(exports.table_csv(rows, scores=True)).decode()
    cells = list(csv.DictReader(io.StringIO(texts, newline="")))
    for column in ("selection_id", "id"):
        assert not [cell[column] for cell in cells if calculated(cell[column])]
        assert [text_of(cell[column]) for cell in cells] == [name or "" for name in known]
    frame = pd.read_csv(io.StringIO(texts), dtype=str, keep_default_na=False)
    assert frame["selection_id"].tolist() == [cell["selection_id"] for cell in cells]


def test_ids_of_texts_are_the_same_texts_in_parquet() -> None:
    rows = made([{"id": id} for id in IDS])
    table = pq.read_table(io.BytesIO(b"".join(exports.parquet(rows, scores=False, metadata="{}"))))
    assert table["id"].to_pylist() == IDS


def test_a_large_export_is_sent_in_pieces_that_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "GROUP_ROWS", 1000)
    rows: list[dict[str, Any]] = [{"prompt": str(number), "completion": "c"} for number in range(2500)]
    pieces = list(exports.parquet(made(rows), scores=True, metadata="{}"))
    assert len(pieces) == 4
    table = pq.ParquetFile(io.BytesIO(b"".join(pieces)))
    groups = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
    assert groups == [1000, 1000, 500]
    monkeypatch.setattr(exports, "GROUP_BYTES", 1000)
    long = [{"prompt": "x" * 700} for _ in range(4)]
    table = pq.ParquetFile(io.BytesIO(b"".join(exports.parquet(made(long), scores=False, metadata="{}"))))
    assert table.num_row_groups == 4


def test_awkward_files_are_exported_in_every_format(
    service: Service, store: GradientStore, shared_data: Path, tmp_path: Path
) -> None:
    names = (
        "unicode_multilingual.jsonl",
        "rtl_zero_width.jsonl",
        "very_long.jsonl",
        "emoji.jsonl",
        "odd_ids.jsonl",
        "mixed_schemas.jsonl",
        "content_parts.jsonl",
    )
    lines = [
        line for name in names for line in (shared_data / "awkward" / name).read_bytes().split(b"\n") if line.strip()
    ]
    uploaded = service.upload(b"\n".join(lines), on_error="skip")
    assert uploaded.is_success, uploaded.text
    stored = service.http.get(f"/datasets/{uploaded.json()['id']}/content").content.split(b"\n")[:-1]
    selection = selected(service, stored, limit=10_000)
    rows = [json.loads(stored[row["row"]]) for row in selection["data"]]
    with GradientStore(service.url) as client:
        found = [
            json.loads(line)
            for line in client.selections.export(selection["id"], tmp_path / "a.jsonl").read_bytes().split(b"\n")[:-1]
        ]
        assert [{name: value for name, value in row.items() if name not in COLUMNS} for row in found] == rows
        table = pq.read_table(client.selections.export(selection["id"], tmp_path / "a.parquet"))
        assert table.num_rows == len(rows)
        frame = pd.read_csv(client.selections.export(selection["id"], tmp_path / "a.csv"), dtype=str)
        assert len(frame) == len(rows)
        for trainer in ("trl", "axolotl", "llama-factory"):
            client.selections.export(selection["id"], tmp_path / trainer, format=trainer)
