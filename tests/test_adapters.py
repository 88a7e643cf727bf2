"""The bank of adapters: what comes in, what is refused and why, what is found again, and what goes with it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from gradstore import AsyncGradientStore, Conflict, GradientStore, Invalid, cli
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from datastore.adapters import refuse_unlike_base, shape_of
from datastore.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from datastore.errors import InvalidCheckpoint
from datastore.models import size_of
from datastore.tensors import read_header
from tests.services import PostgresServer
from tests.serving import Service, problem_of, serving
from tests.tiny import save_tiny_model
from worker.models import load_adapter, load_model

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def service(tmp_path: Path, model: Path) -> Iterator[Service]:
    with serving(tmp_path / "store", allowed_roots=[tmp_path, model.parent]) as running:
        yield running


@pytest.fixture
def store(service: Service) -> Iterator[GradientStore]:
    with GradientStore(service.url) as client:
        yield client


@pytest.fixture
def adapter(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """Make the folder of an adapter as PEFT writes it."""

    def make(name: str = "adapter", *, seed: int = 0, **settings: Any) -> Path:
        torch.manual_seed(seed)
        adapted = get_peft_model(load_model(str(model)), LoraConfig(**{**LORA, **settings}))
        assert isinstance(adapted, PeftModel)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        adapted.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
        return tmp_path / name

    return make


def edited(folder: Path, **settings: Any) -> Path:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **settings}))
    return folder


# What comes in --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_described_by_its_tensors(
    store: GradientStore, adapter: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    folder = adapter()
    found = store.adapters.upload(folder, name="mine", trained_on="sums")
    assert (found.base_model, found.rank, found.alpha, found.scaling) == (str(model), 2, 6, 3)
    assert (found.targets, found.modules, found.trained_on) == (["q_proj", "v_proj"], 4, "sums")
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    back = store.adapters.download("mine", tmp_path / "back")
    loaded = load_file(back / ADAPTER_WEIGHTS)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    load_adapter(load_model(str(model)), back)


def test_upload_folder_and_checkpoint_are_one_adapter_with_one_copy_of_its_files(
    service: Service, store: GradientStore, adapter: Callable[..., Path]
) -> None:
    folder = adapter()
    checkpoint = store.checkpoints.upload(folder, name="mine")
    first = store.adapters.register(checkpoint="mine")
    assert first.checkpoint == checkpoint.id
    assert store.adapters.upload(folder).id == store.adapters.register(folder).id == first.id
    # with a learning rate it is another checkpoint, and the same adapter
    other = store.checkpoints.upload(folder, learning_rate=1e-3)
    assert store.adapters.register(checkpoint=other.id) == first
    assert len(list(store.adapters.list())) == 1
    assert len(list(service.backend.settings.checkpoints.glob("ck_*"))) == 2


def test_a_second_copy_that_came_with_an_adapter_does_not_stay(
    store: GradientStore, adapter: Callable[..., Path]
) -> None:
    folder = adapter()
    first = store.adapters.register(checkpoint=store.checkpoints.upload(folder, learning_rate=1e-3).id)
    assert store.adapters.upload(folder) == first  # without a learning rate it would be a checkpoint of its own
    assert [checkpoint.id for checkpoint in store.checkpoints.list()] == [first.checkpoint]


def test_the_scale_is_pefts(store: GradientStore, adapter: Callable[..., Path], model: Path) -> None:
    for number, stabilised in enumerate((False, True)):
        folder = adapter(f"a{number}", use_rslora=stabilised, r=3)
        loaded = load_adapter(load_model(str(model)), folder)
        layer = next(module for module in loaded.modules() if isinstance(module, LoraLayer))
        assert store.adapters.upload(folder).scaling == pytest.approx(layer.scaling["default"])
    assert layer.scaling["default"] == pytest.approx(6 / math.sqrt(3))


def test_an_adapter_of_a_fine_tune_knows_what_it_was_trained_on(service: Service, tmp_path: Path) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    problem_of(service.http.post("/adapters", json={"finetune": job}), 409)
    last = service.train(tmp_path)["result"]["checkpoints"][-1]
    made = service.http.post("/adapters", json={"finetune": job, "name": "sums"})
    assert made.status_code == 201
    found = made.json()
    assert (found["checkpoint"], found["finetune"]) == (last, job)
    assert found["dataset"] == service.http.get("/datasets/pool").json()["id"]
    told = problem_of(service.http.post("/adapters", json={"finetune": job, "dataset": "pool"}), 422)
    assert "leave it out" in told.detail
    told = problem_of(service.http.delete(f"/finetunes/{job}"), 409)
    assert found["id"] in told.detail
    assert service.http.delete("/adapters/sums").status_code == 204
    assert service.http.get(f"/checkpoints/{last}").status_code == 200
    assert service.http.delete(f"/finetunes/{job}").status_code == 204


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["norm"]}, "plain LoRA"),
        ({"trainable_token_indices": [5]}, "plain LoRA"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding"),
    ],
    ids=str,
)
def test_the_bank_takes_plain_lora_only(
    store: GradientStore, adapter: Callable[..., Path], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(Invalid, match=told):
        store.adapters.upload(adapter(**settings))
    assert list(store.checkpoints.list()) == []  # nothing stays of what was refused


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"r": 3}, "the rank of 'model.layers.0.self_attn.q_proj' is 2 and adapter_config.json has r=3"),
        ({"r": "two"}, "both are positive numbers"),
        ({"lora_alpha": 0}, "both are positive numbers"),
        ({"target_modules": ["q_proj"]}, "v_proj', which is none of target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "names 'o_proj', and adapter_model.safetensors has no"),
        ({"rank_pattern": "all"}, "rank_pattern"),
    ],
    ids=str,
)
def test_a_configuration_that_its_tensors_contradict_is_refused(
    store: GradientStore, adapter: Callable[..., Path], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(Invalid, match=told):
        store.adapters.upload(edited(adapter(), **settings))


def test_an_adapter_of_another_base_model_is_refused(
    store: GradientStore, adapter: Callable[..., Path], model: Path
) -> None:
    folder = adapter()
    smaller = save_tiny_model(model.parent / "smaller", hidden_size=16)
    with pytest.raises(Invalid, match=r"q_proj' of .*smaller is \[16, 16\] and the adapter's is \[32, 32\]"):
        store.adapters.upload(folder, base_model=str(smaller))
    shorter = save_tiny_model(model.parent / "shorter", num_hidden_layers=1)
    with pytest.raises(Invalid, match=r"shorter has no module 'model.layers.1"):
        store.adapters.upload(folder, base_model=str(shorter))
    assert store.adapters.upload(folder).base_model == str(model)


def test_modules_are_known_by_what_follows_the_layers_number(adapter: Callable[..., Path], model: Path) -> None:
    folder = adapter()
    shape = shape_of(json.loads((folder / ADAPTER_CONFIG).read_bytes()), read_header(folder / ADAPTER_WEIGHTS))
    size = size_of(model)
    assert size is not None
    renamed = {name.replace("model.", "language_model.model."): tensor for name, tensor in size.tensors.items()}
    refuse_unlike_base(shape, renamed, model="org/base")
    lost = {name: tensor for name, tensor in renamed.items() if "layers.1.self_attn.v_proj" not in name}
    with pytest.raises(InvalidCheckpoint, match=r"has no module 'model.layers.1.self_attn.v_proj'"):
        refuse_unlike_base(shape, lost, model="org/base")


def test_pickles_and_half_pairs_are_refused(store: GradientStore, adapter: Callable[..., Path]) -> None:
    folder = adapter()
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    first = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, folder / ADAPTER_WEIGHTS)
    with pytest.raises(Invalid, match="without"):
        store.adapters.upload(folder)
    (folder / ADAPTER_WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(Invalid, match="convert the adapter to safetensors"):
        store.adapters.upload(folder)


def test_one_source_is_named(service: Service, store: GradientStore, model: Path) -> None:
    for body in ({}, {"finetune": "a", "checkpoint": "b"}, {"checkpoint": "b", "base_model": "org/base"}):
        problem_of(service.http.post("/adapters", json=body), 422)
    untrained = store.checkpoints.register(model=str(model))
    with pytest.raises(Invalid, match="a base model as it is"):
        store.adapters.register(checkpoint=untrained.id)
    problem_of(service.http.post("/adapters", json={"checkpoint": "nothing"}), 404)


# What is found again, and what goes -----------------------------------------------------------------------------------


def test_adapters_are_found_by_what_they_are(
    service: Service, store: GradientStore, adapter: Callable[..., Path], model: Path
) -> None:
    pool = service.pool(name="pool")["id"]
    small = store.adapters.upload(adapter("small"), name="small", dataset="pool")
    large = store.adapters.upload(adapter("large", r=4), name="large")
    wide = store.adapters.upload(adapter("wide", target_modules=["q_proj", "o_proj"]), name="wide")
    other = service.adapter(name="other")
    assert small.dataset == pool

    def found(**asked: Any) -> list[str | None]:
        return [each.name for each in store.adapters.list(**asked)]

    assert found() == ["other", "wide", "large", "small"]
    assert found(base_model=str(model)) == ["wide", "large", "small"]
    assert found(base_model="org/base", revision=other["revision"]) == ["other"]
    assert found(rank=2, base_model=str(model)) == ["wide", "small"]
    assert found(target="v_proj") == ["large", "small"]
    assert found(target=["q_proj", "o_proj"]) == ["wide"]
    assert found(dataset="pool") == ["small"]
    assert found(rank=4, target="o_proj") == []
    pages = service.http.get("/adapters", params={"base_model": str(model), "limit": 2}).json()
    assert ([one["name"] for one in pages["data"]], pages["has_more"]) == (["wide", "large"], True)
    rest = {"base_model": str(model), "limit": 2, "after": pages["data"][-1]["id"]}
    assert [one["name"] for one in service.http.get("/adapters", params=rest).json()["data"]] == ["small"]
    assert {wide.id, large.id} <= {one.id for one in store.adapters.list()}
    problem_of(service.http.get("/adapters", params={"dataset": "nothing"}), 404)


@pytest.mark.services
def test_what_no_database_takes_is_found_nowhere_and_refused(
    postgres_server: PostgresServer, tmp_path: Path, model: Path, adapter: Callable[..., Path]
) -> None:
    settings: dict[str, Any] = {"catalog": postgres_server.database(), "allowed_roots": [tmp_path, model.parent]}
    with serving(tmp_path / "store", **settings) as service:
        odd = {"base_model": "a\0b", "revision": "\0", "target": "q\0"}
        for name, value in odd.items():
            assert service.http.get("/adapters", params={name: value}).json()["data"] == []
        folder = adapter()
        body = {"path": str(folder), "trained_on": "a\0b"}
        assert "control characters" in problem_of(service.http.post("/adapters", json=body), 422).errors[0].detail
        made = service.http.post("/adapters", json={"path": str(folder), "name": "mine"}).json()
        asked = {"base_model": str(model), "rank": 2, "target": ["q_proj", "v_proj"]}
        assert service.http.get("/adapters", params=asked).json()["data"] == [made]
        assert service.http.delete("/adapters/mine").status_code == 204


def test_files_that_came_with_an_adapter_go_with_it(
    service: Service, store: GradientStore, adapter: Callable[..., Path]
) -> None:
    mine = store.adapters.upload(adapter("one"), name="one")
    with pytest.raises(Conflict, match=mine.id):
        store.checkpoints.delete(mine.checkpoint)
    store.adapters.delete("one")
    assert list(store.checkpoints.list()) == []
    assert list(service.backend.settings.checkpoints.glob("ck_*")) == []

    kept = store.checkpoints.upload(adapter("two", seed=1))
    store.adapters.register(checkpoint=kept.id, name="two")
    store.adapters.delete("two")
    assert [one.id for one in store.checkpoints.list()] == [kept.id]

    used = store.adapters.upload(adapter("three", seed=2), name="three")
    run = store.runs.create([used.checkpoint])
    store.adapters.delete("three")
    assert store.runs.get(run.id).checkpoints[0].id == used.checkpoint


def test_a_refused_name_leaves_nothing(store: GradientStore, adapter: Callable[..., Path]) -> None:
    store.adapters.upload(adapter("one"), name="taken")
    with pytest.raises(Conflict, match="taken"):
        store.adapters.upload(adapter("two", seed=1), name="taken")
    assert len(list(store.checkpoints.list())) == len(list(store.adapters.list())) == 1


def test_the_same_from_the_command_line_and_awaited(
    service: Service,
    adapter: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = adapter()

    def run(*words: str) -> str:
        monkeypatch.setenv("GRADSTORE_URL", service.url)
        with pytest.raises(SystemExit) as left:
            cli.app(["adapters", *words], prog_name="gradstore")
        said = capsys.readouterr()
        assert left.value.code == 0, said.err
        return said.out.strip()

    made = run("upload", str(folder), "--name", "mine", "--trained-on", "sums")
    assert made.startswith("ad_")
    assert run("register", str(folder)) == made
    assert json.loads(run("list", "--rank", "2", "--target", "q_proj", "--target", "v_proj", "--json"))["id"] == made
    assert run("list", "--rank", "3", "--json") == ""
    run("download", "mine", str(tmp_path / "back"))
    assert (tmp_path / "back" / ADAPTER_WEIGHTS).read_bytes() == (folder / ADAPTER_WEIGHTS).read_bytes()

    async def awaited() -> list[str]:
        async with AsyncGradientStore(service.url) as store:
            return [each.id async for each in store.adapters.list(target="v_proj")]

    assert asyncio.run(awaited()) == [made]
    run("delete", "mine")
    assert httpx.get(f"{service.url}/adapters/{made}").status_code == 404


def test_a_damaged_adapter_is_refused_with_its_tensor(store: GradientStore, adapter: Callable[..., Path]) -> None:
    folder = adapter()
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    name = next(iter(tensors))
    tensors[name] = torch.from_numpy(np.full(tensors[name].shape, np.nan, np.float32))
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    with pytest.raises(Invalid, match="not finite"):
        store.adapters.upload(folder)
