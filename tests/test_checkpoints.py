"""Checkpoints: what PEFT, the HF Trainer and LESS leave is taken in whole, and nothing else is."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from datastore.checkpoints import MOMENTS, Checkpoints, base_model, file_key, parameter_name, run_id
from datastore.errors import InvalidCheckpoint, NotFound
from datastore.tensors import STEP, check_finite, read_header
from tests.tiny import save_tiny_model
from tests.workplace import random_moments, tiny_adapter
from worker import moments
from worker.directions import Moments
from worker.models import load_adapter, load_model

LAYERS = 11  # so that layer 10 comes before layer 2 by name, and after it by position


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    return save_tiny_model(folder, num_hidden_layers=LAYERS, hidden_size=16, intermediate_size=16, attention_bias=True)


@pytest.fixture
def adapter(tmp_path: Path, model: Path) -> Path:
    """A folder as PEFT writes it."""
    tiny_adapter(model).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


class Trained:
    """A checkpoint that a Trainer of transformers has written, and Adam's state by the parameters themselves."""

    def __init__(self, folder: Path, model: Path) -> None:
        config = LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], bias="lora_only", task_type="CAUSAL_LM"
        )
        torch.manual_seed(0)
        adapted = get_peft_model(load_model(str(model)), config)
        rows = [{"input_ids": [5 + row, 6, 7, 8], "labels": [5 + row, 6, 7, 8]} for row in range(8)]
        arguments = TrainingArguments(
            output_dir=str(folder), num_train_epochs=3, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
            save_strategy="epoch", report_to="none", disable_tqdm=True, learning_rate=1e-2, weight_decay=0.1,
        )  # fmt: skip
        trainer = Trainer(model=adapted, args=arguments, train_dataset=rows)
        trainer.train()
        optimizer = trainer.optimizer
        assert optimizer is not None
        self.folder = folder / "checkpoint-6"
        self.state: dict[str, dict[str, Tensor]] = {
            name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
            for name, parameter in adapted.named_parameters()
            if parameter.requires_grad
        }
        self.rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    def same(self, found: Moments) -> bool:
        return found.exp_avg.keys() == self.state.keys() and all(
            torch.equal(found.exp_avg[name], state["exp_avg"])
            and torch.equal(found.exp_avg_sq[name], state["exp_avg_sq"])
            for name, state in self.state.items()
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Trained:
    return Trained(tmp_path_factory.mktemp("trainer"), model)


# What people have -----------------------------------------------------------------------------------------------------


def test_an_adapter_folder_is_taken_in_and_loads(checkpoints: Checkpoints, adapter: Path, model: Path) -> None:
    found = checkpoints.register(adapter, learning_rate=1e-4, name="mine")
    loaded = load_adapter(load_model(str(model)), checkpoints.weights(found.id))
    before = load_file(adapter / "adapter_model.safetensors")
    after = {file_key(name): value for name, value in loaded.named_parameters() if value.requires_grad}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert found.model == str(model)
    assert found.parameters == sum(value.numel() for value in before.values())
    assert (found.name, found.method, found.learning_rate) == ("mine", "lora", 1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"trainable_token_indices": [5, 9]}, {"modules_to_save": ["norm"]}, {"use_dora": True, "bias": "all"}],
    ids=["tokens", "all norms", "magnitudes and biases"],
)
def test_all_that_an_adapter_trains_is_counted_and_has_moments(
    checkpoints: Checkpoints, model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapted = get_peft_model(
        load_model(str(model)), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    )
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    moments.write(tmp_path / "adapter" / MOMENTS, random_moments(adapted))
    found = checkpoints.register(tmp_path / "adapter")
    assert found.has_moments
    assert found.parameters == sum(value.numel() for value in adapted.parameters() if value.requires_grad)


def test_an_adapter_without_an_optimizer_has_no_moments_and_says_why(checkpoints: Checkpoints, adapter: Path) -> None:
    found = checkpoints.register(adapter)
    assert not found.has_moments
    assert "no optimizer state" in str(found.moments_note)
    assert checkpoints.moments(found.id) is None


def test_the_same_files_are_the_same_checkpoint_and_other_facts_another(
    checkpoints: Checkpoints, adapter: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    first = checkpoints.register(adapter)
    config["target_modules"] = config["target_modules"][::-1]  # PEFT writes a set, in any order
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert checkpoints.register(adapter).id == first.id
    assert checkpoints.register(adapter, step=3).id != first.id
    assert checkpoints.register(adapter, precision="bfloat16").id != first.id


def test_a_folder_inside_an_unpacked_archive_is_found(checkpoints: Checkpoints, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "unpacked" / "my-adapter")
    assert checkpoints.register(tmp_path / "unpacked").id == checkpoints.register(adapter).id


def test_a_trainers_checkpoint_is_registered_with_its_moments_step_and_rate(
    checkpoints: Checkpoints, trained: Trained
) -> None:
    found = checkpoints.register(trained.folder)
    stored = checkpoints.moments(found.id)
    assert stored is not None
    assert trained.same(moments.read(stored))
    assert moments.read(stored).step == found.step == 6
    assert found.learning_rate == pytest.approx(sum(trained.rates[4:]) / 2)  # two steps an epoch


def test_moments_by_position_get_the_names_of_their_parameters_through_both_groups(
    trained: Trained, model: Path
) -> None:
    groups = torch.load(trained.folder / "optimizer.pt", weights_only=True)["param_groups"]
    assert [len(group["params"]) for group in groups] == [4 * LAYERS, 2 * LAYERS]  # matrices; biases
    assert trained.same(moments.of_file(trained.folder / "optimizer.pt", adapter=trained.folder, model=str(model)))


@pytest.mark.parametrize("prefix", ["", "module.", "_fsdp_wrapped_module."])
def test_less_layout_has_its_moments_by_name(trained: Trained, model: Path, tmp_path: Path, prefix: str) -> None:
    state = {prefix + name: state for name, state in trained.state.items()}
    torch.save({"state": state, "param_groups": [{"params": list(state)}]}, tmp_path / "optimizer.bin")
    assert trained.same(moments.of_file(tmp_path / "optimizer.bin", adapter=trained.folder, model="not/needed"))


def test_a_group_without_decay_settings_is_in_the_order_of_the_parameters(
    trained: Trained, model: Path, tmp_path: Path
) -> None:
    positions = dict(enumerate(trained.state.values()))
    torch.save({"state": positions, "param_groups": [{"params": list(positions)}]}, tmp_path / "optimizer.pt")
    assert trained.same(moments.of_file(tmp_path / "optimizer.pt", adapter=trained.folder, model=str(model)))


def test_moments_that_were_exported_are_taken_in_as_they_are(
    checkpoints: Checkpoints, adapter: Path, model: Path
) -> None:
    moments.write(adapter / "moments.safetensors", random_moments(tiny_adapter(model)))
    found = checkpoints.register(adapter)
    assert found.has_moments
    assert checkpoints.moments(found.id).read_bytes() == (adapter / "moments.safetensors").read_bytes()  # type: ignore[union-attr]


def test_a_whole_model_is_registered_with_the_base_it_came_from(checkpoints: Checkpoints, model: Path) -> None:
    found = checkpoints.register(model, model="org/base")
    assert (found.method, found.has_moments, found.model) == ("full", False, "org/base")
    assert load_model(str(checkpoints.weights(found.id))).num_parameters() == found.parameters
    with pytest.raises(InvalidCheckpoint, match="say which one it is with `model`"):
        checkpoints.register(model)


def test_a_deleted_checkpoint_is_gone(checkpoints: Checkpoints, adapter: Path) -> None:
    found = checkpoints.register(adapter)
    checkpoints.delete(found.id)
    checkpoints.delete(found.id)
    with pytest.raises(NotFound):
        checkpoints.weights(found.id)
    with pytest.raises(NotFound):
        checkpoints.weights("../checkpoints")


TOKENS = "a.embed_tokens.token_adapter.trainable_tokens_delta"


def test_parameters_and_files_have_names_for_each_other() -> None:
    for key in ("a.q_proj.lora_A.weight", "a.lora_embedding_B", "a.q_proj.lora_magnitude_vector", TOKENS):
        assert file_key(parameter_name(key)) == key
    assert file_key("a.default_head.lora_B.default.weight") == "a.default_head.lora_B.weight"
    assert file_key("a.head.modules_to_save.default.weight") == "a.head.weight"


def test_a_run_is_named_by_its_checkpoints_in_order() -> None:
    assert run_id(["ck_1", "ck_2"]) == run_id(("ck_1", "ck_2")) != run_id(["ck_2", "ck_1"])


# What does not fit ----------------------------------------------------------------------------------------------------


def test_an_optimizer_of_another_adapter_is_refused_with_both_counts(
    trained: Trained, adapter: Path, model: Path
) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"66 parameters in groups of \[44, 22\].* has 44: 44 that decay and 0"):
        moments.of_file(trained.folder / "optimizer.pt", adapter=adapter, model=str(model))


def test_an_optimizer_of_another_rank_is_refused_with_both_shapes(model: Path, tmp_path: Path) -> None:
    tiny_adapter(model, r=3).save_pretrained(str(tmp_path / "adapter"))
    other = random_moments(tiny_adapter(model, r=2))
    _save_optimizer(tmp_path / "optimizer.pt", other)
    with pytest.raises(InvalidCheckpoint, match=r"the exp_avg of '.*lora_A.* has the shape \[2, 16\], the adapter \[3"):
        moments.of_file(tmp_path / "optimizer.pt", adapter=tmp_path / "adapter", model=str(model))


def test_names_that_are_not_the_adapters_are_counted_and_shown(adapter: Path, model: Path, tmp_path: Path) -> None:
    other = random_moments(tiny_adapter(model, targets=("q_proj", "o_proj")))
    _save_optimizer(tmp_path / "optimizer.bin", other, named=True)
    wanted = r"22 tensors of the adapter are not in it, the first one '.*v_proj.*'; 22 of its own .*o_proj"
    with pytest.raises(InvalidCheckpoint, match=wanted):
        moments.of_file(tmp_path / "optimizer.bin", adapter=adapter, model=str(model))


def test_a_parameter_that_was_never_trained_is_named(adapter: Path, model: Path, tmp_path: Path) -> None:
    _save_optimizer(tmp_path / "optimizer.pt", random_moments(tiny_adapter(model)), without=7)
    with pytest.raises(
        InvalidCheckpoint, match=r"1 of its 44 parameters have no moments, the first one '.*layers\.1\."
    ):
        moments.of_file(tmp_path / "optimizer.pt", adapter=adapter, model=str(model))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"momentum_buffer": torch.zeros(2)}, "no exp_avg, so this is no Adam"),
        ({"exp_avg": torch.full((2, 16), torch.nan), "exp_avg_sq": torch.zeros(2, 16), "step": 1}, "finite numbers"),
        ({"exp_avg": torch.zeros(2, 16), "exp_avg_sq": -torch.ones(2, 16), "step": 1}, "negative"),
        ({"exp_avg": torch.zeros(2, 16), "exp_avg_sq": torch.ones(2, 16)}, "how many steps"),
    ],
)
def test_a_state_that_is_no_adams_is_refused(tmp_path: Path, state: dict[str, Any], reason: str) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    name = "a.lora_A.weight"
    save_file({name: torch.zeros(2, 16)}, tmp_path / "adapter_model.safetensors")
    torch.save({"state": {name: state}}, tmp_path / "optimizer.bin")
    with pytest.raises(InvalidCheckpoint, match=reason):
        moments.of_file(tmp_path / "optimizer.bin", adapter=tmp_path, model="not/needed")


def test_exported_moments_of_another_adapter_are_refused(checkpoints: Checkpoints, adapter: Path, model: Path) -> None:
    other = random_moments(tiny_adapter(model, targets=("q_proj",)))
    moments.write(adapter / "moments.safetensors", other)
    with pytest.raises(InvalidCheckpoint, match=r"lacks the exp_avg of '.*v_proj.*' and 21 more"):
        checkpoints.register(adapter)


def test_a_base_model_that_is_not_here_is_asked_for(checkpoints: Checkpoints, adapter: Path) -> None:
    _change(adapter / "adapter_config.json", base_model_name_or_path="/home/elsewhere/llama")
    assert base_model(adapter) == "/home/elsewhere/llama"
    with pytest.raises(InvalidCheckpoint, match="'/home/elsewhere/llama', a folder that is not on this machine"):
        checkpoints.register(adapter)
    assert checkpoints.register(adapter, model="org/llama", revision="main").model == "org/llama"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda folder: _change(folder / "adapter_config.json", peft_type="PROMPT_TUNING"), "only LORA adapters"),
        (lambda folder: _change(folder / "adapter_config.json", task_type="SEQ_CLS"), "must be CAUSAL_LM"),
        (lambda folder: _cut(folder / "adapter_model.safetensors"), "cut off"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x80\x02}q\x00."), "cut off"),
        (lambda folder: save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors"), "no LoRA tensor"),
        (
            lambda folder: save_file({"q.lora_A.weight": torch.zeros(2, 4)}, folder / "adapter_model.safetensors"),
            "without 'q.lora_B.weight'",
        ),
    ],
)
def test_a_folder_that_is_no_adapter_is_refused_and_nothing_is_kept(
    checkpoints: Checkpoints, adapter: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(adapter)
    with pytest.raises(InvalidCheckpoint, match=reason):
        checkpoints.register(adapter)
    assert [path.name for path in checkpoints.root.glob("*")] in ([], ["unfinished"])
    assert not list(checkpoints.root.glob("unfinished/*"))


def test_of_several_adapters_in_a_folder_none_is_taken_by_chance(
    checkpoints: Checkpoints, adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    for step in (100, 200):
        shutil.copytree(adapter, output / f"checkpoint-{step}")
    for read in (base_model, checkpoints.register):
        with pytest.raises(InvalidCheckpoint, match=r"holds 2 adapters \(checkpoint-100, checkpoint-200\)"):
            read(output)
    shutil.rmtree(output / "checkpoint-100")
    assert checkpoints.register(output).id == checkpoints.register(adapter).id


# What could do harm ---------------------------------------------------------------------------------------------------


class Bomb:
    """An object whose unpickling writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_an_optimizer_that_would_run_code_is_refused_unopened(
    checkpoints: Checkpoints, adapter: Path, tmp_path: Path
) -> None:
    target = tmp_path / "it-ran"
    torch.save({"state": {0: Bomb(target)}, "param_groups": []}, adapter / "optimizer.pt")
    with pytest.raises(InvalidCheckpoint, match=r"holds more than tensors.*leave optimizer\.pt out"):
        checkpoints.register(adapter)
    assert not target.exists()
    torch.load(adapter / "optimizer.pt", weights_only=False)  # so it was no dud
    assert target.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2], protocol=2), b"\x80\x02}q"])
def test_an_optimizer_that_is_none_is_refused(adapter: Path, model: Path, content: bytes) -> None:
    (adapter / "optimizer.pt").write_bytes(content)
    with pytest.raises(InvalidCheckpoint):
        moments.of_file(adapter / "optimizer.pt", adapter=adapter, model=str(model))


def test_a_pickled_adapter_is_refused_with_the_way_out(checkpoints: Checkpoints, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(InvalidCheckpoint, match=r"could run code.*safe_serialization=True"):
        checkpoints.register(adapter)


def test_pickles_beside_a_model_are_not_taken_along(checkpoints: Checkpoints, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    torch.save({}, tmp_path / "model" / "training_args.bin")
    found = checkpoints.register(tmp_path / "model", model="org/base")
    assert not [path for path in checkpoints.weights(found.id).iterdir() if path.suffix in {".bin", ".pt"}]


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": [1]},
        [1],
    ],
)
def test_a_header_that_does_not_describe_its_bytes_is_refused(tmp_path: Path, header: object) -> None:
    raw = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(InvalidCheckpoint):
        read_header(tmp_path / "x.safetensors")


def test_a_header_tells_names_types_and_shapes(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"step": "7"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (info.dtype, info.shape, info.size) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3), 6), "b": ("BF16", (4,), 4), "c": ("F32", (0,), 0),
    }  # fmt: skip
    assert header.metadata == {"step": "7"}


def _hold(path: Path, value: float, *, at: int = -1, dtype: torch.dtype | None = None) -> str:
    """Put a number into the last tensor of a file, and return the tensor's name."""
    tensors = load_file(path)
    name = list(tensors)[-1]
    found = tensors[name].to(dtype or tensors[name].dtype)
    found.view(-1)[at] = value
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors | {name: found}, path, metadata=metadata)
    return name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_adapter_with_a_number_that_is_not_finite_is_refused(
    checkpoints: Checkpoints, adapter: Path, value: float, dtype: torch.dtype
) -> None:
    _hold(adapter / "adapter_model.safetensors", torch.finfo(dtype).max, dtype=dtype)
    assert checkpoints.register(adapter)
    name = _hold(adapter / "adapter_model.safetensors", value, dtype=dtype)
    with pytest.raises(InvalidCheckpoint, match=f"'{re.escape(name)}' in adapter_model.safetensors holds a number"):
        checkpoints.register(adapter)


def test_moments_and_models_with_a_number_that_is_not_finite_are_refused(
    checkpoints: Checkpoints, adapter: Path, model: Path, tmp_path: Path
) -> None:
    moments.write(adapter / "moments.safetensors", random_moments(tiny_adapter(model)))
    assert checkpoints.register(adapter)
    name = _hold(adapter / "moments.safetensors", math.nan)
    with pytest.raises(InvalidCheckpoint, match=f"'{re.escape(name)}' in moments.safetensors"):
        checkpoints.register(adapter)
    shutil.copytree(model, tmp_path / "whole")
    name = _hold(tmp_path / "whole" / "model.safetensors", math.inf)
    with pytest.raises(InvalidCheckpoint, match=f"'{re.escape(name)}' in model.safetensors"):
        checkpoints.register(tmp_path / "whole", model=str(model))


@pytest.mark.parametrize("at", [0, STEP // 4 - 1, STEP // 4, -1])
def test_a_large_file_is_looked_through_to_its_end(tmp_path: Path, at: int) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(STEP // 4 + 5), "c": torch.ones(2).int()}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    check_finite(path)
    tensors["b"][at] = math.nan
    save_file(tensors, path)
    with pytest.raises(InvalidCheckpoint, match="'b' in x"):
        check_finite(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_number_of_eight_bits_is_told_apart(tmp_path: Path, dtype: torch.dtype) -> None:
    for bits in range(256):
        value = torch.tensor([bits], dtype=torch.uint8).view(dtype)
        save_file({"a": value}, tmp_path / "x.safetensors")
        finite = bool(torch.isfinite(value.float()))
        with nullcontext() if finite else pytest.raises(InvalidCheckpoint):
            check_finite(tmp_path / "x.safetensors")


def _save_optimizer(path: Path, found: Moments, *, named: bool = False, without: int | None = None) -> None:
    """Save moments as an optimizer's state_dict."""
    states = {
        name if named else number: {"exp_avg": found.exp_avg[name], "exp_avg_sq": found.exp_avg_sq[name], "step": 3.0}
        for number, name in enumerate(found.exp_avg)
    }
    groups = [{"params": list(states)}, {"params": []}]
    states.pop(without, None)  # type: ignore[arg-type]
    torch.save({"state": states, "param_groups": groups}, path)


def _change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])
