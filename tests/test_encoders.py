"""Sentence encoders: what their files say, and embeddings against `transformers` one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradstore.types import GradientsRequest
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, T5Config, T5EncoderModel, T5ForConditionalGeneration

from datastore import encoders, models
from datastore.checkpoints import Checkpoints
from datastore.encoders import Encoder
from datastore.errors import InvalidInput
from datastore.rows import Example, Message
from tests.hub import Hub
from tests.tiny import TEXTS, save_tiny_encoder, tiny_tokenizer
from tests.workplace import Workplace, numbered
from worker.encoders import EMBEDDING, NO_TEXT, EncoderEngine, load_encoder, read_texts
from worker.features import FEATURE_NOT_FINITE
from worker.models import ModelError, load_tokenizer

WIDTH = 24
MEAN = {"Pooling": {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}}
ROWS = [Example(id=None, origin="test", prompt=text, completion=text[:number]) for number, text in enumerate(TEXTS, 5)]


def described(folder: Path) -> Encoder:
    return encoders.described(str(folder), None)


def pooled(states: NDArray[np.float64], how: str) -> NDArray[np.float64]:
    """One text's states (tokens, width), pooled as sentence-transformers says."""
    count = len(states)
    places = np.arange(1, count + 1)
    ways = {
        "cls": states[0],
        "max": states.max(0),
        "mean": states.sum(0) / count,
        "mean_sqrt_len": states.sum(0) / np.sqrt(count),
        "position": (places[:, None] * states).sum(0) / places.sum(),
        "last": states[-1],
    }
    return ways[how]


def by_hand(folder: Path, encoder: Encoder, texts: list[str], *, max_length: int | None = None) -> NDArray[np.float64]:
    """The embeddings of texts one at a time, in double precision."""
    model = AutoModel.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        said = (encoder.prompt + text).strip()
        ids = tokenizer(said.lower() if encoder.lower else said)["input_ids"][: max_length or encoder.max_length]
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        row = np.concatenate([pooled(states, how) for how in encoder.poolings])
        found.append(row / np.linalg.norm(row) if encoder.normalise else row)
    return np.array(found)


def embedded(folder: Path, encoder: Encoder, rows: list[Example], **settings: Any) -> NDArray[np.float32]:
    """The embeddings of rows as a worker computes them."""
    tokenizer = load_tokenizer(str(folder))
    budget = settings.pop("token_budget", 64)
    read = read_texts(
        rows, tokenizer=tokenizer, encoder=encoder, max_length=encoder.max_length, check=lambda: None, **settings
    )
    engine = EncoderEngine(load_encoder(str(folder)), encoder)
    features = engine.features(read.encoded, pad_id=int(tokenizer.pad_token_id or 0), token_budget=budget)[EMBEDDING]
    assert features.reasons == [None] * len(read.encoded)
    assert features.tokens.tolist() == [len(row.input_ids) for row in read.encoded]
    (found,) = features.by_dim.values()
    np.testing.assert_allclose(features.norms, np.linalg.norm(found, axis=1), rtol=1e-6)
    return found


# What the files say ---------------------------------------------------------------------------------------------------


def test_a_plain_encoder_is_averaged_and_cut_at_its_positions(tmp_path: Path) -> None:
    assert described(save_tiny_encoder(tmp_path / "bert")) == Encoder(width=WIDTH, max_length=64)
    (tmp_path / "bare").mkdir()
    for config, most in (
        ({"hidden_size": 8}, 512),
        ({"hidden_size": 8, "max_position_embeddings": 514, "model_type": "xlm-roberta", "pad_token_id": 1}, 512),
        ({"hidden_size": 8, "max_position_embeddings": 512, "model_type": "bert", "pad_token_id": 0}, 512),
    ):
        (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
        assert described(tmp_path / "bare") == Encoder(width=8, max_length=most)


@pytest.mark.parametrize(
    ("modules", "poolings", "normalise"),
    [
        (MEAN, ("mean",), False),
        (
            {"Pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "Normalize": {}},
            ("cls",),
            True,
        ),
        ({"Pooling": {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}}, ("cls", "max"), False),
        ({"Pooling": {"pooling_mode_mean_sqrt_len_tokens": True}}, ("mean_sqrt_len",), False),
        ({"Pooling": {"pooling_mode_weightedmean_tokens": True, "include_prompt": True}}, ("position",), False),
        ({"Pooling": {"pooling_mode": "lasttoken", "include_prompt": True}}, ("last",), False),
        ({"Pooling": {"pooling_mode": ["mean", "cls"]}}, ("cls", "mean"), False),
    ],
)
def test_a_folder_of_sentence_transformers_says_how_it_pools(
    tmp_path: Path, modules: dict[str, Any], poolings: tuple[str, ...], normalise: bool
) -> None:
    found = described(save_tiny_encoder(tmp_path / "encoder", modules=modules))
    assert (found.poolings, found.normalise, found.dim) == (poolings, normalise, WIDTH * len(poolings))
    assert Encoder.of_plan(json.loads(json.dumps(found.plan()))) == found


def test_length_case_and_prompt_are_the_files(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder", modules=MEAN)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": true}')
    prompts = {"prompts": {"query": "query: ", "document": "doc: "}, "default_prompt_name": "document"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    found = described(folder)
    assert (found.max_length, found.lower, found.prompt) == (16, True, "doc: ")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 1000}')
    assert described(folder).max_length == 64


@pytest.mark.parametrize(
    ("modules", "match"),
    [
        ({**MEAN, "Dense": {}}, "the module Dense"),
        ({"Normalize": {}}, "the module Normalize"),
        ({}, "without a Pooling"),
        ({"Pooling": {"pooling_mode_mean_tokens": False}}, "pools by nothing"),
        ({"Pooling": {"pooling_mode_attention_tokens": True}}, "pools by attention"),
    ],
)
def test_what_is_not_done_here_is_refused(tmp_path: Path, modules: dict[str, Any], match: str) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder", modules=modules)
    with pytest.raises(InvalidInput, match=match):
        described(folder)


def test_registering_an_encoder_of_other_modules_is_refused_at_once_in_the_same_words(tmp_path: Path) -> None:
    folders = {name: save_tiny_encoder(tmp_path / name, modules=MEAN | modules) for name, modules in (
        ("done", {"Normalize": {}}), ("dense", {"Dense": {}}),
    )}  # fmt: skip
    plain = save_tiny_encoder(tmp_path / "plain")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for folder in (folders["done"], plain):
        assert checkpoints.register_base(str(folder)).method == "none"
    with pytest.raises(InvalidInput, match="the module Dense") as registered:
        checkpoints.register_base(str(folders["dense"]))
    with pytest.raises(InvalidInput) as asked:
        described(folders["dense"])
    assert str(registered.value) == str(asked.value)
    assert [item.pointer for item in registered.value.errors] == ["/model"]


def test_registering_an_encoder_of_the_hub_looks_at_what_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder", modules={**MEAN, "Dense": {}})
    names = ("config.json", "modules.json", "1_Pooling/config.json")
    commit = hub.publish("org/dense", {name: (folder / name).read_bytes() for name in names})
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.register_base("org/dense").revision == commit
    with pytest.raises(InvalidInput, match="the module Dense"):
        encoders.described("org/dense", commit)
    with pytest.raises(InvalidInput, match="the module Dense"):
        checkpoints.register_base("org/dense", name="again")


def test_a_prompt_that_is_not_pooled_is_refused(tmp_path: Path) -> None:
    pooling = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    folder = save_tiny_encoder(tmp_path / "encoder", modules={"Pooling": pooling})
    assert described(folder).poolings == ("mean",)
    prompts = {"prompts": {"q": "query: "}, "default_prompt_name": "q"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with pytest.raises(InvalidInput, match="without their prompt"):
        described(folder)


@pytest.mark.parametrize("text", ["not JSON", "[1]", '[{"type": "x.Pooling"}]'])
def test_files_that_describe_nothing_are_refused(tmp_path: Path, text: str) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder")
    (folder / "modules.json").write_text(text)
    with pytest.raises(InvalidInput, match="do not describe an encoder"):
        described(folder)
    with pytest.raises(InvalidInput, match=r"config\.json"):
        described(tmp_path / "gone")


def test_how_an_encoder_pools_belongs_to_its_revision(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder", modules=MEAN)
    before = models.fingerprint(folder)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert models.fingerprint(folder) != before


def test_the_small_files_of_an_encoder_of_the_hub_are_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder", modules={**MEAN, "Normalize": {}})
    names = ("config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json", "model.safetensors")
    commit = hub.publish("org/encoder", {name: (folder / name).read_bytes() for name in names})
    found = encoders.described("org/encoder", commit)
    assert (found.dim, found.poolings, found.normalise) == (WIDTH, ("mean",), True)


# Embeddings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poolings", [("cls",), ("max",), ("mean",), ("mean_sqrt_len", "position"), ("last",)])
@pytest.mark.parametrize("normalise", [False, True])
def test_embeddings_are_those_of_each_text_alone(tmp_path: Path, poolings: tuple[str, ...], normalise: bool) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder", max_position_embeddings=256)
    encoder = Encoder(width=WIDTH, max_length=256, poolings=poolings, normalise=normalise, lower=True, prompt="Read: ")
    expected = by_hand(folder, encoder, [row.text for row in ROWS])
    for budget in (1, 100, 10_000):
        found = embedded(folder, encoder, ROWS, token_budget=budget)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_text_is_what_user_and_assistant_say_cut_at_the_longest(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder")
    encoder = Encoder(width=WIDTH, max_length=9)
    turns = (Message("system", "Be brief."), Message("user", "Why?"), Message("assistant", "no.", prefix="Because: "))
    row = Example(id=None, origin="test", messages=turns)
    assert row.text == "Why?\nBecause: no."
    expected = by_hand(folder, encoder, [row.text], max_length=9)
    np.testing.assert_allclose(embedded(folder, encoder, [row]), expected, rtol=1e-4, atol=1e-5)


def test_a_row_without_text_and_one_that_is_not_finite_have_reasons(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder")
    model, tokenizer = load_encoder(str(folder)), load_tokenizer(str(folder))
    silent = Example(id=None, origin="test", prompt=" ", completion="")
    encoder = Encoder(width=WIDTH, max_length=64)
    read = read_texts([silent, *ROWS], tokenizer=tokenizer, encoder=encoder, max_length=64, check=lambda: None)
    assert read.reasons == [NO_TEXT] + [None] * len(ROWS)
    with torch.no_grad():
        model.get_input_embeddings().weight[read.encoded[1].input_ids[1]] = float("nan")
    broken = [read.encoded[1].input_ids[1] in row.input_ids for row in read.encoded]
    features = EncoderEngine(model, encoder).features(read.encoded, pad_id=0, token_budget=500)[EMBEDDING]
    assert features.reasons == [FEATURE_NOT_FINITE if each else None for each in broken]
    with pytest.raises(ModelError, match="promises hidden states of 23"):
        EncoderEngine(model, Encoder(width=23, max_length=64)).features(read.encoded, pad_id=0, token_budget=500)


def test_of_an_encoder_decoder_the_encoder_is_taken(tmp_path: Path) -> None:
    config = T5Config(vocab_size=len(tiny_tokenizer()), d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert isinstance(load_encoder(str(tmp_path)), T5EncoderModel)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_encoder(str(tmp_path / "gone"))


# The job --------------------------------------------------------------------------------------------------------------


def test_a_worker_stores_the_embeddings_of_a_pool_and_a_task(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder", modules={**MEAN, "Normalize": {}})
    place = Workplace.at(tmp_path, model=folder)
    lines = numbered(range(7))
    pool = place.pool(lines)
    task = place.task()
    checkpoint = place.base()
    wanted: dict[str, Any] = {"checkpoints": [checkpoint.id], "kinds": ["embedding"], "dtype": "float32"}
    encoder = described(folder)
    validation = [row.example.text for row in place.context.tasks.validation(task.id)]
    of_pool = [f"{row['prompt']}\n{row['completion']}" for row in lines]
    for owner, texts in (({"dataset": pool.id}, of_pool), ({"task": task.id}, validation)):
        result = place.done(GradientsRequest(**owner, **wanted))
        (found,) = result["feature_sets"]
        assert (found["kind"], found["dim"], found["template"], found["max_length"]) == ("embedding", WIDTH, None, 64)
        assert found["projection"] is None
        np.testing.assert_allclose(place.stored(found["id"]), by_hand(folder, encoder, texts), atol=1e-5)
        assert result["excluded"] == []
    grown = place.done(GradientsRequest(dataset=place.pool(numbered(range(9))).id, **wanted))
    assert (grown["rows"], grown["computed_rows"]) == (9, 2)
