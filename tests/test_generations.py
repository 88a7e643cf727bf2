"""Generations: greedy answers, and a trace of the experts that the formula says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradstore import cli
from gradstore.types import AnyJob, GenerationRequest
from torch import Tensor

from datastore.errors import InvalidInput
from tests.serving import problem_of, serving
from tests.test_mixture_finetunes import trained
from tests.tiny import save_tiny_model
from tests.workplace import Workplace
from worker.engines import load
from worker.kinds import generations
from worker.loaded import Base
from worker.mixtures.layer import MixtureLinear

MOR = {"router": {"kind": "mor"}, "experts": [3, 4], "balance": 1}
PROMPTS = ["Add 3 and 4.", "What is the capital of France?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Workplace:
    return Workplace.at(tmp_path_factory.mktemp("place"), model=model)


@pytest.fixture(scope="module")
def mixture(place: Workplace) -> str:
    """A checkpoint whose routers and experts have learnt something."""
    return trained(place, mixture=MOR, learning_rate=5e-2, epochs=4)


def job_of(place: Workplace, checkpoint: str, **changes: Any) -> AnyJob:
    values = {"checkpoint": checkpoint, "prompts": PROMPTS, "max_new_tokens": 6} | changes
    job, _ = place.context.generations.start(GenerationRequest.model_validate(values))
    place.work()
    return place.job(job.id)


def done(place: Workplace, checkpoint: str, **changes: Any) -> dict[str, Any]:
    job = job_of(place, checkpoint, **changes)
    assert job.status == "succeeded", job.error
    assert job.result is not None
    return job.result.model_dump()


def loaded(place: Workplace, checkpoint: str) -> Any:
    return load(place.context, Base(str(place.model)), place.context.catalog.checkpoint(checkpoint)).eval()


def tulu(place: Workplace, prompt: str) -> list[int]:
    tokenizer = place.context.loaded.tokenizer(str(place.model), None)
    ids: list[int] = tokenizer(f"<|user|>\n{prompt}\n<|assistant|>\n").input_ids
    return ids


def test_an_answer_is_the_likeliest_token_again_and_again(place: Workplace, mixture: str) -> None:
    result = done(place, mixture)
    assert result["checkpoint"] == mixture
    assert result["loads"] is None
    adapted, tokenizer = loaded(place, mixture), place.context.loaded.tokenizer(str(place.model), None)
    for prompt, answer in zip(PROMPTS, result["data"], strict=True):
        ids = tulu(place, prompt)
        start = len(ids)
        while len(ids) < start + 6 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                ids.append(int(adapted(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert (answer["prompt_tokens"], answer["tokens"]) == (start, len(ids) - start)
        assert answer["text"] == tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert answer["trace"] is None


def test_a_prompt_is_a_users_turn_and_answers_do_not_depend_on_their_neighbours(place: Workplace, mixture: str) -> None:
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert done(place, mixture, prompts=turns, name="turns")["data"] == done(place, mixture)["data"]
    assert done(place, mixture, prompts=PROMPTS[1:])["data"] == done(place, mixture)["data"][1:]


def by_hand(module: MixtureLinear, x: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Logits (tokens, N) and weights of sub-routers (tokens, J) of MoR's formula, in float64."""
    router: Any = module.lora_router["default"]
    x64 = x[0].double()
    gate = torch.softmax(x64 @ router.main.weight.double().T + router.main.bias.double(), dim=-1)
    sub = (x64 @ router.sub.weight.double().T).reshape(len(x64), gate.shape[1], -1)
    return torch.einsum("tj,tjn->tn", gate, sub).detach().numpy(), gate.detach().numpy()


def test_a_trace_is_what_the_formula_says_of_each_token(place: Workplace, mixture: str) -> None:
    result = done(place, mixture, prompts=PROMPTS[:1], trace=True, trace_tokens=5)
    (answer,) = result["data"]
    adapted, tokenizer = loaded(place, mixture), place.context.loaded.tokenizer(str(place.model), None)

    inputs: dict[str, Tensor] = {}
    modules = {
        path.removeprefix("base_model.model."): module
        for path, module in adapted.named_modules()
        if isinstance(module, MixtureLinear)
    }
    handles = [
        module.register_forward_pre_hook(lambda _, given, path=path: inputs.update({path: given[0]}))
        for path, module in modules.items()
    ]
    full = _row(place, adapted, answer)
    with torch.no_grad():
        adapted(input_ids=torch.tensor([full]))
    for handle in handles:
        handle.remove()
    trace = answer["trace"]
    assert trace["first"] == len(full) - 5
    assert trace["tokens"] == [tokenizer.decode([token]) for token in full[-5:]]
    assert {each["module"] for each in trace["modules"]} == set(modules)
    counts, probabilities = ({0: np.zeros(3), 1: np.zeros(4)} for _ in range(2))
    for traced in trace["modules"]:
        z, gate = by_hand(modules[traced["module"]], inputs[traced["module"]])
        order = np.argsort(-z, axis=1)[:, :2]
        assert traced["experts"] == order[-5:].tolist()
        largest = np.exp(np.take_along_axis(z, order, axis=1))
        np.testing.assert_allclose(traced["weights"], (largest / largest.sum(axis=1, keepdims=True))[-5:], atol=1e-4)
        np.testing.assert_allclose(traced["sub_routers"], gate[-5:], atol=1e-4)
        counts[traced["layer"]] += np.bincount(order.ravel(), minlength=z.shape[1])
        probabilities[traced["layer"]] += (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)).sum(axis=0)
    assert len(result["loads"]) == 2
    for layer in result["loads"]:
        found, likely = counts[layer["layer"]], probabilities[layer["layer"]]
        np.testing.assert_allclose(layer["load"], found / found.sum(), atol=1e-4)
        balance = len(found) * (found / found.sum() * likely / likely.sum()).sum()
        assert layer["balance"] == pytest.approx(balance, abs=1e-4)


def _row(place: Workplace, adapted: Any, answer: dict[str, Any]) -> list[int]:
    """The tokens of the first prompt and its answer, written once more."""
    ids = tulu(place, PROMPTS[0])
    for _ in range(answer["tokens"]):
        with torch.no_grad():
            ids.append(int(adapted(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


def test_the_load_is_of_all_prompts_and_the_balance_theirs(place: Workplace, mixture: str) -> None:
    both = done(place, mixture, trace=True)
    alone = [done(place, mixture, prompts=[prompt], trace=True) for prompt in PROMPTS]
    tokens = [each["data"][0]["prompt_tokens"] + each["data"][0]["tokens"] for each in alone]
    for layer, *parts in zip(both["loads"], *(each["loads"] for each in alone), strict=True):
        mean = sum(n * np.array(part["load"]) for n, part in zip(tokens, parts, strict=True)) / sum(tokens)
        np.testing.assert_allclose(layer["load"], mean, atol=2e-4)
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-3)
        assert layer["balance"] > 0.5


def test_what_has_no_routers_has_no_trace(place: Workplace) -> None:
    plain = place.checkpoint(7).id
    with pytest.raises(InvalidInput, match=r"/trace: .* is no mixture of LoRA experts"):
        job_of(place, plain, trace=True)
    assert len(done(place, plain)["data"]) == len(done(place, place.base().id)["data"]) == 2


def test_a_trace_that_no_result_has_room_for_fails_with_what_to_ask(
    place: Workplace, mixture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "MOST_TRACED", 100)  # of 2 layers x 2 modules x 2 choices x 2 prompts
    job = job_of(place, mixture, trace=True, trace_tokens=9)
    assert job.status == "failed"
    assert job.error is not None
    assert "ask for trace_tokens=6" in (job.error.detail or "")


def test_over_the_service_and_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Workplace.at(tmp_path)
    mixed = trained(here, mixture=MOR, epochs=1)
    plain = here.checkpoint(7).id
    with serving(here.context.settings.data, allowed_roots=[tmp_path]) as service:
        told = problem_of(
            service.http.post("/generations", json={"checkpoint": plain, "prompts": ["a"], "trace": True}), 422
        )
        assert told.errors[0].pointer == "/trace"
        problem_of(service.http.post("/generations", json={"checkpoint": plain, "prompts": []}), 422)
        monkeypatch.setenv("GRADSTORE_URL", service.url)

        def run(*words: str) -> str:
            with pytest.raises(SystemExit) as left:
                cli.app(["generations", *words], prog_name="gradstore")
            said = capsys.readouterr()
            assert left.value.code == 0, said.err
            return said.out.strip()

        job = run("create", "--checkpoint", mixed, "--trace", "--max-new-tokens", "4", PROMPTS[0])
        here.work()
        shown = run("show", job)
        answer = json.loads(run("show", job, "--json"))["result"]
        assert answer["data"][0]["text"].strip() in shown
        assert "load of each expert" in shown.lower()
        assert len(answer["data"][0]["trace"]["modules"]) == 4
        run("delete", job)
