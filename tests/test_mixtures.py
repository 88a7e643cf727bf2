"""Mixtures of LoRA experts do what their formulas say, in float64, and are lost by nobody."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradstore.types import MixtureSettings
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from datastore.errors import InvalidInput
from tests.tiny import tiny_model, tiny_tokenizer
from worker.mixtures.balance import Routed, load, recording
from worker.mixtures.folders import MANIFEST, load_mixture, save_mixture
from worker.mixtures.layer import MixtureLinear, NotMergeable
from worker.mixtures.model import make_mixture
from worker.mixtures.routers import choose
from worker.models import ModelError, load_adapter, unload_adapter, use_gradient_checkpointing

MODULES = ["q_proj", "v_proj", "down_proj"]
TOKENIZER = tiny_tokenizer()
IDS = torch.tensor([[5, 9, 17, 40, 3, 21, 8], [7, 7, 11, 60, 2, 90, 31]])
EXACT = {"rtol": 0, "atol": 1e-11}


def base(**config: Any) -> LlamaForCausalLM:
    return tiny_model(TOKENIZER, **config).double().requires_grad_(False)


def mixture(*, experts: int | list[int] | str = 4, top_k: int = 2, shaken: bool = True, **settings: Any) -> PeftModel:
    """A mixture on the tiny model in float64 whose B is not zero."""
    folders = settings.pop("folders", ())
    settings = {"modules": MODULES, "rank": 3, "alpha": 5, "dropout": 0.0} | settings
    model = make_mixture(base(), MixtureSettings(experts=experts, top_k=top_k, **settings), experts=folders).double()
    if shaken:
        shake(model)
    return model.eval()


def shake(model: PeftModel) -> None:
    random = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype) * 0.3


def layers(model: PeftModel) -> dict[str, MixtureLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, MixtureLinear)}


def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **inputs).logits
    return found


def save_lora(folder: Path, *, seed: int, dtype: torch.dtype = torch.float64, **settings: Any) -> Path:
    """A LoRA of random weights, as PEFT saves it."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": MODULES, "task_type": "CAUSAL_LM"} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = get_peft_model(base().to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


# The formula ----------------------------------------------------------------------------------------------------------


def expected(module: MixtureLinear, x: Tensor, z: Tensor) -> Tensor:
    """One token after another, one expert after another: softmax over all, the k largest, normalised again."""
    n, r = module.shape.experts, module.shape.rank
    a = module.lora_A["default"].weight.view(n, r, -1)
    b = module.lora_B["default"].weight.view(-1, n, r)
    result = module.base_layer(x)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:-1])):
        token = tuple(index.tolist())
        p = z[token].exp() / z[token].exp().sum()
        best = p.argsort(descending=True)[: module.shape.top_k]
        for expert in best.tolist():
            scale = module.mixture.alphas[expert] / r
            result[token] += p[expert] / p[best].sum() * scale * (b[:, expert] @ (a[expert] @ x[token]))
    return result


def sub_logits(module: MixtureLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Main gates (…, 2) and the logits of R_1 and R_2 (2, …, N), by hand."""
    router = module.lora_router["default"]
    n = module.shape.experts
    gates = torch.softmax(x @ router.main.weight.T + router.main.bias, -1)
    return gates, torch.stack([x @ router.sub.weight[:n].T, x @ router.sub.weight[n:].T])


def by_batch(module: MixtureLinear, x: Tensor) -> Tensor:
    gates, (z1, z2) = sub_logits(module, x)
    a = gates[..., 0].sum() / gates[..., 0].numel()
    return a * z1 + (1 - a) * z2


def by_token(module: MixtureLinear, x: Tensor) -> Tensor:
    gates, z = sub_logits(module, x)
    return gates[..., 0, None] * z[0] + gates[..., 1, None] * z[1]


def by_the_largest(module: MixtureLinear, x: Tensor) -> Tensor:
    gates, z = sub_logits(module, x)
    return torch.where(gates[..., :1] > 0.5, z[0], z[1])


def by_half(module: MixtureLinear, x: Tensor) -> Tensor:
    n = module.shape.experts
    sub = module.lora_router["default"].sub.weight
    return x @ (0.5 * sub[:n] + 0.5 * sub[n:]).T


@pytest.mark.parametrize(
    ("router", "z"),
    [
        ({}, lambda module, x: x @ module.lora_router["default"].weight.T),
        ({"kind": "mor"}, by_token),
        ({"kind": "mor", "top_sub": 1}, by_the_largest),
        ({"kind": "mor", "gate_scope": "batch"}, by_batch),
        ({"kind": "mor", "gate_scope": "fixed"}, by_half),
    ],
    ids=["single", "mor by token", "mor, one sub-router", "mor by batch as the reference has it", "mor fixed"],
)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_layer_gives_what_the_formula_says(
    router: dict[str, Any], z: Callable[[MixtureLinear, Tensor], Tensor], top_k: int
) -> None:
    model = mixture(top_k=top_k, router=router)
    for module in layers(model).values():
        x = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected(module, x, z(module, x)), **EXACT)


def test_an_expert_that_is_alone_is_plain_lora(tmp_path: Path) -> None:
    folders = [save_lora(tmp_path / str(n), seed=n, lora_alpha=5 + n) for n in range(4)]
    model = mixture(top_k=1, folders=folders, shaken=False)
    for number, folder in enumerate(folders):
        for module in layers(model).values():
            handle = module.lora_router["default"].register_forward_hook(
                lambda _, __, z, n=number: torch.nn.functional.one_hot(torch.full(z.shape[:-1], n), 4).to(z.dtype)
            )
            module.handle = handle  # type: ignore[assignment]
        plain = load_adapter(base(), folder).double()
        torch.testing.assert_close(logits(model), logits(plain), **EXACT)
        for module in layers(model).values():
            module.handle.remove()  # type: ignore[operator,union-attr]


def test_fresh_experts_change_nothing_yet() -> None:
    assert torch.equal(logits(mixture(shaken=False)), logits(base()))
    assert not torch.allclose(logits(mixture()), logits(base()))


def test_all_experts_chosen_are_a_dense_mixture() -> None:
    model = mixture(top_k=4)
    module = next(iter(layers(model).values()))
    x = torch.randn(6, module.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = module.lora_A["default"].weight.view(4, 3, -1)
    b = module.lora_B["default"].weight.view(-1, 4, 3)
    p = torch.softmax(x @ module.lora_router["default"].weight.T, -1)
    dense = module.base_layer(x) + 5 / 3 * torch.einsum("tn,onr,nrd,td->to", p, b, a, x)
    torch.testing.assert_close(module(x), dense, **EXACT)


def test_of_experts_that_are_the_same_any_router_makes_the_same(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "one", seed=0)
    model = mixture(folders=[folder] * 4, shaken=False)
    before = logits(model)
    for module in layers(model).values():
        module.lora_router["default"].weight.data.normal_(std=3)
    torch.testing.assert_close(logits(model), before, **EXACT)
    torch.testing.assert_close(before, logits(load_adapter(base(), folder).double()), **EXACT)


@pytest.mark.parametrize(
    "router", [{}, {"kind": "mor"}, {"kind": "mor", "top_sub": 1}, {"kind": "mor", "gate_scope": "fixed"}]
)
def test_a_prefix_does_not_know_what_follows_or_stands_beside_it(router: dict[str, Any]) -> None:
    model = mixture(router=router)
    alone = logits(model, IDS[:1, :4])
    torch.testing.assert_close(logits(model)[:1, :4], alone, **EXACT)
    other = IDS.clone()
    other[1:, :], other[0, -1] = 33, 77
    torch.testing.assert_close(logits(model, other)[:1, :4], alone, **EXACT)


def test_a_gate_over_the_batch_leaks_as_the_published_one_does() -> None:
    model = mixture(router={"kind": "mor", "gate_scope": "batch"})
    other = IDS.clone()
    other[0, -1] = 77
    assert (logits(model)[0, 0] - logits(model, other)[0, 0]).abs().max() > 1e-6


@pytest.mark.parametrize("router", [{}, {"kind": "mor"}])
def test_cached_generation_is_that_without_a_cache(router: dict[str, Any]) -> None:
    model = mixture(router=router)
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    mask = torch.ones_like(IDS)
    cached, whole = (
        model.generate(input_ids=IDS, attention_mask=mask, use_cache=use, **options) for use in (True, False)
    )
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), **EXACT)


def test_layers_have_experts_choices_and_ranks_of_their_own() -> None:
    model = mixture(experts="24", top_k=1, rank=[2, 3])
    for path, module in layers(model).items():
        experts, rank = (2, 2) if ".layers.0." in path else (4, 3)
        assert module.lora_A["default"].weight.shape == (experts * rank, module.in_features)
        assert module.lora_router["default"].weight.shape == (experts, module.in_features)


def test_the_softmax_is_in_float32_where_the_model_is_in_bfloat16() -> None:
    z = torch.tensor([[1.0, 1.0078125, -2.0]]).bfloat16()
    chosen, weights = choose(z, 2)
    assert chosen.tolist() == [[1, 0]]
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([[0.498047, 0.501953, 0.0]]), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert load(Routed(z, chosen))[1].dtype == torch.float32
    model = make_mixture(tiny_model(TOKENIZER).bfloat16(), MixtureSettings(modules=MODULES))
    assert logits(model).dtype == torch.bfloat16


# Training -------------------------------------------------------------------------------------------------------------


def trained(model: PeftModel) -> set[str]:
    return {name.split(".default")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


def test_trained_are_experts_and_routers_or_routers_alone() -> None:
    assert trained(mixture()) == {"lora_A", "lora_B", "lora_router"}
    model = mixture(router_only=True)
    assert trained(model) == {"lora_router"}
    model.set_adapter("default")
    assert trained(model) == {"lora_router"}


@pytest.mark.parametrize("router", [{}, {"kind": "mor"}, {"kind": "mor", "gate_scope": "batch"}], ids=str)
def test_gradients_are_those_of_differences(router: dict[str, Any]) -> None:
    module = next(iter(layers(mixture(router=router)).values()))
    names, values = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    x = torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        with recording(module) as record:
            out = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))
        return out, record.balance()

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values), fast_mode=True)


GOLDEN = torch.tensor([[2, 1, 0, -1], [0, 0.5, 1, 2], [1, 3, -1, 0]], dtype=torch.float64)


def test_the_balance_of_the_golden_vector() -> None:
    choices, probabilities = load(Routed(GOLDEN.clone().requires_grad_(), GOLDEN.topk(2).indices))
    torch.testing.assert_close(choices, torch.tensor([1 / 3, 1 / 3, 1 / 6, 1 / 6], dtype=torch.float64))
    found = [0.27826, 0.39903, 0.10515, 0.21756]
    torch.testing.assert_close(probabilities, torch.tensor(found, dtype=torch.float64), rtol=0, atol=5e-6)
    assert (4 * (choices * probabilities).sum()).item() == pytest.approx(1.118189, abs=5e-7)


def test_padding_counts_only_where_it_is_asked_for() -> None:
    padded = torch.cat([GOLDEN, torch.tensor([[9.0, 0, 0, 0]], dtype=torch.float64)])[None].requires_grad_()
    routed = Routed(padded, padded.topk(2).indices)
    without = load(Routed(GOLDEN.clone().requires_grad_(), GOLDEN.topk(2).indices))
    for found, wanted in zip(load(routed, torch.tensor([[1, 1, 1, 0]])), without, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.allclose(load(routed)[0], without[0])
    with pytest.raises(ValueError, match=r"the mask is of \(1, 3\) tokens, and the routers saw \(1, 4\)"):
        load(routed, torch.ones(1, 3))


def test_even_routing_has_the_balance_of_one_for_each_layer() -> None:
    model = mixture()
    with recording(model) as record:
        for module in layers(model).values():
            z = torch.eye(4, dtype=torch.float64) * 3 + torch.eye(4, dtype=torch.float64).roll(1, 0) * 2
            record.add(module, z[None].requires_grad_(), z[None].topk(2).indices)
    assert record.balance().item() == pytest.approx(2)


def test_the_balance_is_that_of_all_modules_of_a_layer_together() -> None:
    model = mixture(experts="42", top_k=2)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with recording(model) as record:
        model(input_ids=IDS, attention_mask=mask)
    total = 0.0
    for number, n in enumerate((4, 2)):
        own = [r[0].logits for path, r in record.routed.items() if f".layers.{number}." in path]
        z = torch.cat([one[mask.bool()] for one in own])
        assert z.shape == (3 * 11, n)
        picks = torch.nn.functional.one_hot(z.argsort(descending=True)[:, :2], n).double().sum((0, 1)) / (2 * len(z))
        total += (n * (picks * torch.softmax(z, -1).mean(0)).sum()).item()
    assert record.balance(mask).item() == pytest.approx(total, rel=1e-12)


def test_gradient_checkpoints_change_no_gradient_and_keep_nothing() -> None:
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    found = []
    for checkpoints in (False, True):
        model = mixture(balance=1.0)
        if checkpoints:
            use_gradient_checkpointing(model)
        model.train()
        with recording(model) as record:
            loss = model(input_ids=IDS, attention_mask=mask, labels=IDS).loss
        (loss + record.balance(mask)).backward()
        kept = weakref.ref(next(iter(record.routed.values()))[0].logits)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        del record, loss
        gc.collect()
        assert kept() is None
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **EXACT)


def test_checkpoints_that_drop_the_graph_are_refused() -> None:
    model = mixture()
    base_model: Any = model.get_base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' and torch's, about old names and inputs without a gradient
        base_model.gradient_checkpointing_enable({"use_reentrant": True})
        model.train()
        with recording(model) as record:
            model(input_ids=IDS)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        record.balance()


def test_a_balance_needs_one_pass() -> None:
    model = mixture()
    with recording(model) as record, torch.no_grad():
        with pytest.raises(ValueError, match="no router was at work"):
            record.balance()
        model(input_ids=IDS)
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="record each pass by itself"):
        record.balance()
    assert all(module.record is None for module in layers(model).values())


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = mixture(experts="24", rank=[2, 3], router={"kind": "mor"}).float()
    save_mixture(model, tmp_path / "mixture")
    return tmp_path / "mixture"


def test_what_is_saved_is_loaded_bit_by_bit(saved: Path, tmp_path: Path) -> None:
    model = load_mixture(tiny_model(TOKENIZER), saved)
    save_mixture(model, tmp_path / "again")
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (saved, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (saved / MANIFEST).read_bytes() == (tmp_path / "again" / MANIFEST).read_bytes()
    assert not list(saved.glob("*.bin"))
    torch.testing.assert_close(
        logits(model.double()), logits(mixture(experts="24", rank=[2, 3], router={"kind": "mor"})), rtol=0, atol=1e-5
    )


def test_a_base_model_is_given_back_as_it_was(saved: Path) -> None:
    model = tiny_model(TOKENIZER)
    before = logits(model)
    again = unload_adapter(load_mixture(model, saved))
    assert torch.equal(logits(again), before)
    assert not [module for module in again.modules() if isinstance(module, LoraLayer)]


def test_without_its_manifest_a_mixture_is_never_the_base_model(saved: Path) -> None:
    (saved / MANIFEST).unlink()
    with pytest.raises(ModelError, match=r"mixture\.json is missing"):
        load_mixture(tiny_model(TOKENIZER), saved)
    with pytest.raises(ModelError, match="does not fit its base model: size mismatch"):
        load_adapter(tiny_model(TOKENIZER), saved)
    with pytest.raises(RuntimeError, match="size mismatch"):  # PEFT by itself
        PeftModel.from_pretrained(tiny_model(TOKENIZER), str(saved))


def without(folder: Path, part: str) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if part in name)
    del weights[name]
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("part", ["main.weight", "main.bias", "sub.weight", "lora_A", "lora_B"])
def test_a_missing_weight_is_named(saved: Path, part: str) -> None:
    without(saved, part)
    model = tiny_model(TOKENIZER)
    with pytest.raises(ModelError, match=rf"lacks weights that its configuration promises: .*{part}"):
        load_mixture(model, saved)
    assert not [module for module in model.modules() if isinstance(module, LoraLayer)]


def test_a_weight_too_many_is_named(saved: Path) -> None:
    weights = load_file(saved / "adapter_model.safetensors")
    name = next(name for name in weights if "q_proj.lora_router.default.sub" in name)
    weights[name.replace("q_proj", "k_proj")] = weights[name].clone()
    save_file(weights, saved / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"no place for: .*k_proj\.lora_router"):
        load_mixture(tiny_model(TOKENIZER), saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "gradstore-mixture-2"}, "format"),
        ({"layers": 4}, "of a model of 4 layers, and this one has 2"),
        ({"alphas": [1.0]}, "1 alphas, fewer than there are experts"),
        ({"alphas": []}, "alphas"),
        ({"more": 1}, "more"),
        ({"settings": {"experts": "444"}}, "contradicts itself: experts='444'"),
        ({"settings": {"experts": 4, "rank": 2, "modules": MODULES}}, "lacks|size mismatch|no place"),
        ({"settings": {"modules": ["w"]}}, "no linear layer of this model is called 'w'"),
    ],
)
def test_a_manifest_that_is_not_of_these_weights_is_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(ModelError, match=message):
        load_mixture(tiny_model(TOKENIZER), saved)


def test_a_mixture_is_not_merged() -> None:
    model: Any = mixture()
    before = logits(model)
    for call in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotMergeable, match="cannot be merged"):
            call()
    module = next(iter(layers(model).values()))
    with pytest.raises(NotMergeable):
        module.get_delta_weight("default")
    with pytest.raises(NotMergeable):
        module.unmerge()
    assert not module.supports_lora_conversion()
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    with pytest.raises(ValueError, match="shares its layers with no other adapter"):
        model.add_adapter("more", LoraConfig(target_modules=MODULES))


# Experts --------------------------------------------------------------------------------------------------------------


def test_experts_are_the_adapters_bit_by_bit(tmp_path: Path) -> None:
    folders = [save_lora(tmp_path / str(n), seed=n, lora_alpha=4 + n, use_rslora=n == 2) for n in range(3)]
    model = make_mixture(base(), MixtureSettings(experts=3, rank=3, modules=MODULES), experts=folders)
    for path, module in layers(model).items():
        for n, folder in enumerate(folders):
            own = load_file(folder / "adapter_model.safetensors")
            assert torch.equal(module.lora_A["default"].weight[3 * n : 3 * n + 3], own[f"{path}.lora_A.weight"])
            assert torch.equal(module.lora_B["default"].weight[:, 3 * n : 3 * n + 3], own[f"{path}.lora_B.weight"])
        torch.testing.assert_close(
            module.expert_scales.double(), torch.tensor([4 / 3, 5 / 3, 6 / 3**0.5], dtype=torch.float64)
        )
    save_mixture(model, tmp_path / "saved")
    again = load_mixture(base(), tmp_path / "saved")
    assert all(
        torch.equal(a.expert_scales, b.expert_scales)
        for a, b in zip(layers(model).values(), layers(again).values(), strict=True)
    )


@pytest.mark.parametrize(
    ("adapter", "settings", "message"),
    [
        ({"r": 2}, {}, r"'b' is of the rank 2, and the experts of layer 0 are of the rank 3: ask for rank=2"),
        ({"target_modules": ["q_proj", "v_proj"]}, {}, r"'b' does not fit .* it has no .*down_proj\.lora_A"),
        ({}, {"modules": ["q_proj", "v_proj"]}, r"nothing takes its .*down_proj\.lora_A.*; add the module"),
        ({}, {"experts": 4}, r"layer 0 has 4 experts, and 2 adapters are given: .* experts=2"),
        ({"use_dora": True}, {}, r"'b' is a DoRA, and experts are plain LoRAs"),
        ({"rank_pattern": {"q_proj": 2}}, {}, r"'b' is a LoRA with ranks of its own"),
        ({"bias": "all"}, {}, r"'b' trains biases"),
        ({"init_lora_weights": "pissa", "dtype": torch.float32}, {}, r"'b' began with a part of the base weights"),
    ],
)
def test_an_adapter_that_cannot_be_an_expert_is_refused_with_the_reason(
    tmp_path: Path, adapter: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    folders = [save_lora(tmp_path / "a", seed=0), save_lora(tmp_path / "b", seed=1, **adapter)]
    with pytest.raises(ModelError, match=message):
        make_mixture(
            base(), MixtureSettings(**({"experts": 2, "rank": 3, "modules": MODULES} | settings)), experts=folders
        )


def test_an_adapter_of_another_base_model_is_refused(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "a", seed=0)
    other = base(hidden_size=16)
    with pytest.raises(ModelError, match=r"lora_A\.weight is of \(3, 32\), and its place of \(3, 16\)"):
        make_mixture(other, MixtureSettings(experts=1, top_k=1, rank=3, modules=MODULES), experts=[folder])
    assert not [module for module in other.modules() if isinstance(module, LoraLayer)]


def test_settings_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(InvalidInput, match="has 3 blocks"):
        make_mixture(base(), MixtureSettings(experts="222"))
    with pytest.raises(ModelError, match="is called 'gate': it has down_proj, gate_proj"):
        make_mixture(base(), MixtureSettings(modules=["q_proj", "gate"]))
    untouched = base()
    with pytest.raises(ModelError, match="lm_head belongs to no layer"):
        make_mixture(untouched, MixtureSettings(modules=["q_proj", "lm_head"]))
    assert not [module for module in untouched.modules() if isinstance(module, LoraLayer)]


def test_a_seed_fixes_what_is_drawn() -> None:
    same, again, other = (
        {n: p for n, p in make_mixture(base(), MixtureSettings(), seed=seed).named_parameters() if p.requires_grad}
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not all(torch.equal(same[name], other[name]) for name in same if "lora_B" not in name)
