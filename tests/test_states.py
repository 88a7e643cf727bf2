"""Hidden states and routing weights: the pooling written out, one example alone, in double precision."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradstore.types import StreamRequest, StreamResult
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.architectures import ADAPTERS, PAD, SHAPE, adapt, base_model, rows
from tests.test_streams import with_ids
from tests.tiny import tiny_tokenizer
from tests.workplace import Workplace
from worker.batches import IGNORED, Encoded
from worker.models import ModelError
from worker.reading import read
from worker.states import evenly, hidden, routing

HIDDEN = {"llama": "o_proj", "qwen3": "o_proj", "gpt2": "attn.c_proj", "opt": "out_proj", "mixtral": "o_proj"}
ROUTED = ("mixtral", "qwen2_moe")


def double(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """A copy in float64, without PEFT's wrapping."""
    made = copy.deepcopy(model).double().eval()
    base: PreTrainedModel = made.get_base_model() if isinstance(made, PeftModel) else made
    base.set_experts_implementation("eager")  # the fused one has no double precision
    return base


def attention_outputs(model: PreTrainedModel, name: str, row: Encoded) -> list[torch.Tensor]:
    """What every projection of this name puts out for one example alone: (tokens, width) each."""
    seen: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _m, _i, output: seen.append(output.detach().reshape(-1, output.shape[-1])))
        for path, module in model.named_modules()
        if path.endswith(f".{name}")
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([row.input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def pooled(states: list[torch.Tensor], row: Encoded) -> NDArray[np.float64]:
    """tanh of the mean over the prompt's, then over the completion's tokens, divided by its length and √(2·layers)."""
    parts = []
    for layer in states:
        for learnt in (False, True):
            tokens = [layer[t] for t in range(len(row.labels)) if (row.labels[t] != IGNORED) == learnt]
            mean = np.tanh(sum(token.numpy() for token in tokens) / len(tokens))
            parts.append(mean / np.sqrt((mean**2).sum()) / np.sqrt(2 * len(states)))
    return np.concatenate(parts)


def router_probabilities(model: PreTrainedModel, row: Encoded) -> NDArray[np.float64]:
    """Softmax over what each gate's weight makes of what it gets, averaged over the tokens."""
    found: list[NDArray[np.float64]] = []

    def look(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        states, weight = arguments[0].reshape(-1, module.weight.shape[1]).numpy(), module.weight.detach().numpy()
        exponents = np.exp(states @ weight.T)
        found.append((exponents / exponents.sum(1, keepdims=True)).mean(0))

    gates = [module for path, module in model.named_modules() if path.endswith("mlp.gate")]
    handles = [gate.register_forward_pre_hook(look) for gate in gates]
    with torch.no_grad():
        model(input_ids=torch.tensor([row.input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return np.concatenate(found)


@pytest.mark.parametrize("architecture", HIDDEN)
def test_hidden_rows_are_the_pooled_outputs_of_each_example_alone(architecture: str) -> None:
    model = base_model(architecture).eval()
    examples = rows()
    found = hidden(model, examples, layers=None, pad_id=PAD, token_budget=80)
    reference = double(model)
    wanted = [pooled(attention_outputs(reference, HIDDEN[architecture], row), row) for row in examples]
    assert list(found.layers) == [0, 1]
    np.testing.assert_allclose(found.rows, np.stack(wanted), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(found.rows, axis=1), 1, atol=1e-5)


def test_an_adapter_takes_part_in_hidden_rows() -> None:
    model = adapt(base_model("llama"), **ADAPTERS["llama"]).eval()
    examples = rows()
    found = hidden(model, examples, layers=[1], pad_id=PAD, token_budget=80).rows
    reference = double(model)
    wanted = [pooled(attention_outputs(reference, "o_proj", row)[1:], row) for row in examples]
    np.testing.assert_allclose(found, np.stack(wanted), atol=2e-5)
    with model.disable_adapter():
        assert np.abs(hidden(model, examples, layers=[1], pad_id=PAD, token_budget=80).rows - found).max() > 1e-2


@pytest.mark.parametrize("architecture", ROUTED)
def test_routing_rows_are_the_mean_probabilities_of_the_routers(architecture: str) -> None:
    model = base_model(architecture).eval()
    examples = rows()
    found = routing(model, examples, pad_id=PAD, token_budget=80)
    reference = double(model)
    np.testing.assert_allclose(
        found.rows, np.stack([router_probabilities(reference, row) for row in examples]), atol=1e-5
    )
    assert found.rows.shape == (len(examples), 2 * 4)
    np.testing.assert_allclose(found.rows.reshape(-1, 2, 4).sum(2), 1, atol=1e-5)
    assert found.rows.std(0).max() > 1e-3  # the rows differ: a router that says the same of all would pass, too


@pytest.mark.parametrize("kind", ["hidden", "routing"])
def test_neither_batches_nor_their_order_change_a_row(kind: str) -> None:
    model = base_model("mixtral").eval()
    examples = rows()
    order = np.random.default_rng(0).permutation(len(examples))

    def computed(chosen: list[Encoded], budget: int) -> NDArray[np.float32]:
        if kind == "hidden":
            return hidden(model, chosen, layers=[0, 1], pad_id=PAD, token_budget=budget).rows
        return routing(model, chosen, pad_id=PAD, token_budget=budget).rows

    alone = np.concatenate([computed([row], 1) for row in examples])
    for budget in (1, 40, 10_000):
        np.testing.assert_allclose(computed(examples, budget), alone, atol=1e-5)
        shuffled = computed([examples[place] for place in order], budget)
        np.testing.assert_allclose(shuffled, alone[order], atol=1e-5)


def test_layers_are_chosen_as_the_paper_has_them() -> None:
    assert evenly(24) == [3, 7, 11, 15, 19]
    assert [evenly(layers) for layers in (1, 5, 6)] == [[0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert all(len(set(evenly(layers))) == min(5, layers) for layers in range(1, 100))


def test_what_a_model_has_not_is_refused() -> None:
    model = base_model("llama").eval()
    with pytest.raises(ModelError, match=r"no routers.* kind=hidden alone"):
        routing(model, rows(), pad_id=PAD, token_budget=80)
    with pytest.raises(ModelError, match="no layer 2"):
        hidden(model, rows(), layers=[0, 2], pad_id=PAD, token_budget=80)


# As jobs ----------------------------------------------------------------------------------------------------------


def moe_model(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        "mixtral", **(SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}),
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace.at(tmp_path, model=moe_model(tmp_path / "moe"))


def done(workplace: Workplace, **fields: Any) -> tuple[str, StreamResult]:
    job, _ = workplace.context.streams.start(StreamRequest.model_validate(fields))
    workplace.work()
    job = workplace.job(job.id)
    assert job.status == "succeeded", job.error
    return job.id, StreamResult.model_validate(job.result.model_dump() if job.result else None)


@pytest.mark.parametrize("kind", ["hidden", "routing"])
def test_a_stream_has_a_row_for_each_example_and_says_which_are_absent(workplace: Workplace, kind: str) -> None:
    examples = with_ids(5)
    examples[3]["prompt"] += " please" * 100
    pool = workplace.pool(examples)
    checkpoint = workplace.base()
    id, result = done(workplace, kind=kind, dataset=pool.id, checkpoint=checkpoint.id, max_length=64)
    found, present = workplace.context.streams.matrix(id)
    encoded = read(
        workplace.context.datasets.examples(pool.id), tokenizer=workplace.context.loaded.tokenizer(
            checkpoint.model, checkpoint.revision), template="tulu", max_length=64, check=lambda: None,
    )  # fmt: skip
    reference = double(AutoModelForCausalLM.from_pretrained(workplace.model))
    wanted = [
        pooled(attention_outputs(reference, "o_proj", row), row)
        if kind == "hidden"
        else router_probabilities(reference, row)
        for row in encoded.encoded
    ]
    assert present.tolist() == [True, True, True, False, True]
    np.testing.assert_allclose(found[present], np.stack(wanted), atol=2e-5)
    assert not found[3].any()
    assert (result.present_rows, result.total_absent, result.layers) == (4, 1, [0, 1])
    assert result.absent[0].id == "row-3"
    assert "truncation leaves no token" in result.absent[0].reason


@pytest.mark.slow
def test_shards_come_to_the_same_rows_as_one_and_are_found_again(workplace: Workplace, tmp_path: Path) -> None:
    pool = workplace.pool(with_ids(1030))
    checkpoint = workplace.base()
    asked = {"kind": "routing", "dataset": pool.id, "checkpoint": checkpoint.id}
    id, result = done(workplace, **asked)
    two, present = workplace.context.streams.matrix(id)
    assert result.present_rows == 1030
    assert present.all()
    assert len(list(workplace.context.settings.matrices.glob("matrix_*"))) == 2
    other = Workplace.at(tmp_path / "other", model=workplace.model, shard_rows=2048)
    other.pool(with_ids(1030))
    other.base()
    one, _ = other.context.streams.matrix(done(other, **asked)[0])
    np.testing.assert_allclose(two, one, atol=1e-5)

    workplace.context.streams.remove(id)
    assert not list(workplace.context.settings.matrices.glob("matrix_*"))


def test_a_shard_that_is_repeated_finds_its_rows(workplace: Workplace) -> None:
    pool = workplace.pool(with_ids(3))
    checkpoint = workplace.base()
    streams = workplace.context.streams
    asked = {"kind": "hidden", "dataset": pool.id, "checkpoint": checkpoint.id, "layers": [1]}
    id, _ = done(workplace, **asked, name="first")
    before = streams.matrix(id)[0]
    (matrix,) = workplace.context.settings.matrices.glob("matrix_*")
    manifest = json.loads((matrix / "manifest.json").read_bytes())
    assert manifest["notes"] == {"layers": [1]}
    kept = {path: path.read_bytes() for path in matrix.iterdir()}
    streams.remove(id)
    matrix.mkdir()
    for path, content in kept.items():
        path.write_bytes(content)
    workplace.context.loaded.clear()
    again, _ = done(workplace, **asked)
    assert workplace.context.loaded._base is None  # nothing was computed
    np.testing.assert_array_equal(streams.matrix(again)[0], before)


def test_a_model_without_routers_fails_the_job_with_the_reason(tmp_path: Path) -> None:
    workplace = Workplace.at(tmp_path)
    pool = workplace.pool(with_ids(2))
    job, _ = workplace.context.streams.start(
        StreamRequest(kind="routing", dataset=pool.id, checkpoint=workplace.base().id)
    )
    workplace.work()
    error = workplace.job(job.id).error
    assert error is not None
    assert "no mixture of experts" in error.detail
