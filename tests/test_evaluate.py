"""Evaluation: losses and metrics that a plain loop over single rows gives too, whatever the batches."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from datastore.errors import InvalidTask
from datastore.rows import Example, Message
from datastore.tasks import TaskExample, readers
from datastore.tasks.patterns import Patterns
from tests.tiny import tiny_model, tiny_tokenizer
from worker.evaluate import Measured, NotFinite, evaluate, first_rows, work
from worker.metrics import exact_match, token_f1

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(TOKENIZER, seed=3)
HEAD = "<s><|user|>\n{}\n<|assistant|>\n{}"


def chat(subtask: str, question: str, prefix: str, answer: str, **judged: object) -> TaskExample:
    messages = (Message("user", question), Message("assistant", answer, prefix))
    return TaskExample(Example(id=None, origin="test", messages=messages), subtask, **judged)


def choice(subtask: str, question: str, right: str, choices: tuple[str, ...] = (" A", " B", " C", " D")) -> TaskExample:
    return chat(subtask, question, "It is:", right, metric="choice", choices=choices, answers=(right,))


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def log_probs(tokens: list[int], start: int) -> list[float]:
    """Log-probabilities of the tokens from `start` on, by one unpadded forward pass."""
    logits = MODEL(torch.tensor([tokens])).logits[0].double()
    return [float(logits[at - 1].log_softmax(-1)[tokens[at]]) for at in range(start, len(tokens))]


@torch.no_grad()
def greedy(prompt: list[int], steps: int) -> str:
    """What the model goes on with, one token and one whole forward pass at a time."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(MODEL(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == TOKENIZER.eos_token_id:
            break
    return str(TOKENIZER.decode(tokens[len(prompt) :], skip_special_tokens=True))


def measure(examples: list[TaskExample], *, model: LlamaForCausalLM = MODEL, **settings: object) -> list[Measured]:
    defaults: dict[str, object] = {
        "template": "tulu",
        "max_length": 256,
        "max_new_tokens": 12,
        "token_budget": 400,
        "bootstrap_samples": 50,
        "seed": 0,
    }
    return evaluate(model, TOKENIZER, examples, **(defaults | settings))


QUESTIONS = [
    ("b", f"Question {n}: " + "how many apples are left? " * (n % 4), " A B C D"[2 * (n % 4) :][:2]) for n in range(11)
]
CHOICES = [choice(subtask if n % 3 else "a", question, right) for n, (subtask, question, right) in enumerate(QUESTIONS)]


def test_the_loss_is_the_mean_over_tokens_then_over_examples() -> None:
    expected: dict[str, list[float]] = {"a": [], "b": []}
    for example in CHOICES:
        user, assistant = example.example.messages
        prompt = ids(HEAD.format(user.content.strip(), "It is:"))
        whole = prompt + ids(f"{assistant.content}</s>")
        expected[example.subtask].append(-float(np.mean(log_probs(whole, len(prompt)))))
    measured = measure(CHOICES)
    assert [row.subtask for row in measured] == ["a", "b", None]
    assert [row.examples for row in measured] == [4, 7, 11]
    means = [float(np.mean(expected[name])) for name in ("a", "b")]
    assert [row.loss for row in measured] == pytest.approx([*means, float(np.mean(means))], rel=1e-5)
    for row in measured:
        assert row.loss_interval is not None
        assert row.loss is not None
        assert row.loss_interval[0] < row.loss < row.loss_interval[1]


def test_the_most_probable_choice_is_the_models_answer() -> None:
    long = [choice("c", "Which?", right, (" A", " the capital of France", " no")) for right in (" A", " no")]
    right = []
    for example in [*CHOICES, *long]:
        prompt = ids(HEAD.format(example.example.messages[0].content.strip(), "It is:"))
        sums = [sum(log_probs(prompt + ids(option), len(prompt))) for option in example.choices]
        right.append(example.choices[int(np.argmax(sums))] == example.answers[0])
    assert 0 < sum(right) < len(right)  # or a wrong measure could pass
    by_subtask = {"a": right[0:11:3], "b": [value for n, value in enumerate(right[:11]) if n % 3], "c": right[11:]}
    measured = measure([*CHOICES, *long])
    assert [row.value for row in measured[:-1]] == pytest.approx([np.mean(values) for values in by_subtask.values()])
    assert measured[-1].value == pytest.approx(np.mean([np.mean(values) for values in by_subtask.values()]))
    assert {row.metric for row in measured} == {"choice"}


WRITTEN = [
    chat(
        "x",
        f"Say {n}: " + "the answer is 5. " * (n % 3),
        "",
        "five",
        metric="exact_match",
        answers=(answer,),
        pattern=p,
    )
    for n, (answer, p) in enumerate([("x", None), ("x", r"####\s*(\d+)"), ("x", r"(.)"), ("x", r"(?s)(.{2})")] * 2)
]


def test_written_answers_are_those_of_greedy_decoding_without_padding() -> None:
    texts = [greedy(ids(HEAD.format(example.example.messages[0].content.strip(), "")), 12) for example in WRITTEN]
    assert len(set(texts)) > 4
    told = [  # what was written becomes the right answer of every other row
        chat("x", e.example.messages[0].content, "", "five", metric="exact_match", answers=(text if n % 2 else "no",))
        for n, (e, text) in enumerate(zip(WRITTEN, texts, strict=True))
    ]
    (row, whole) = measure(told)
    expected = [exact_match(text, example.answers)[0] for text, example in zip(texts, told, strict=True)]
    assert row.value == np.mean(expected) >= 0.5
    assert (whole.value, whole.unparsed) == (row.value, row.unparsed)
    f1 = [chat("x", e.example.messages[0].content, "", "five", metric="token_f1", answers=e.answers) for e in told]
    scores = [token_f1(text, example.answers) for text, example in zip(texts, f1, strict=True)]
    assert measure(f1)[0].value == pytest.approx(np.mean(scores))


def test_answers_in_which_nothing_is_found_are_counted() -> None:
    texts = [greedy(ids(HEAD.format(example.example.messages[0].content.strip(), "")), 12) for example in WRITTEN]
    with Patterns() as patterns:
        found = [t if e.pattern is None else patterns.find(e.pattern, t) for t, e in zip(texts, WRITTEN, strict=True)]
    parsed = [exact_match(one, e.answers)[1] for one, e in zip(found, WRITTEN, strict=True)]
    assert 0 < sum(parsed) < len(parsed)
    assert measure(WRITTEN)[0].unparsed == len(parsed) - sum(parsed)


def test_a_text_that_says_its_answer_twice_may_have_failed() -> None:
    texts = [greedy(ids(HEAD.format(example.example.messages[0].content.strip(), "")), 12) for example in WRITTEN]
    rows = [
        replace(example, pattern="(?s)(.)", answers=(text[-1],)) for text, example in zip(texts, WRITTEN, strict=True)
    ]
    by_mode = {mode: measure([replace(row, on_multiple=mode) for row in rows])[0] for mode in ("first", "last", "fail")}
    assert all(len(text) > 1 and text[-1].strip(". ") for text in texts)
    assert (by_mode["last"].value, by_mode["last"].unparsed) == (1.0, 0)
    first = [exact_match(text[0], [text[-1]]) for text in texts]
    assert by_mode["first"].value == np.mean([right for right, _ in first]) < 1
    assert (by_mode["fail"].value, by_mode["fail"].unparsed) == (0.0, len(rows))


def test_a_pattern_that_takes_for_ever_ends_in_words() -> None:
    catastrophic = r"(?s)^(.+)+\Z(?!\Z)"
    with pytest.raises(InvalidTask, match="takes too long on a text of"):
        measure([replace(example, pattern=catastrophic) for example in WRITTEN])


@pytest.mark.parametrize("token_budget", [1, 100, 100_000])
def test_the_batches_do_not_change_the_numbers(token_budget: int) -> None:
    examples = [*CHOICES, *WRITTEN]
    for row, other in zip(measure(examples), measure(examples, token_budget=token_budget), strict=True):
        assert (row.value, row.unparsed, row.interval) == (other.value, other.unparsed, other.interval)
        assert row.loss == pytest.approx(other.loss, rel=1e-5)


def test_the_order_of_the_rows_does_not_change_the_numbers() -> None:
    examples = [*CHOICES, *WRITTEN]
    for row, other in zip(measure(examples), measure(examples[::-1]), strict=True):
        assert (row.subtask, row.value, row.unparsed) == (other.subtask, other.value, other.unparsed)
        assert row.loss == pytest.approx(other.loss, rel=1e-5)


def test_evaluating_twice_gives_the_same() -> None:
    assert measure(CHOICES) == measure(CHOICES)


def test_a_models_own_sampling_settings_are_not_followed() -> None:
    plain = measure(WRITTEN)
    sampling = tiny_model(TOKENIZER, seed=3)
    sampling.generation_config.do_sample = True
    sampling.generation_config.temperature = 5.0
    sampling.generation_config.top_k = 3
    sampling.generation_config.repetition_penalty = 1.5
    assert measure(WRITTEN, model=sampling) == plain


def test_a_row_without_a_metric_has_a_loss_only() -> None:
    (row, whole) = measure([chat("x", "Add 2 and 3.", "", "5", metric="none")])
    assert row.loss is not None
    assert (row.metric, row.value, row.interval) == (whole.metric, whole.value, whole.interval) == ("none", None, None)


def test_a_task_of_different_metrics_has_no_metric_of_its_own() -> None:
    measured = measure([*CHOICES[:3], *WRITTEN[:3]])
    assert [row.metric for row in measured] == ["choice", "choice", "exact_match", "none"]
    assert measured[-1].value is None
    assert measured[-1].loss is not None


def test_a_row_cut_off_before_its_answer_has_no_loss_and_still_a_metric() -> None:
    long = choice("x", "apples " * 90, " A")
    (row, _) = measure([long], max_length=40)
    assert (row.examples, row.loss, row.loss_interval) == (1, None, None)
    assert row.value in {0.0, 1.0}
    short = choice("x", "apples", " A")
    assert measure([long, short], max_length=40)[0].loss == pytest.approx(measure([short], max_length=40)[0].loss)


def test_a_row_that_the_chat_template_refuses_is_left_out_of_the_numbers() -> None:
    tokenizer = tiny_tokenizer(
        chat_template="{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] + eos_token }}{% endfor %}"
    )
    good = choice("x", "Which?", " A")
    refused = TaskExample(
        Example(None, "test", (Message("system", "Be brief."), *good.example.messages)),
        "x",
        "choice",
        (" A", " B"),
        (" A",),
    )
    settings = {
        "template": "chat",
        "max_length": 99,
        "max_new_tokens": 4,
        "token_budget": 99,
        "bootstrap_samples": 9,
        "seed": 0,
    }
    alone, both = (evaluate(MODEL, tokenizer, rows, **settings)[0] for rows in ([good], [good, refused]))
    assert (both.examples, both.loss, both.value) == (2, alone.loss, alone.value)


def test_a_diverged_model_is_an_error_and_not_a_number() -> None:
    broken = tiny_model(TOKENIZER)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(NotFinite, match="11 of 11"):
        measure(CHOICES, model=broken)


@pytest.mark.parametrize("token_budget", [60, 100_000])
def test_progress_counts_up_to_the_work_there_is(token_budget: int) -> None:
    examples = [*CHOICES, *WRITTEN, chat("x", "apples " * 90, "", "5", metric="exact_match", answers=("5",))]
    seen: list[int] = []
    measure(examples, token_budget=token_budget, max_length=60, on_progress=seen.append)
    assert seen[-1] == work(examples) == 2 * len(examples)
    assert all(first <= second for first, second in pairwise(seen))


def test_no_rows_measure_nothing() -> None:
    assert measure([]) == []


def test_the_first_rows_of_each_subtask_are_kept() -> None:
    assert first_rows(CHOICES, 2) == [CHOICES[0], CHOICES[1], CHOICES[2], CHOICES[3]]
    assert first_rows(CHOICES, None) == CHOICES


def test_an_adapter_on_the_model_is_measured_with_it() -> None:
    model = tiny_model(TOKENIZER, seed=3)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    expected = [measure(rows)[0] for rows in (CHOICES, WRITTEN)]
    assert measure(CHOICES, model=adapted)[0].loss == pytest.approx(expected[0].loss, rel=1e-6)  # B is zero at first
    assert measure(WRITTEN, model=adapted)[0].value == expected[1].value
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    assert abs(measure(CHOICES, model=adapted)[0].loss - expected[0].loss) > 1e-3


def test_training_mode_and_dropout_do_not_reach_the_numbers() -> None:
    model = tiny_model(TOKENIZER, seed=3, attention_dropout=0.5)
    model.train()
    assert measure(CHOICES, model=model)[0].loss == pytest.approx(measure(CHOICES)[0].loss)


FOLDERS = {"scienceqa": "raw/scienceqa", "scienceqa-written": "raw/scienceqa"}


@pytest.mark.parametrize("kind", ["mmlu", "bbh", "tydiqa", "gsm8k", "scienceqa", "scienceqa-written"])
def test_real_tasks_are_measured_in_every_subtask(kind: str, shared_data: Path) -> None:
    test = first_rows(readers()[kind].read(shared_data / FOLDERS.get(kind, f"eval/{kind}")).test, 2)
    *parts, whole = measure(test, max_length=16_384, max_new_tokens=4, token_budget=16_384)
    assert [row.subtask for row in parts] == sorted({row.subtask for row in test})
    assert [row.examples for row in parts] == [2] * len(parts)
    assert all(row.loss and 0 < row.loss < 20 and row.value is not None for row in [*parts, whole])
