"""What is known of base models without torch agrees with what torch makes of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from gradstore.types import LoraSettings
from peft import LoraConfig, get_peft_model

from datastore import models
from datastore.errors import InvalidInput, PathNotAllowed
from datastore.rows import Example, Message
from tests.conftest import REPOSITORY
from tests.hub import Hub
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

EXAMPLE = Example(id=None, origin="test", messages=(Message("user", "What is 2 + 3?"), Message("assistant", "5")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def size_of(folder: Path) -> models.Size:
    size = models.size_of(folder)
    assert size is not None
    return size


def test_the_size_of_a_model_is_read_from_its_files(folder: Path) -> None:
    size = size_of(folder)
    assert size.parameters == sum(parameter.numel() for parameter in tiny_model(tiny_tokenizer()).parameters())
    assert (size.hidden, size.layers, size.vocabulary) == (32, 2, len(tiny_tokenizer()))
    assert size.stored_bytes("float32") == 2 * size.stored_bytes("bfloat16") == 4 * size.parameters


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"])
def test_the_size_of_an_adapter_is_pefts(folder: Path, targets: list[str] | str) -> None:
    lora = LoraSettings.model_validate({"r": 4, "targets": targets})
    adapted = get_peft_model(tiny_model(tiny_tokenizer()), LoraConfig(r=4, target_modules=targets))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert size_of(folder).lora_parameters(lora) == trained


def test_a_folder_without_weights_has_no_size(tmp_path: Path) -> None:
    assert models.size_of(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert models.size_of(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    assert models.size_of(tmp_path) is None


def test_gradient_checkpointing_needs_less_memory(folder: Path) -> None:
    size = size_of(folder)
    kept, checkpointed = (
        size.activation_bytes(tokens=64, item_bytes=4, checkpointing=checkpointing) for checkpointing in (False, True)
    )
    assert 0 < checkpointed < kept


def test_rows_are_measured_by_the_models_own_tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    counted = sum(len(tokenizer.encode(message.content)) + models.TOKENS_PER_TURN for message in EXAMPLE.messages)
    assert models.lengths([EXAMPLE], folder=folder, max_length=2048) == models.Lengths(counted, counted)


def test_without_a_tokenizer_rows_are_measured_by_their_bytes() -> None:
    row = Example(id=None, origin="test", prompt="p" * 60, completion="c" * 40)
    assert models.lengths([row], folder=None, max_length=2048).mean == 25
    assert models.lengths([row], folder=None, max_length=10).longest == 10
    assert models.lengths([], folder=None, max_length=10) == models.Lengths(0.0, 0)


@pytest.mark.parametrize("rows", [0, 1, 256, 257, 1000, 1_000_003])
def test_a_sample_is_spread_over_all_rows(rows: int) -> None:
    ranges = models.sample(rows)
    assert ranges[0].start == 0
    assert ranges[-1].stop == rows
    assert sum(map(len, ranges)) == min(rows, 256)
    assert all(before.stop <= after.start for before, after in pairwise(ranges))


def test_a_hub_id_stays_as_it_is(tmp_path: Path) -> None:
    assert models.resolve("Qwen/Qwen3-0.6B", roots=[tmp_path]) == "Qwen/Qwen3-0.6B"


def test_a_folder_becomes_its_absolute_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.resolve(str(folder), roots=[folder.parent]) == str(folder)
    monkeypatch.chdir(folder.parent.parent)
    assert models.resolve(f"{folder.parent.name}/tiny", roots=[folder.parent]) == str(folder)


def test_a_folder_that_looks_like_a_hub_id_is_no_way_around_the_roots(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(PathNotAllowed):
        models.resolve(f"{folder.parent.name}/tiny", roots=[tmp_path])


@pytest.mark.parametrize("model", ["gpt2", "a/b/c", "../x/y", "/etc", "", "org/mo del"])
def test_what_is_neither_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        models.resolve(model, roots=[tmp_path])


def test_a_model_of_the_hub_is_found_among_the_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert models.folder_of("org/tiny", None) is None
    home = tmp_path / "models--org--tiny"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    assert models.folder_of("org/tiny", None) == snapshot
    assert models.folder_of("org/tiny", "v2") is None


def test_a_folders_revision_is_its_content(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert models.revision_of(str(copy), None) == models.revision_of(str(folder), None)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    changed = models.revision_of(str(copy), None)
    assert changed != models.revision_of(str(folder), None)
    with pytest.raises(InvalidInput, match="its files have changed"):
        models.revision_of(str(copy), models.revision_of(str(folder), None))
    assert models.revision_of(str(copy), changed) == changed


def test_a_model_that_the_services_user_may_not_read_is_refused_in_words(folder: Path) -> None:
    """In a process of its own, since whoever runs the tests as root may read everything."""
    with tempfile.TemporaryDirectory() as place:
        copy = shutil.copytree(folder, Path(place) / "model")
        Path(place).chmod(0o755)
        (copy / "model.safetensors").chmod(0)
        code = (
            "import os, sys; from datastore import models; from datastore.errors import InvalidInput\n"
            "os.getuid() or os.setuid(65534)\n"
            "try: models.revision_of(sys.argv[1], None)\n"
            "except InvalidInput as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(copy)], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.stdout.startswith(f"/model: {copy / 'model.safetensors'} may not be read here"), done.stderr


def test_a_large_files_fingerprint_reads_its_beginning_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(8 << 20))
    seen = {models.fingerprint(tmp_path)}
    for place in (0, (8 << 20) - 1):
        content = bytearray(8 << 20)
        content[place] = 1
        path.write_bytes(content)
        seen.add(models.fingerprint(tmp_path))
    assert len(seen) == 3


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="put the folder back"):
        models.revision_of(str(tmp_path / "gone"), None)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/1"])
def test_a_hub_models_revision_is_its_commit(revision: str | None, hub: Hub) -> None:
    commit = hub.publish("org/tiny", {"config.json": b"{}"}, branch=revision or "main")
    assert models.revision_of("org/tiny", revision) == models.revision_of("org/tiny", commit) == commit


@pytest.mark.parametrize("revision", ["", "../../main", "a b", "x\0", "v" * 201, "/main"])
def test_what_is_no_revision_is_refused(revision: str) -> None:
    with pytest.raises(InvalidInput):
        models.revision_of("org/tiny", revision)
