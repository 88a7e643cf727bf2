"""Fine-tunes: the training asked for, the same whether interrupted or not, with all that gradients need of it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gradstore.types import FinetuneRequest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from datastore.checkpoints import file_key
from datastore.errors import InvalidInput
from datastore.rows import Example
from tests.tiny import save_tiny_model
from tests.workplace import CPU, numbered
from worker import moments
from worker.batches import Encoded, encode
from worker.finetune import CURVE_POINTS, Diverged, Finetuned, draw, finetune, loss_curve
from worker.models import ModelError, Quantisation, load_adapter, load_model, load_tokenizer

ROWS = [Example(id=None, origin="pool", **row) for row in numbered(range(10))]
ENDLESS = Example(id="endless", origin="pool", prompt="and so on " * 40, completion="The end.")
LENGTH = 64  # tokens: enough for all rows but the endless one


def request(model: Path, **changes: Any) -> FinetuneRequest:
    """Two epochs of three steps, with dropout."""
    values = {
        "dataset": "ds_1", "model": str(model), "epochs": 2, "batch_size": 4, "device_batch_size": 2,
        "learning_rate": 1e-2, "lora": {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
    }  # fmt: skip
    return FinetuneRequest.model_validate(values | changes)


def contents(done: Finetuned) -> list[dict[str, bytes]]:
    """The files of every epoch."""
    return [
        {path.name: path.read_bytes() for path in sorted(epoch.folder.rglob("*")) if path.suffix == ".safetensors"}
        for epoch in done.epochs
    ]


class Interrupted(Exception):
    """What stands for a signal, a lost lease or a power cut."""


def until(step: int) -> Callable[[int, int], None]:
    """An `on_step` that ends the training at a step."""

    def on_step(done: int, _total: int) -> None:
        if done >= step:
            raise Interrupted

    return on_step


# The training itself --------------------------------------------------------------------------------------------------


def by_hand(model: Path, rows: Sequence[Encoded], *, steps: int, rate: float, warmup: float) -> dict[str, list[Tensor]]:
    """Parameter, first and second moment by name after `steps` of Adam on all rows at once, written out."""
    base = load_model(str(model))
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    parameters = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    state = {name: [value, torch.zeros_like(value), torch.zeros_like(value)] for name, value in parameters.items()}
    warm = math.ceil(warmup * steps)
    tokens = sum(label != -100 for row in rows for label in row.labels)
    for step in range(steps):
        lr = rate * (step / warm if step < warm else (steps - step) / (steps - warm))
        loss = torch.zeros(())
        for row in rows:
            ids, labels = torch.tensor(row.input_ids), torch.tensor(row.labels)
            logits = adapted(input_ids=ids[None]).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum") / tokens
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.sqrt(sum((gradient.square().sum() for gradient in gradients), torch.zeros(())))
        for name, gradient in zip(parameters, gradients, strict=True):
            clipped = gradient * min(1.0, 1.0 / (float(norm) + 1e-6))
            value, m, v = state[name]
            m.mul_(0.9).add_(0.1 * clipped)
            v.mul_(0.999).add_(0.001 * clipped.square())
            direction = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            with torch.no_grad():
                value.sub_(lr * direction)
    return {name: [part.detach() for part in parts] for name, parts in state.items()}


def test_weights_and_moments_are_those_of_adam_written_out_by_hand(model: Path, tmp_path: Path) -> None:
    asked = request(
        model, epochs=12, batch_size=10, device_batch_size=5, warmup_ratio=0.2,
        lora={"r": 2, "alpha": 4, "dropout": 0, "targets": ["q_proj", "v_proj"]},
    )  # fmt: skip
    done = finetune(ROWS, asked, work=tmp_path, device=CPU)
    tokenizer = load_tokenizer(str(model))
    rows = [encode(row, tokenizer=tokenizer, template="tulu", max_length=2048) for row in ROWS]
    expected = by_hand(model, rows, steps=12, rate=1e-2, warmup=0.2)
    last = done.epochs[-1]
    weights = load_file(last.folder / "adapter" / "adapter_model.safetensors")
    found = moments.read(last.folder / "moments.safetensors")
    assert found.step == last.description.step == done.steps == 12
    assert found.exp_avg.keys() == expected.keys()
    for name, (value, m, v) in expected.items():
        torch.testing.assert_close(weights[file_key(name)], value, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.exp_avg[name], m, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.exp_avg_sq[name], v, rtol=1e-3, atol=1e-9)


def test_each_epoch_has_its_own_step_and_mean_learning_rate(model: Path, tmp_path: Path) -> None:
    done = finetune(ROWS, request(model, warmup_ratio=0), work=tmp_path, device=CPU)
    rates = [1e-2 * (6 - step) / 6 for step in range(6)]
    assert [epoch.description.step for epoch in done.epochs] == [3, 6]
    assert [epoch.description.epoch for epoch in done.epochs] == [1, 2]
    found = [epoch.description.learning_rate for epoch in done.epochs]
    assert found == pytest.approx([sum(rates[:3]) / 3, sum(rates[3:]) / 3])
    assert [point.learning_rate for point in done.loss_curve] == pytest.approx(rates)


def test_training_lowers_the_loss_and_keeps_the_curve(model: Path, tmp_path: Path) -> None:
    asked = request(model, epochs=8, learning_rate=5e-2, lora={"r": 4, "alpha": 16, "targets": "all-linear"})
    done = finetune(ROWS, asked, work=tmp_path, device=CPU)
    assert [point.step for point in done.loss_curve] == list(range(1, 25))
    assert done.loss_curve[-1].epoch == 8
    assert done.loss_curve[-1].loss < 0.9 * done.loss_curve[0].loss


def test_a_long_curve_is_thinned_to_means(model: Path) -> None:
    history = [{"step": step, "epoch": step / 100, "loss": step % 2, "learning_rate": 0.1} for step in range(1, 1201)]
    curve = loss_curve(history)
    assert len(curve) <= CURVE_POINTS
    assert curve[-1].step == 1200
    assert sum(point.loss for point in curve) / len(curve) == pytest.approx(0.5, abs=0.01)


def test_the_same_request_gives_the_same_bytes_and_another_seed_others(model: Path, tmp_path: Path) -> None:
    first, again, other = (
        contents(finetune(ROWS, request(model, seed=seed), work=tmp_path / name, device=CPU))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again
    assert first != other


def test_rows_without_a_token_to_learn_from_are_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    asked = request(model, max_length=LENGTH)
    with_them = finetune([ENDLESS, *ROWS[:5], ENDLESS, *ROWS[5:]], asked, work=tmp_path / "a", device=CPU)
    without = finetune(ROWS, asked, work=tmp_path / "b", device=CPU)
    assert (with_them.rows, with_them.skipped_rows, with_them.tokens) == (10, 2, without.tokens)
    assert contents(with_them) == contents(without)


def test_rows_that_teach_nothing_at_all_are_refused_with_the_reason(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInput, match="none of the 3 rows leaves a token to learn from; the first one: truncation"
    ):
        finetune([ENDLESS] * 3, request(model, max_length=LENGTH), work=tmp_path, device=CPU)


def test_a_loss_that_is_not_a_number_ends_the_training_with_advice(tmp_path: Path) -> None:
    broken = save_tiny_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Diverged, match="the loss is nan at step 1 of 6: lower learning_rate"):
        finetune(ROWS, request(broken), work=tmp_path / "work", device=CPU)


def test_gradient_checkpointing_changes_no_weight_beyond_rounding(model: Path, tmp_path: Path) -> None:
    lora = {"r": 2, "alpha": 4, "dropout": 0}
    plain, checkpointed = (
        finetune(ROWS, request(model, lora=lora, gradient_checkpointing=on), work=tmp_path / str(on), device=CPU)
        for on in (False, True)
    )
    for one, other in zip(plain.loss_curve, checkpointed.loss_curve, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


# Interruptions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finetuned:
    return finetune(ROWS, request(model), work=tmp_path_factory.mktemp("uninterrupted"), device=CPU)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_training_that_was_interrupted_comes_to_the_same_bytes(
    model: Path, tmp_path: Path, uninterrupted: Finetuned, step: int
) -> None:
    with pytest.raises(Interrupted):
        finetune(ROWS, request(model), work=tmp_path, device=CPU, on_step=until(step), save_seconds=0)
    steps: list[int] = []
    done = finetune(
        ROWS, request(model), work=tmp_path, device=CPU, attempt="2", on_step=lambda at, _: steps.append(at)
    )
    assert contents(done) == contents(uninterrupted)
    assert done.loss_curve == uninterrupted.loss_curve
    assert [epoch.description for epoch in done.epochs] == [epoch.description for epoch in uninterrupted.epochs]
    assert min(steps) >= step - 1  # it went on, and did not begin anew


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_training_that_dies_at_an_epochs_end_comes_to_the_same_checkpoints(
    model: Path, tmp_path: Path, uninterrupted: Finetuned, epoch: int
) -> None:
    last = uninterrupted.epochs[epoch - 1].description.step
    epochs = tmp_path / "1" / "epochs"

    def block_the_checkpoint(step: int, _total: int) -> None:
        if step == last:
            epochs.rename(tmp_path / "kept")
            epochs.write_text("in the way of the epoch's checkpoint")

    with pytest.raises(NotADirectoryError):
        finetune(ROWS, request(model), work=tmp_path, device=CPU, on_step=block_the_checkpoint, save_seconds=0)
    epochs.unlink()
    (tmp_path / "kept").rename(epochs)
    done = finetune(ROWS, request(model), work=tmp_path, device=CPU, attempt="2")
    assert contents(done) == contents(uninterrupted)


def test_a_training_that_had_ended_is_not_done_again(model: Path, tmp_path: Path, uninterrupted: Finetuned) -> None:
    finetune(ROWS, request(model), work=tmp_path, device=CPU)
    again = finetune(ROWS, request(model), work=tmp_path, device=CPU, attempt="2", on_step=until(0))
    assert contents(again) == contents(uninterrupted)


def test_a_saving_that_was_cut_off_is_not_gone_on_from(model: Path, tmp_path: Path, uninterrupted: Finetuned) -> None:
    with pytest.raises(Interrupted):
        finetune(ROWS, request(model), work=tmp_path, device=CPU, on_step=until(5), save_seconds=0)
    newest = tmp_path / "1" / "trainer" / "checkpoint-4"
    (newest / "complete").unlink()
    (newest / "optimizer.pt").write_bytes(b"half")
    steps: list[int] = []
    done = finetune(
        ROWS, request(model), work=tmp_path, device=CPU, attempt="2", on_step=lambda at, _: steps.append(at)
    )
    assert min(steps) == 3
    assert contents(done) == contents(uninterrupted)


def test_an_attempt_does_not_touch_what_another_writes(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        finetune(ROWS, request(model), work=tmp_path, device=CPU, on_step=until(4), save_seconds=0)
    files = {path: path.read_bytes() for path in (tmp_path / "1").rglob("*") if path.is_file()}
    finetune(ROWS, request(model), work=tmp_path, device=CPU, attempt="2")
    assert files == {path: path.read_bytes() for path in (tmp_path / "1").rglob("*") if path.is_file()}


# Ways to train --------------------------------------------------------------------------------------------------------


def test_auto_is_float32_on_a_cpu_and_float16_is_refused_there(model: Path, tmp_path: Path) -> None:
    assert finetune(ROWS, request(model), work=tmp_path / "a", device=CPU).precision == "float32"
    with pytest.raises(InvalidInput, match="need a GPU: ask for bfloat16 or float32"):
        finetune(ROWS, request(model, precision="float16"), work=tmp_path / "b", device=CPU)


def test_an_adapter_on_a_bfloat16_model_is_float32(model: Path, tmp_path: Path) -> None:
    done = finetune(ROWS, request(model, precision="bfloat16"), work=tmp_path, device=CPU)
    weights = load_file(done.epochs[-1].folder / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert done.epochs[-1].description.precision == "bfloat16"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_full_fine_tune_leaves_one_whole_model(model: Path, tmp_path: Path, precision: str) -> None:
    asked = request(model, method="full", precision=precision, learning_rate=1e-3)
    done = finetune(ROWS, asked, work=tmp_path, device=CPU)
    [last] = done.epochs
    assert (last.description.epoch, last.description.step) == (2, 6)
    tuned = AutoModelForCausalLM.from_pretrained(last.folder / "model")
    base = AutoModelForCausalLM.from_pretrained(model)
    kept = moments.read(last.folder / "moments.safetensors")
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    for moment in (kept.exp_avg, kept.exp_avg_sq):
        assert {name: value.shape for name, value in moment.items()} == shapes
        assert all(value.any() for value in moment.values())
    assert (kept.step, last.description.moments_note) == (6, None)
    assert str(tuned.dtype) == f"torch.{precision}"
    assert not torch.equal(tuned.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    assert load_tokenizer(str(last.folder / "model")).vocab_size == load_tokenizer(str(model)).vocab_size
    assert done.loss_curve[-1].loss < done.loss_curve[0].loss


def test_an_interrupted_full_fine_tune_comes_to_the_same_bytes(model: Path, tmp_path: Path) -> None:
    asked = request(model, method="full", learning_rate=1e-3)
    whole = finetune(ROWS, asked, work=tmp_path / "whole", device=CPU)
    with pytest.raises(Interrupted):
        finetune(ROWS, asked, work=tmp_path / "cut", device=CPU, on_step=until(4), save_seconds=0)
    assert contents(finetune(ROWS, asked, work=tmp_path / "cut", device=CPU, attempt="2")) == contents(whole)


def test_lora_on_layers_that_do_not_exist_is_refused_with_those_that_do(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"LoRA cannot be put on \['c_attn'\].*down_proj, gate_proj.*v_proj"):
        finetune(ROWS, request(model, lora={"targets": ["c_attn"]}), work=tmp_path, device=CPU)


def test_quantisation_without_bitsandbytes_names_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match="gradstore-server\\[quantised\\]"):
        finetune(ROWS, request(model, quantisation="nf4"), work=tmp_path, device=CPU)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # of bitsandbytes, which multiplies in float16
@pytest.mark.parametrize("quantisation", ["int8", "nf4"])
def test_a_lora_is_trained_on_a_quantised_base(model: Path, tmp_path: Path, quantisation: Quantisation) -> None:
    done = finetune(ROWS, request(model, quantisation=quantisation), work=tmp_path, device=CPU)
    assert done.loss_curve[-1].loss < done.loss_curve[0].loss
    base = load_model(str(model), quantisation=quantisation)
    load_adapter(base, done.epochs[-1].folder / "adapter")


# Which rows -----------------------------------------------------------------------------------------------------------


def test_a_draw_is_the_seeds_and_in_order() -> None:
    drawn = draw(4000, fraction=0.05, seed=3)
    assert drawn == draw(4000, fraction=0.05, seed=3) == sorted(set(drawn))
    assert len(drawn) == 200
    assert drawn != draw(4000, fraction=0.05, seed=4)
    assert len(draw(4000, number=7)) == 7
    assert draw(5) == [0, 1, 2, 3, 4]
    assert len(draw(100, fraction=0.29)) == 29  # and not 28, which the nearest float gives


def test_a_draw_favours_no_part_of_the_dataset() -> None:
    halves = [sum(row < 50 for row in draw(100, number=20, seed=seed)) for seed in range(200)]
    assert sum(halves) / 200 == pytest.approx(10, abs=0.5)
