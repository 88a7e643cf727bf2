"""Fine-tunes of mixtures: their loss, their checkpoints, what of a request is refused, and what comes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gradstore import GradientStore, Invalid, cli
from gradstore.types import (
    EvaluationRequest,
    FinetuneRequest,
    GradientsRequest,
    MixtureSettings,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments

from datastore.checkpoints import ADAPTER_WEIGHTS
from datastore.errors import InvalidCheckpoint, InvalidInput
from datastore.finetune_mixtures import parameters
from datastore.mixture_files import MANIFEST
from datastore.models import size_of
from tests.serving import Service, serving
from tests.test_finetune import ROWS, Interrupted, contents, until
from tests.tiny import save_tiny_model
from tests.workplace import CPU, Workplace, numbered, tiny_adapter
from worker.batches import collate, encode
from worker.engines import load
from worker.finetune import Finetuned, finetune
from worker.loaded import Base
from worker.mixtures.balance import recording
from worker.mixtures.layer import NotMergeable
from worker.mixtures.model import make_mixture
from worker.mixtures.training import BalancedTrainer
from worker.models import load_model, load_tokenizer

MIXTURE: dict[str, Any] = {
    "experts": 3, "top_k": 2, "rank": 2, "alpha": 4, "balance": 0.1, "modules": ["q_proj", "v_proj"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    return Workplace.at(tmp_path, model=model)


def request(model: Path, *, mixture: dict[str, Any] | None = None, **changes: Any) -> FinetuneRequest:
    """Two epochs of three steps, each of two passes."""
    values = {
        "dataset": "ds_1", "model": str(model), "epochs": 2, "batch_size": 4, "device_batch_size": 2,
        "learning_rate": 1e-2, "mixture": MIXTURE | (mixture or {}),
    }  # fmt: skip
    return FinetuneRequest.model_validate(values | changes)


def experts(folder: Path, model: Path, count: int = 3) -> list[Path]:
    """Adapters that experts can begin as."""
    for number in range(count):
        tiny_adapter(model, seed=number).save_pretrained(str(folder / f"expert-{number}"))
    return [folder / f"expert-{number}" for number in range(count)]


# The training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_padding", [True, False])
def test_a_step_follows_the_gradient_of_cross_entropy_and_the_mean_balance_of_its_passes(
    model: Path, tmp_path: Path, ignore_padding: bool
) -> None:
    settings = MixtureSettings.model_validate(
        MIXTURE | {"balance": 3.0, "dropout": 0, "ignore_padding": ignore_padding, "router": {"kind": "mor"}}
    )
    tokenizer = load_tokenizer(str(model))
    rows = [encode(row, tokenizer=tokenizer, template="tulu", max_length=2048) for row in ROWS[:4]]
    passes = [collate(rows[start : start + 2], pad_id=int(tokenizer.pad_token_id)) for start in (0, 2)]
    batches = [
        {"input_ids": each.input_ids, "attention_mask": each.attention_mask, "labels": each.labels} for each in passes
    ]
    trained = make_mixture(load_model(str(model)), settings, experts=experts(tmp_path, model))
    before = {name: value.detach().clone() for name, value in trained.named_parameters() if value.requires_grad}

    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    entropy, balance = torch.zeros(()), torch.zeros(())
    for batch in batches:
        with recording(trained) as record:
            logits = trained(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        flat, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        entropy = entropy + torch.nn.functional.cross_entropy(flat, labels, reduction="sum") / tokens
        balance = balance + record.balance(batch["attention_mask"] if ignore_padding else None) / 2
    wanted = torch.autograd.grad(entropy + 3.0 * balance, [trained.get_parameter(name) for name in before])

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), optim="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1,
        lr_scheduler_type="constant", per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    order = iter(batches)
    trainer = BalancedTrainer(
        model=trained, args=arguments, train_dataset=[{"row": number} for number in range(4)],
        data_collator=lambda _: next(order),
    )  # fmt: skip
    trainer.mixture = settings
    trainer.train()
    for (name, value), gradient in zip(before.items(), wanted, strict=True):
        torch.testing.assert_close(value - trained.get_parameter(name), gradient, rtol=1e-4, atol=1e-6)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(entropy.item(), rel=1e-5)
    assert logged["balance"] == pytest.approx(balance.item(), rel=1e-5)


def test_the_curve_has_both_losses_and_a_loras_has_one(model: Path, tmp_path: Path) -> None:
    done = finetune(ROWS, request(model), work=tmp_path / "a", device=CPU)
    assert all(point.balance is not None and 1 < point.balance < 6 for point in done.loss_curve)
    unweighed = finetune(ROWS, request(model, mixture={"balance": 0}), work=tmp_path / "b", device=CPU)
    assert unweighed.loss_curve[0] == done.loss_curve[0]
    assert unweighed.loss_curve[-1] != done.loss_curve[-1]
    plain = finetune(ROWS, request(model).model_copy(update={"mixture": None}), work=tmp_path / "c", device=CPU)
    assert all(point.balance is None for point in plain.loss_curve)


def test_gradient_checkpointing_changes_no_weight_beyond_rounding(model: Path, tmp_path: Path) -> None:
    plain, saving = (
        finetune(
            ROWS, request(model, gradient_checkpointing=how, mixture={"dropout": 0, "balance": 1}),
            work=tmp_path / str(how), device=CPU,
        )
        for how in (False, True)
    )  # fmt: skip
    found, wanted = (load_file(done.epochs[-1].folder / "adapter" / ADAPTER_WEIGHTS) for done in (saving, plain))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    for point, other in zip(plain.loss_curve, saving.loss_curve, strict=True):
        assert point.balance == pytest.approx(other.balance, rel=1e-4)


ROUTERS_ALONE = {"router_only": True, "router": {"kind": "mor", "gate_scope": "token"}}


@pytest.fixture(scope="module", params=[{}, ROUTERS_ALONE], ids=["all", "routers alone"])
def uninterrupted(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[Path], Finetuned]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    begin = experts(folder, model) if request.param else []
    return request.param, begin, finetune(ROWS, ask(model, request.param), work=folder, device=CPU, experts=begin)


def ask(model: Path, mixture: dict[str, Any]) -> FinetuneRequest:
    return request(model, mixture=mixture, **({"experts_from": ["a", "b", "c"]} if mixture else {}))


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_training_that_was_interrupted_comes_to_the_same_bytes(
    model: Path, tmp_path: Path, uninterrupted: tuple[dict[str, Any], list[Path], Finetuned], step: int
) -> None:
    mixture, begin, whole = uninterrupted
    asked = ask(model, mixture)
    with pytest.raises(Interrupted):
        finetune(ROWS, asked, work=tmp_path, device=CPU, experts=begin, on_step=until(step), save_seconds=0)
    steps: list[int] = []
    done = finetune(
        ROWS, asked, work=tmp_path, device=CPU, experts=begin, attempt="2", on_step=lambda at, _: steps.append(at)
    )
    assert contents(done) == contents(whole)
    assert done.loss_curve == whole.loss_curve
    assert [epoch.description for epoch in done.epochs] == [epoch.description for epoch in whole.epochs]
    assert min(steps) >= step - 1


def test_of_routers_alone_the_experts_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    begin = experts(tmp_path, model)
    done = finetune(ROWS, ask(model, ROUTERS_ALONE), work=tmp_path / "work", device=CPU, experts=begin)
    adapters = [load_file(folder / ADAPTER_WEIGHTS) for folder in begin]
    first, last = (load_file(epoch.folder / "adapter" / ADAPTER_WEIGHTS) for epoch in done.epochs)
    for name, value in last.items():
        if ".lora_router." in name:
            assert not torch.equal(value, first[name]), name
        else:
            together = torch.cat([each[name] for each in adapters], dim=0 if ".lora_A." in name else 1)
            assert torch.equal(value, together), name


# Checkpoints ----------------------------------------------------------------------------------------------------------


def trained(place: Workplace, **changes: Any) -> str:
    """A mixture that was trained in this store; its last checkpoint."""
    dataset = place.pool(numbered(range(12))).id
    last: str = place.done(request(place.model, dataset=dataset, **changes))["checkpoints"][-1]
    return last


def bank(place: Workplace) -> list[str]:
    """Three adapters of the place's model: a0, a1 and a2."""
    context = place.context
    stored = [
        context.catalog.add_checkpoint(context.checkpoints.register(folder, model=str(place.model)))
        for folder in experts(place.folder, place.model)
    ]
    return [context.adapters.add(each.id, name=f"a{number}")[0].id for number, each in enumerate(stored)]


def test_a_checkpoint_is_a_mixture_of_so_many_parameters(place: Workplace) -> None:
    router = {"kind": "mor", "sub_routers": 3}
    found = place.context.catalog.checkpoint(trained(place, mixture={"router": router}))
    assert (found.method, found.has_moments) == ("mixture", False)
    weights = load_file(place.context.checkpoints.weights(found.id) / ADAPTER_WEIGHTS)
    size = size_of(place.model)
    assert size is not None
    settings = MixtureSettings.model_validate(MIXTURE | {"router": router})
    assert found.parameters == sum(each.numel() for each in weights.values()) == parameters(settings, size)


def test_experts_begin_as_adapters_of_the_bank_which_are_kept(place: Workplace) -> None:
    ids = bank(place)
    last = trained(place, experts_from=["a0", "a1", "a2"], mixture=ROUTERS_ALONE)
    weights = load_file(place.context.checkpoints.weights(last) / ADAPTER_WEIGHTS)
    adapters = [
        load_file(place.context.checkpoints.weights(place.context.catalog.adapter(id).checkpoint) / ADAPTER_WEIGHTS)
        for id in ids
    ]
    for name, value in weights.items():
        if ".lora_A." in name:
            assert torch.equal(value, torch.cat([each[name] for each in adapters]))
    with pytest.raises(Exception, match="ft_"):
        place.context.adapters.remove("a0")


def test_an_evaluation_measures_what_the_mixture_gives(place: Workplace) -> None:
    place.task(2, name="sums")
    last = trained(place, epochs=6, learning_rate=5e-2)
    result = place.done(EvaluationRequest(checkpoint=last, tasks=["sums"]))
    losses = {row["model"]: row["loss"] for row in result["rows"] if row["subtask"] is None}
    assert losses["tuned"] < 0.95 * losses["base"]
    folder = place.context.checkpoints.weights(last)
    (folder / MANIFEST).unlink()
    place.start(EvaluationRequest(checkpoint=last, tasks=["sums"], seed=1))
    assert place.work() == ["failed"]


def test_a_mixture_is_neither_merged_nor_an_adapter_nor_a_place_for_gradients(place: Workplace) -> None:
    last = trained(place)
    loaded = load(place.context, Base(str(place.model)), place.context.catalog.checkpoint(last))
    with pytest.raises(NotMergeable):
        loaded.merge_and_unload()
    with pytest.raises(InvalidInput, match="a mixture of LoRA experts"):
        place.context.adapters.add(last)
    for kind in ("sgd", "hidden"):
        asked = {"dataset": place.pool(numbered(range(12))).id, "checkpoints": [last], "kinds": [kind]}
        with pytest.raises(InvalidInput, match="is a mixture of LoRA experts, of which there are no features"):
            place.start(GradientsRequest.model_validate(asked))
    place.task(1, name="sums")
    with pytest.raises(InvalidInput, match="/quantisation: "):
        place.start(EvaluationRequest(checkpoint=last, tasks=["sums"], quantisation="nf4"))


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture's folder."""
    work = tmp_path_factory.mktemp("saved")
    return finetune(ROWS, request(model, epochs=1), work=work, device=CPU).epochs[-1].folder / "adapter"


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / ADAPTER_WEIGHTS)
    change(weights)
    (folder / ADAPTER_WEIGHTS).unlink()  # other names of the file keep what they had
    save_file(weights, folder / ADAPTER_WEIGHTS)


def first(weights: dict[str, Tensor], part: str) -> str:
    return min(name for name in weights if part in name)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "mixture.json is missing: send the whole folder"),
        (lambda folder: rewritten(folder, lambda all: all.pop(first(all, ".lora_router."))), "lora_router.weight"),
        (lambda folder: rewritten(folder, lambda all: all.pop(first(all, ".lora_A."))), "no part of|lora_A|no experts"),
        (lambda folder: rewritten(folder, lambda all: all.pop(first(all, ".lora_B."))), "without|lacks"),
        (lambda folder: manifest(folder, rank=3), r"and mixture.json makes it \[9, "),
        (lambda folder: manifest(folder, experts=[3, 3, 3]), "contradicts itself"),
        (lambda folder: manifest(folder, modules=["q_proj"]), "does not name 'v_proj'"),
        (lambda folder: manifest(folder, modules=["q_proj", "v_proj", "k_proj"]), "no experts of 'k_proj' in layer 0"),
        (lambda folder: manifest(folder, kind="mor"), "lora_router.default.sub.weight"),
    ],
    ids=["no manifest", "no router", "no A", "no B", "other rank", "other layers", "fewer", "more", "other routers"],
)
def test_a_folder_that_is_no_whole_mixture_is_refused_with_the_reason(
    place: Workplace, saved: Path, tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    known = place.context.checkpoints.register(folder, model=str(place.model))
    assert known.method == "mixture"
    damage(folder)
    with pytest.raises(InvalidCheckpoint, match=told):
        place.context.checkpoints.register(folder, model=str(place.model))


def manifest(folder: Path, *, kind: str | None = None, **settings: Any) -> None:
    found = json.loads((folder / MANIFEST).read_bytes())
    found["settings"] |= settings
    if kind is not None:
        found["settings"]["router"] = {"kind": kind}
    (folder / MANIFEST).write_text(json.dumps(found))


# What is refused at the door ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"experts_from": ["a0"], "mixture": None}, "ask for a mixture, too"),
        ({"method": "full"}, "leave method and quantisation out"),
        ({"quantisation": "nf4"}, "leave method and quantisation out"),
        ({"lora": {"r": 8}}, "leave lora out"),
        ({"mixture": MIXTURE | {"router_only": True}}, "router_only needs experts_from"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(model: Path, changes: dict[str, Any], told: str) -> None:
    values = {"dataset": "ds_1", "model": str(model), "mixture": MIXTURE}
    with pytest.raises(ValueError, match=told):
        FinetuneRequest.model_validate(values | changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mixture": {"modules": ["c_attn"]}}, "/mixture/modules: no linear layer of this model is called 'c_attn'"),
        ({"mixture": {"experts": [3, 3, 3]}}, "/mixture: experts lists 3 numbers"),
        ({"experts_from": ["a0", "a1"]}, "2 adapters are named.*ask for experts=2"),
        ({"experts_from": ["a0", "a1", "a2"], "mixture": {"rank": 4}}, "a0 is of the rank 2: ask for rank=2"),
        ({"experts_from": ["a0", "a1", "a1"]}, "named twice"),
        (
            {"experts_from": ["a0", "a1", "a2"], "mixture": {"modules": ["q_proj", "k_proj"]}},
            "/experts_from/0: the adapter a0 is on q_proj, v_proj, and the mixture on k_proj, q_proj",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_worker_has_it(
    place: Workplace, changes: dict[str, Any], told: str
) -> None:
    bank(place)
    with pytest.raises(InvalidInput, match=told):
        place.start(request(place.model, dataset=place.pool(numbered(range(12))).id, **changes))


def test_experts_of_another_base_model_are_refused(place: Workplace, tmp_path: Path) -> None:
    bank(place)
    other = save_tiny_model(tmp_path / "other", seed=1)
    asked = request(other, dataset=place.pool(numbered(range(12))).id, experts_from=["a0", "a1", "a2"])
    with pytest.raises(InvalidInput, match="/experts_from/0: the adapter a0 is of") as caught:
        place.start(asked)
    assert [problem.pointer for problem in caught.value.errors] == [f"/experts_from/{number}" for number in range(3)]


def test_a_request_without_a_mixture_has_the_id_that_it_always_had(place: Workplace) -> None:
    pool = place.pool(numbered(range(12))).id
    plain = FinetuneRequest(dataset=pool, model=str(place.model))
    fields = plain.model_dump(mode="json", exclude={"name", "dry_run", "mixture", "experts_from"})
    plan = place.context.finetunes.plan(plain)
    from datastore.identity import content_id

    resolved = {"model": plan.model, "revision": plan.revision, "dataset": pool, "selection": None, "rows": 12}
    assert plan.id == content_id("ft", fields | resolved | {"fraction": None})
    mixed = place.context.finetunes.plan(request(place.model, dataset=pool))
    other = place.context.finetunes.plan(request(place.model, dataset=pool, mixture={"balance": 0.2}))
    assert len({plan.id, mixed.id, other.id}) == 3


# From the client and the command line ---------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path, model: Path) -> Iterator[Service]:
    with serving(tmp_path / "store", allowed_roots=[tmp_path, model.parent]) as running:
        yield running


def test_a_folder_goes_out_and_comes_in_as_the_same_checkpoint(
    service: Service, saved: Path, model: Path, tmp_path: Path
) -> None:
    with GradientStore(service.url) as store:
        sent = store.checkpoints.upload(saved, model=str(model))
        assert sent.method == "mixture"
        back = store.checkpoints.download(sent.id, tmp_path / "back")
        assert sorted(path.name for path in back.iterdir()) == [
            "adapter_config.json", ADAPTER_WEIGHTS, MANIFEST,
        ]  # fmt: skip
        assert store.checkpoints.upload(back, model=str(model)).id == sent.id
        (back / MANIFEST).unlink()
        with pytest.raises(Invalid, match=r"mixture.json is missing"):
            store.checkpoints.upload(back, model=str(model))


def test_the_command_line_says_a_mixture_in_a_word_or_a_file(
    service: Service, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_URL", service.url)
    service.pool(name="pool")

    def create(mixture: str) -> str:
        words = ["finetunes", "create", "--dataset", "pool", "--model", str(model), "--mixture", mixture]
        with pytest.raises(SystemExit) as left:
            cli.app(words, prog_name="gradstore")
        said = capsys.readouterr()
        assert left.value.code == 0, said.err
        return said.out.strip()

    file = tmp_path / "mixture.json"
    file.write_text(json.dumps({"experts": 2, "top_k": 1, "rank": 4}))
    asked = [
        service.http.get(f"/finetunes/{create(each)}").json()["request"]["mixture"]
        for each in ("experts=2,top_k=1,rank=4", str(file))
    ]
    assert [int(each["experts"]) for each in asked] == [2, 2]
    assert [each["rank"] for each in asked] == [4, 4]
