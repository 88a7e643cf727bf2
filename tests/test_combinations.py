"""Several adapters as one model: merges and routing as float64 arithmetic has them, and no trace of them afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradstore.types import EvaluationRequest
from numpy.typing import NDArray
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from datastore.checkpoints import ADAPTER_WEIGHTS, Description
from datastore.errors import InUse, InvalidInput
from tests.tiny import save_tiny_model
from tests.workplace import Workplace
from worker.combinations import Combined, combine
from worker.loaded import Base, Loaded
from worker.models import ModelError, load_adapter, load_model, unload_adapter

IDS = torch.tensor([[1, 40, 77, 12, 99, 30, 31, 8], [1, 200, 5, 64, 64, 3, 17, 90]])
Array = NDArray[np.float64]


def combined(folders: Sequence[Path], how: Any, *weights: Any, **settings: Any) -> Combined:
    return Combined(tuple((folder.name, folder) for folder in folders), how, *weights, **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@dataclass(frozen=True)
class Bank:
    """Folders of adapters of one base model."""

    model: Path
    folder: Path

    def adapter(self, seed: int, **settings: Any) -> Path:
        """An adapter whose products have one large singular value each, so that power iteration finds its vector."""
        torch.manual_seed(seed)
        usual = {"r": 2, "lora_alpha": 4 + seed, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        adapted = get_peft_model(load_model(str(self.model)), LoraConfig(**{**usual, **settings}))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
                    (parameter if "lora_A" in name else parameter.T)[0] *= 4
        folder = self.folder / f"adapter-{seed}"
        adapted.save_pretrained(str(folder))
        return folder

    def base(self) -> LlamaForCausalLM:
        """The base model in float64."""
        found = load_model(str(self.model)).double()
        assert isinstance(found, LlamaForCausalLM)
        return found

    def products(self, folder: Path, scaling: float) -> dict[str, Array]:
        """scaling · B A of every module, in float64."""
        return {module: scaling * b @ a for module, (a, b) in factors(folder).items()}


@pytest.fixture
def bank(tmp_path: Path, model: Path) -> Bank:
    return Bank(model, tmp_path)


def factors(folder: Path) -> dict[str, tuple[Array, Array]]:
    """A and B of every module."""
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()}
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    return {
        module.removeprefix("base_model.model."): (
            tensors[f"{module}.lora_A.weight"],
            tensors[f"{module}.lora_B.weight"],
        )
        for module in modules
    }


def added(base: nn.Module, deltas: dict[str, Array]) -> Tensor:
    """The logits of the base model with these products added to its weights."""
    for module, delta in deltas.items():
        weight = base.get_submodule(module).weight
        assert isinstance(weight, nn.Parameter)
        weight.data += torch.from_numpy(delta)
    return logits(base)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def summed(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    modules = {module for part in parts for module in part}
    return {module: sum(part[module] for part in parts if module in part) for module in modules}  # type: ignore[misc]


def close(found: Tensor, expected: Tensor, *, far_from: Tensor, rtol: float = 1e-9) -> None:
    """Two logits agree, and differ far more from those of another model: or a wrong one would pass."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    assert float((expected - far_from).abs().max()) > 1e3 * rtol


# Merges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.5), (2.0, -0.25), (1.0, 0.0)])
@pytest.mark.parametrize("how", ["cat", "svd"])
def test_a_merge_is_the_weighted_sum_of_the_products(bank: Bank, how: Any, weights: tuple[float, float]) -> None:
    folders = bank.adapter(0, r=2), bank.adapter(1, r=3, target_modules=["q_proj", "o_proj"])
    parts = [bank.products(folders[0], 4 / 2 * weights[0]), bank.products(folders[1], 5 / 3 * weights[1])]
    merged = combine(bank.base(), combined(folders, how, weights, rank=5 if how == "svd" else None))
    close(logits(merged), added(bank.base(), summed(parts)), far_from=logits(bank.base()))
    if weights == (1.0, 0.0):
        close(logits(merged), logits(load_adapter(bank.base(), folders[0])), far_from=logits(bank.base()))


def test_a_merge_by_svd_is_the_best_of_its_rank(bank: Bank) -> None:
    folders = bank.adapter(0), bank.adapter(1)
    whole = summed([bank.products(folders[0], 4 / 2 * 0.5), bank.products(folders[1], 5 / 2 * 0.5)])
    best = {}
    for module, delta in whole.items():
        u, s, v = np.linalg.svd(delta)
        best[module] = (u[:, :2] * s[:2]) @ v[:2]
    merged = combine(bank.base(), combined(folders, "svd", (0.5, 0.5), rank=2))
    close(logits(merged), added(bank.base(), best), far_from=added(bank.base(), whole))


def test_a_linear_merge_has_the_products_of_different_adapters_in_it(bank: Bank) -> None:
    folders, weights = (bank.adapter(0), bank.adapter(1)), (0.7, 0.3)
    roots = [math.sqrt(0.7 * 4 / 2), math.sqrt(0.3 * 5 / 2)]
    deltas = {}
    for module in factors(folders[0]):
        (a0, b0), (a1, b1) = (factors(folder)[module] for folder in folders)
        deltas[module] = (roots[0] * b0 + roots[1] * b1) @ (roots[0] * a0 + roots[1] * a1)
    # PEFT keeps its weights in float32
    close(
        logits(combine(bank.base(), combined(folders, "linear", weights))), added(bank.base(), deltas),
        far_from=logits(bank.base()), rtol=1e-5,
    )  # fmt: skip


def test_ties_keeps_the_largest_elects_a_sign_and_takes_the_mean_of_those_that_agree(bank: Bank) -> None:
    folders = bank.adapter(0), bank.adapter(1), bank.adapter(2)
    scalings, density = [4 / 2, 5 / 2, 6 / 2], 0.4
    deltas = {}
    for module in factors(folders[0]):
        trimmed = []
        for folder, scaling in zip(folders, scalings, strict=True):
            delta = bank.products(folder, scaling)[module]
            least = np.sort(np.abs(delta), axis=None)[-int(density * delta.size)]
            trimmed.append(np.where(np.abs(delta) >= least, delta, 0))
        stacked = np.stack(trimmed)
        agree = np.sign(stacked) == np.where(stacked.sum(0) >= 0, 1, -1)
        mean = (stacked * agree).sum(0) / np.maximum(agree.sum(0), 1)
        u, s, v = np.linalg.svd(mean)
        deltas[module] = (u[:, :4] * s[:4]) @ v[:4]
    merged = combine(bank.base(), combined(folders, "ties_svd", (1.0, 1.0, 1.0), rank=4, density=density))
    close(logits(merged), added(bank.base(), deltas), far_from=logits(bank.base()), rtol=1e-7)


def test_dare_drops_by_its_seed_and_scales_up_what_it_keeps(bank: Bank) -> None:
    folders, density = (bank.adapter(0), bank.adapter(1)), 0.5
    asked = combined(folders, "dare_linear", (1.0, 1.0), density=density, seed=3)
    found = [combine(load_model(str(bank.model)), replace(asked, seed=seed)) for seed in (3, 3, 4)]
    first, again, other = ({k: v for k, v in each.state_dict().items() if ".merged." in k} for each in found)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    for module in factors(folders[0]):
        a = first[f"base_model.model.{module}.lora_A.merged.weight"].double().numpy()
        parts = [math.sqrt(s) * factors(f)[module][0] / density for f, s in zip(folders, (4 / 2, 5 / 2), strict=True)]
        options = np.stack([x * parts[0] + y * parts[1] for x, y in product((0, 1), repeat=2)])
        nearest = np.abs(options - a).argmin(0)
        np.testing.assert_allclose(np.take_along_axis(options, nearest[None], 0)[0], a, rtol=1e-5, atol=1e-6)
        assert set(np.unique(nearest)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("how", "like"),
    [
        ("dare_linear_svd", "cat"),
        ("magnitude_prune_svd", "cat"),
        ("dare_linear", "linear"),
        ("magnitude_prune", "linear"),
        ("dare_ties", "ties"),
        ("dare_ties_svd", "ties_svd"),
    ],
)
def test_a_merge_that_drops_nothing_is_like_one_that_does_not_drop(bank: Bank, how: Any, like: Any) -> None:
    folders = bank.adapter(0), bank.adapter(1)
    whole = combined(folders, how, (0.5, 0.5), rank=4 if how.endswith("svd") else None, density=1.0)
    found, expected = (logits(combine(bank.base(), one)) for one in (whole, replace(whole, how=like)))
    close(found, expected, far_from=logits(bank.base()))
    dropping = logits(combine(bank.base(), replace(whole, density=0.3)))
    assert float((dropping - expected).abs().max()) > 1e-2


def test_a_merge_is_neither_scaled_nor_bound_to_layers_by_its_first_adapter(bank: Bank) -> None:
    """PEFT makes the merged adapter after the first one's configuration."""
    first = bank.adapter(0, use_rslora=True, layers_to_transform=[1])
    folders = first, bank.adapter(1)
    parts = [bank.products(first, 4 / math.sqrt(2) / 2), bank.products(folders[1], 5 / 2 / 2)]
    assert len(parts[0]) == 2 < len(parts[1])
    merged = combine(bank.base(), combined(folders, "cat", (0.5, 0.5)))
    close(logits(merged), added(bank.base(), summed(parts)), far_from=logits(bank.base()))


# Arrow ----------------------------------------------------------------------------------------------------------------


def by_arrow(base: nn.Module, folders: Sequence[Path], scalings: Sequence[float], top_k: int, heat: float) -> Tensor:
    """Logits with every adapted module routed by |x · v_n|, v_n from numpy's singular value decomposition."""

    def route(experts: list[tuple[Array, Array]]) -> Callable[..., Tensor]:
        vectors = np.stack([np.linalg.svd(b @ a)[2][0] for a, b in experts])

        def hook(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
            x = arguments[0].numpy()
            delta = np.zeros(output.shape)
            for place in np.ndindex(*x.shape[:-1]):
                likeness = np.abs(vectors @ x[place])
                chosen = np.argsort(-likeness)[:top_k]
                weights = np.exp((likeness[chosen] - likeness.max()) / heat)
                for weight, n in zip(weights / weights.sum(), chosen, strict=True):
                    a, b = experts[n]
                    delta[place] += weight * scalings[n] * (b @ (a @ x[place]))
            return output + torch.from_numpy(delta)

        return hook

    for module in factors(folders[0]):
        base.get_submodule(module).register_forward_hook(route([factors(folder)[module] for folder in folders]))
    return logits(base)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.2), (3, 5.0)])
def test_arrow_gives_a_token_the_adapters_most_like_it(bank: Bank, top_k: int, temperature: float) -> None:
    folders = bank.adapter(0), bank.adapter(1), bank.adapter(2)
    routed = combine(bank.base(), combined(folders, "arrow", top_k=top_k, temperature=temperature))
    expected = by_arrow(bank.base(), folders, [4 / 2, 5 / 2, 6 / 2], top_k, temperature)
    # PEFT's iteration is in float32
    close(logits(routed), expected, far_from=logits(bank.base()), rtol=1e-5)
    assert float((expected - logits(combine(bank.base(), combined(folders, "cat", (1 / 3,) * 3)))).abs().max()) > 1e-2


def test_arrow_is_pefts_own(bank: Bank) -> None:
    folders = bank.adapter(0), bank.adapter(1)
    theirs = create_arrow_model(
        load_model(str(bank.model)), [str(folder) for folder in folders], ArrowConfig(top_k=2, rng_seed=7)
    )
    ours = combine(load_model(str(bank.model)), combined(folders, "arrow", top_k=2, seed=7))
    assert torch.equal(logits(ours), logits(theirs.eval()))


def test_arrow_refuses_adapters_of_different_modules(bank: Bank) -> None:
    base = bank.base()
    before = logits(base)
    folders = bank.adapter(0, layers_to_transform=[0]), bank.adapter(1, layers_to_transform=[1])
    with pytest.raises(ModelError, match="adapter-0 is not on all modules"):
        combine(base, combined(folders, "arrow", top_k=1))
    assert torch.equal(logits(base), before)


# No trace -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cat", "linear", "svd", "arrow"])
def test_a_combination_leaves_the_base_model_as_it_was(bank: Bank, how: Any) -> None:
    base = load_model(str(bank.model))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    alone = logits(base)
    folders = bank.adapter(0), bank.adapter(1)
    made = combine(base, combined(folders, how, (0.5, 0.5), rank=2 if how == "svd" else None, top_k=2))
    assert not torch.equal(logits(made), alone)
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert unload_adapter(made) is base
    after = base.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(base), alone)


def test_what_takes_turns_on_a_base_model_does_not_change_what_comes_after(bank: Bank) -> None:
    loaded = Loaded(torch.device("cpu"))
    base = Base(str(bank.model))
    folders = bank.adapter(0), bank.adapter(1)
    merge, arrow = combined(folders, "cat", (0.5, 0.5)), combined(folders, "arrow", top_k=2)
    seen: dict[str, Tensor] = {}
    for name in ("a", "merge", "a", "arrow", "merge", "base", "arrow", "a", "b", "base"):
        at_work = {
            "a": lambda: loaded.adapted(base, folders[0]),
            "b": lambda: loaded.adapted(base, folders[1]),
            "merge": lambda: loaded.combined(base, merge),
            "arrow": lambda: loaded.combined(base, arrow),
            "base": lambda: loaded.base(base),
        }[name]()
        found = logits(at_work)
        assert torch.equal(found, seen.setdefault(name, found)), name
    assert len({tuple(found.flatten().tolist()) for found in seen.values()}) == 5
    assert loaded.combined(base, merge) is loaded.combined(base, merge)


# Evaluations ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    return Workplace.at(tmp_path, model=model)


def in_bank(place: Workplace, folder: Path, *, name: str, **settings: Any) -> str:
    """Put an adapter into the bank; returns its id."""
    described = {
        "model": str(place.model), "revision": None, "method": "lora", "precision": "float32", "epoch": 1, "step": 10,
        "learning_rate": 1e-4, "template": "tulu", "max_length": 64, "moments_note": "made here",
    } | settings  # fmt: skip
    source = place.folder / f"source-{name}"
    source.mkdir()
    folder.rename(source / "adapter")
    checkpoint = place.context.catalog.add_checkpoint(place.context.checkpoints.add(source, Description(**described)))
    return place.context.adapters.add(checkpoint.id, name=name)[0].id


def losses(result: dict[str, Any]) -> dict[str, float]:
    return {row["model"]: row["loss"] for row in result["rows"] if row["subtask"] is None}


def test_adapters_of_the_bank_are_measured_alone_and_together(place: Workplace, bank: Bank) -> None:
    place.task(3, name="sums", metric="exact_match")
    first, second = (in_bank(place, bank.adapter(seed), name=name) for seed, name in enumerate(("first", "second")))
    measured = {}
    asked: dict[str, dict[str, Any]] = {
        "first": {"adapter": "first"},
        "cat": {"adapters": ["first", second], "combine": "cat"},
        "told": {"adapters": [first, "second"], "combine": "cat", "merge_weights": [0.5, 0.5], "seed": 1},
        "ties": {"adapters": ["first", "second"], "combine": "ties", "merge_density": 0.3},
        "arrow": {"adapters": ["first", "second"], "combine": "arrow", "arrow_temperature": 0.5},
        "again": {"adapter": first, "bootstrap_samples": 51},
    }
    for name, one in asked.items():
        job = place.start(EvaluationRequest(tasks=["sums"], max_new_tokens=4, **one))
        assert job.progress.total == 2 * 2 * 6
        place.work()
        done = place.job(job.id)
        assert done.status == "succeeded", done.error
        assert done.progress.done == done.progress.total
        assert done.result is not None
        measured[name] = done.result.model_dump()
    found = {name: losses(result)["tuned"] for name, result in measured.items()}
    assert len({losses(result)["base"] for result in measured.values()}) == 1
    assert found["again"] == found["first"]
    assert found["told"] == found["cat"]
    assert len(set(found.values())) == 4
    checkpoint = place.context.catalog.adapter("first").checkpoint
    alone = place.done(EvaluationRequest(checkpoint=checkpoint, tasks=["sums"], max_new_tokens=4, baseline=False))
    assert alone["rows"] == [row for row in measured["first"]["rows"] if row["model"] == "tuned"]
    for name in ("first", "second"):
        with pytest.raises(InUse, match="eval_"):
            place.context.adapters.remove(name)


@pytest.mark.parametrize(
    ("second", "combine", "told"),
    [
        ({"r": 3}, "linear", "rank (3; 2): combine=linear works on A and B number by number"),
        ({"r": 3}, "arrow", "rank (3; 2): combine=arrow stacks"),
        ({"target_modules": ["q_proj"]}, "arrow", "targets (q_proj 2; q_proj v_proj 4)"),
        ({"layers_to_transform": [0]}, "arrow", "targets (q_proj v_proj 2; q_proj v_proj 4)"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_combined_so_are_refused_with_the_reason(
    place: Workplace, bank: Bank, second: dict[str, Any], combine: Any, told: str
) -> None:
    place.task(2, name="sums")
    in_bank(place, bank.adapter(0), name="first")
    in_bank(place, bank.adapter(1, **second), name="second")
    with pytest.raises(InvalidInput) as refused:
        place.start(EvaluationRequest(adapters=["first", "second"], combine=combine, tasks=["sums"]))
    assert told in str(refused.value)
    assert [item.pointer for item in refused.value.errors] == ["/adapters/1"]
    place.start(EvaluationRequest(adapters=["first", "second"], combine="cat", tasks=["sums"]))


def test_adapters_of_different_models_or_trainings_are_told_apart(place: Workplace, bank: Bank, tmp_path: Path) -> None:
    place.task(2, name="sums")
    in_bank(place, bank.adapter(0), name="first")
    other = Bank(save_tiny_model(tmp_path / "other", seed=5), tmp_path)
    in_bank(place, other.adapter(1), name="of-another", model=str(other.model))
    in_bank(place, bank.adapter(2), name="chatty", template="chat", precision="bfloat16", max_length=128)

    def refused(**asked: Any) -> str:
        with pytest.raises(InvalidInput) as refusal:
            place.start(EvaluationRequest(tasks=["sums"], combine="cat", **asked))
        return str(refusal.value)

    assert "of-another and first differ in base model" in refused(adapters=["first", "of-another"])
    assert "named twice" in refused(adapters=["first", "chatty", "first"])
    together = {"adapters": ["first", "chatty"]}
    assert "trained with chat and tulu: say which" in refused(**together)
    assert "trained with bfloat16 and float32" in refused(**together, template="tulu")
    place.start(
        EvaluationRequest(tasks=["sums"], combine="cat", **together, template="tulu", precision="float32")  # type: ignore[arg-type]
    )
    assert place.claim().plan["max_length"] == 128


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"adapters": ["a", "b"]}, "adapters and combine go together"),
        ({"adapter": "a", "combine": "cat"}, "adapters and combine go together"),
        ({"adapter": "a", "checkpoint": "b"}, "name one of"),
        ({"adapters": ["a"], "combine": "cat"}, "at least 2"),
        ({"adapters": ["a", "b"], "combine": "cat", "merge_rank": 4}, "combine=cat has no merge_rank"),
        ({"adapters": ["a", "b"], "combine": "arrow", "merge_weights": [1, 2]}, "combine=arrow has no merge_weights"),
        ({"adapters": ["a", "b"], "combine": "cat", "arrow_top_k": 1}, "combine=cat has no arrow_top_k"),
        ({"model": "m", "merge_density": 0.5}, "has no merge_density"),
        ({"adapters": ["a", "b"], "combine": "ties"}, "needs merge_density"),
        ({"adapters": ["a", "b"], "combine": "cat", "merge_weights": [1, 2, 3]}, "3 values for 2 adapters"),
        ({"adapters": ["a", "b"], "combine": "arrow", "arrow_top_k": 3}, "there are 2 adapters"),
    ],
    ids=str,
)
def test_a_combination_that_means_nothing_is_refused(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        EvaluationRequest(tasks=["t"], **asked)
