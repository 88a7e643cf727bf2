"""What a model can do on the test rows of a task: loss and metric per subtask, with confidence intervals.

Everything runs in planned batches and in exact mode. In float32 the batch plan changes a loss by rounding only; in
bfloat16 a row's neighbours may change its last digits, and with them, rarely, a generated word: the plan is a function
of the rows and the token budget, so that the same evaluation gives the same numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

import torch
from gradstore.types import Metric, TemplateName
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from datastore.errors import InvalidTask
from datastore.tasks import TaskExample
from datastore.tasks.patterns import BadPattern, Patterns
from worker.batches import (
    IGNORED,
    Encoded,
    Unsupervised,
    encode,
    encode_answer,
    encode_prompt,
    plan,
)
from worker.metrics import best_choice, bootstrap_interval, exact_match, subtask_mean, token_f1
from worker.models import use_exact_mode

TOKENS = 8192  # padded tokens of a batch; part of what makes the same evaluation give the same numbers
LEAST_TOKENS = 512  # that are tried where so many do not fit the memory
LOGIT_ELEMENTS = 1 << 26  # logits made float32 at a time: 256 MB
GENERATED: frozenset[Metric] = frozenset({"exact_match", "token_f1"})
"""Metrics of a text that the model writes itself."""


class NotFinite(ValueError):
    """The model's numbers are not numbers any more: its training diverged."""


@dataclass(frozen=True)
class Measured:
    """One subtask, or a whole task where `subtask` is None: the mean over its subtasks, each counting alike."""

    subtask: str | None
    examples: int
    loss: float | None
    """Mean cross-entropy per supervised token of an example, averaged over examples; None where no example has any."""
    loss_interval: tuple[float, float] | None
    metric: Metric
    value: float | None
    interval: tuple[float, float] | None
    unparsed: int
    """Answers in which no answer was found (exact match)."""


def first_rows(examples: Sequence[TaskExample], per_subtask: int | None) -> list[TaskExample]:
    """Keep at most the first `per_subtask` examples of each subtask; None keeps all."""
    seen: dict[str, int] = {}
    kept = []
    for example in examples:
        seen[example.subtask] = seen.get(example.subtask, 0) + 1
        if per_subtask is None or seen[example.subtask] <= per_subtask:
            kept.append(example)
    return kept


def work(examples: Sequence[TaskExample]) -> int:
    """How many passes over rows an evaluation takes: one for the loss, and one more for a metric."""
    return len(examples) + sum(example.metric != "none" for example in examples)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TaskExample],
    *,
    template: TemplateName,
    max_length: int,
    max_new_tokens: int,
    token_budget: int,
    bootstrap_samples: int,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Measure `model` on the examples of one task: a row per subtask, in order of their names, then the task's own.

    A long example is cut for the loss as in training, from the right, and left out of the loss where nothing of its
    answer is left; for the metric the beginning of its prompt is cut off instead. Answers are written greedily, at most
    `max_new_tokens` beyond `max_length`. `on_progress` gets the passes done so far, of `work(examples)`.

    Leaves the model in exact mode (no dropout). Raises NotFinite, and InvalidTask for a pattern that takes too long.
    """
    judge = _Judge(
        model, tokenizer, template, max_length, max_new_tokens, token_budget, on_progress or (lambda _: None)
    )
    use_exact_mode(model)
    with torch.inference_mode():
        losses = _finite(judge.losses(examples))
        values, unparsed = judge.values(examples)
    rows = sorted(zip(examples, losses, values, unparsed, strict=True), key=lambda row: row[0].subtask)
    parts = [_Part(name, list(group)) for name, group in groupby(rows, key=lambda row: row[0].subtask)]
    measured = [_measure(part.name, [part], bootstrap_samples, seed) for part in parts]
    return [*measured, _measure(None, parts, bootstrap_samples, seed)] if parts else []


def losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TaskExample],
    *,
    template: TemplateName,
    max_length: int,
    token_budget: int,
    check: Callable[[], None] = lambda: None,
) -> list[float | None]:
    """The loss of each example as `evaluate` measures it; None where truncation leaves nothing of its answer.

    `check` is called between batches. Leaves the model in exact mode. Raises NotFinite.
    """
    judge = _Judge(model, tokenizer, template, max_length, 0, token_budget, lambda _: check())
    use_exact_mode(model)
    with torch.inference_mode():
        return _finite(judge.losses(examples))


def values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TaskExample],
    *,
    template: TemplateName,
    max_length: int,
    max_new_tokens: int,
    token_budget: int,
    check: Callable[[], None] = lambda: None,
) -> list[float | None]:
    """The metric of each example as `evaluate` measures it; None where it has none.

    `check` is called between batches. Leaves the model in exact mode. Raises InvalidTask as there.
    """
    judge = _Judge(model, tokenizer, template, max_length, max_new_tokens, token_budget, lambda _: check())
    use_exact_mode(model)
    with torch.inference_mode():
        return judge.values(examples)[0]


def with_adapters(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TaskExample],
    *,
    adapters: Sequence[str],
    template: TemplateName,
    max_length: int,
    max_new_tokens: int,
    token_budget: int,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[float | None], list[float | None]]:
    """The loss of each example's `reasoned` form and its metric, each by the adapter of `model` that is named for it:
    rows of several adapters share batches.

    As `losses` and `values` measure them by a model that has this adapter alone, up to rounding; but a loss that is not
    finite is answered, since it is that of one adapter. `on_progress` gets the passes done so far, of `work(examples)`.
    Leaves the model in exact mode. Raises InvalidTask as `values` does.
    """
    judge = _Judge(
        cast("PreTrainedModel", model), tokenizer, template, max_length, max_new_tokens, token_budget,
        on_progress or (lambda _: None), adapters,
    )  # fmt: skip
    use_exact_mode(model)
    with torch.inference_mode():
        losses = judge.losses([replace(example, example=example.reasoned) for example in examples])
        return losses, judge.values(examples)[0]


def _finite(losses: list[float | None]) -> list[float | None]:
    """The losses, all of them finite. Raises NotFinite."""
    wrong = sum(loss is not None and not math.isfinite(loss) for loss in losses)
    if wrong:
        raise NotFinite(f"the loss of {wrong} of {len(losses)} examples is not finite: the model has diverged")
    return losses


# Numbers of a subtask ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A subtask's rows: example, loss, value of its metric, whether no answer was found."""

    name: str
    rows: list[tuple[TaskExample, float | None, float | None, bool]]

    @property
    def metric(self) -> Metric:
        return self.rows[0][0].metric

    def losses(self) -> list[float]:
        return [loss for _, loss, _, _ in self.rows if loss is not None]

    def values(self) -> list[float]:
        return [value for _, _, value, _ in self.rows if value is not None]


def _measure(name: str | None, parts: Sequence[_Part], samples: int, seed: int) -> Measured:
    metrics = {part.metric for part in parts}
    metric: Metric = metrics.pop() if len(metrics) == 1 else "none"  # a mean over different metrics means nothing
    loss, loss_interval = _mean([part.losses() for part in parts], samples, seed)
    value, interval = _mean([part.values() for part in parts] if metric != "none" else [], samples, seed)
    return Measured(
        subtask=name,
        examples=sum(len(part.rows) for part in parts),
        loss=loss,
        loss_interval=loss_interval,
        metric=metric,
        value=value,
        interval=interval,
        unparsed=sum(unparsed for part in parts for *_, unparsed in part.rows),
    )


def _mean(groups: Sequence[list[float]], samples: int, seed: int) -> tuple[float | None, tuple[float, float] | None]:
    groups = [group for group in groups if group]
    if not groups:
        return None, None
    return subtask_mean(groups), bootstrap_interval(groups, samples=samples, seed=seed)


# The model -----------------------------------------------------------------------------------------------------------


@dataclass
class _Judge:
    """A model with all that says how it is asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: TemplateName
    max_length: int
    max_new_tokens: int
    token_budget: int
    on_progress: Callable[[int], None]
    adapters: Sequence[str] | None = None
    """Which of the model's adapters answers each example; None: the model as it is."""
    done: int = 0

    def losses(self, examples: Sequence[TaskExample]) -> list[float | None]:
        """The mean loss of each example's supervised tokens; None where truncation leaves none."""
        encoded: dict[int, Encoded] = {}
        for position, example in enumerate(examples):
            try:
                encoded[position] = encode(
                    example.example, tokenizer=self.tokenizer, template=self.template, max_length=self.max_length
                )
            except Unsupervised:
                self._progress(1)
        sums = self._log_probs(
            list(encoded.values()), by=self._by(encoded), on_rows=lambda rows: self._progress(len(rows))
        )
        losses: list[float | None] = [None] * len(examples)
        for (position, row), log_prob in zip(encoded.items(), sums, strict=True):
            losses[position] = -log_prob / sum(label != IGNORED for label in row.labels)
        return losses

    def values(self, examples: Sequence[TaskExample]) -> tuple[list[float | None], list[bool]]:
        """The metric of each example, and whether no answer was found in what the model wrote."""
        values: list[float | None] = [None] * len(examples)
        unparsed = [False] * len(examples)
        asked = {
            position: prompt
            for position, example in enumerate(examples)
            if example.metric != "none" and (prompt := self._prompt(example))
        }
        choosing = [position for position in asked if examples[position].metric == "choice"]
        chosen = self._choose([examples[p] for p in choosing], by=self._by(choosing))
        for position, right in zip(choosing, chosen, strict=True):
            values[position] = float(right)
        writing = [position for position in asked if examples[position].metric in GENERATED]
        with Patterns() as patterns:
            written = self._write([asked[p] for p in writing], by=self._by(writing))
            for position, text in zip(writing, written, strict=True):
                example = examples[position]
                if example.metric == "token_f1":
                    values[position] = token_f1(text, example.answers)
                else:
                    right, found = exact_match(_answer_in(text, example, patterns), example.answers)
                    values[position], unparsed[position] = float(right), not found
        return values, unparsed

    def _prompt(self, example: TaskExample) -> tuple[int, ...]:
        """The tokens a model answers to; empty where the chat template refuses the example, or there are none."""
        try:
            prompt = encode_prompt(
                example.example, tokenizer=self.tokenizer, template=self.template, max_length=self.max_length
            )
        except Unsupervised:
            prompt = ()
        if not prompt:
            self._progress(1)
        return prompt

    def _by(self, positions: Iterable[int]) -> list[str | None]:
        """The adapters that answer the examples at these positions."""
        return [None if self.adapters is None else self.adapters[position] for position in positions]

    # Choices ----------------------------------------------------------------------------------------------------------

    def _choose(self, examples: Sequence[TaskExample], *, by: Sequence[str | None]) -> list[bool]:
        """Whether the right choice is the most probable; the sums over tokens are compared as they are."""
        asked = [(number, choice) for number, example in enumerate(examples) for choice in example.choices]
        left = Counter(number for number, _ in asked)

        def count(rows: Sequence[int]) -> None:
            left.subtract(asked[row][0] for row in rows)
            self._progress(sum(left[number] == 0 for number in {asked[row][0] for row in rows}))

        answers = [self._answer(examples[number], choice) for number, choice in asked]
        log_probs = iter(self._log_probs(answers, by=[by[number] for number, _ in asked], on_rows=count))
        best = [best_choice([next(log_probs) for _ in example.choices]) for example in examples]
        return [example.choices[choice] in example.answers for example, choice in zip(examples, best, strict=True)]

    def _answer(self, example: TaskExample, choice: str) -> Encoded:
        return encode_answer(
            example.example, choice, tokenizer=self.tokenizer, template=self.template, max_length=self.max_length
        )

    def _log_probs(
        self, rows: Sequence[Encoded], *, by: Sequence[str | None], on_rows: Callable[[list[int]], None]
    ) -> list[float]:
        """The sum of the log-probabilities of each row's supervised tokens, in the order of `rows`.

        A row's last token is only predicted, never read: rows that differ in it alone, such as the choices of MMLU,
        share one forward pass, where it is by one adapter. `on_rows` gets the positions of the rows done in each.
        """
        shared: dict[tuple[str | None, tuple[int, ...]], list[int]] = {}
        for position, (row, adapter) in enumerate(zip(rows, by, strict=True)):
            shared.setdefault((adapter, row.input_ids[:-1]), []).append(position)
        groups = list(shared.values())
        result = [0.0] * len(rows)
        for batch in plan([len(ids) for _, ids in shared], token_budget=self.token_budget):
            chosen = [groups[group] for group in batch]
            for position, value in self._score(rows, chosen, by=[by[group[0]] for group in chosen]):
                result[position] = value
            on_rows([position for group in chosen for position in group])
        return result

    def _score(
        self, rows: Sequence[Encoded], groups: Sequence[Sequence[int]], *, by: Sequence[str | None]
    ) -> Iterator[tuple[int, float]]:
        """Score the rows of `groups`, each of which is one sequence of the batch, by these adapters."""
        inputs = [rows[group[0]].input_ids[:-1] for group in groups]
        width = max(map(len, inputs))
        # padding repeats the first token: the tokenizer's own may be outside the model's vocabulary
        input_ids = torch.tensor([[*ids, *ids[:1] * (width - len(ids))] for ids in inputs])
        members = [(sequence, position) for sequence, group in enumerate(groups) for position in group]
        wanted = [
            (member, sequence * width + place, label)
            for member, (sequence, position) in enumerate(members)
            for place, label in enumerate(rows[position].labels[1:])
            if label != IGNORED
        ]
        owners, places, labels = (torch.tensor(column) for column in zip(*wanted, strict=True))
        logits = _logits_at(self.model, input_ids, places, by=by)
        sums = torch.zeros(len(members), dtype=torch.float64)
        at_once = max(1, LOGIT_ELEMENTS // logits.shape[-1])
        for start in range(0, len(places), at_once):
            part = slice(start, start + at_once)
            log_probs = logits[part].float().log_softmax(-1).gather(1, labels[part, None].to(logits.device))
            sums.index_add_(0, owners[part], log_probs[:, 0].double().cpu())
        return ((position, float(value)) for (_, position), value in zip(members, sums, strict=True))

    # Writing ----------------------------------------------------------------------------------------------------------

    def _write(self, prompts: Sequence[tuple[int, ...]], *, by: Sequence[str | None]) -> list[str]:
        """What the model writes greedily after each prompt, without special tokens."""
        before = self.done
        written = write(
            self.model,
            self.tokenizer,
            prompts,
            by=by,
            max_new_tokens=self.max_new_tokens,
            token_budget=self.token_budget,
            on_rows=lambda rows: self._progress(before + rows - self.done),
        )
        return [str(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in written]

    def _progress(self, rows: int) -> None:
        self.done += rows
        self.on_progress(self.done)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    token_budget: int,
    by: Sequence[str | None] | None = None,
    on_rows: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """The tokens that the model writes greedily after each prompt, up to its end of sequence; `on_rows` hears of rows
    that are done. `by` has the adapter of each prompt, where several are on the model.
    """
    adapters = [None] * len(prompts) if by is None else by
    greedily = _greedily(model, tokenizer, max_new_tokens)
    ends = set(greedily.eos_token_id or ())
    written: list[list[int]] = [[] for _ in prompts]
    done = 0
    for batch in plan([len(prompt) + max_new_tokens for prompt in prompts], token_budget=token_budget):
        continued = _continued(model, [prompts[p] for p in batch], greedily, by=[adapters[p] for p in batch])
        for position, tokens in zip(batch, continued, strict=True):
            end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            written[position] = tokens[: end + 1]
        done += len(batch)
        on_rows(done)
    return written


def _continued(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    greedily: GenerationConfig,
    *,
    by: Sequence[str | None],
) -> list[list[int]]:
    """What is written after each prompt of a batch; an answer that has ended is filled up."""
    width = max(map(len, prompts))
    # on the left, since the model goes on from the end
    padded = [[*prompt[:1] * (width - len(prompt)), *prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    generating: Any = model  # PreTrainedModel itself is not declared to generate
    written: Tensor = generating.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=greedily,
        **_mixed(by),
    )
    tokens: list[list[int]] = written[:, width:].tolist()
    return tokens


def _greedily(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding, whatever sampling and penalties the model's own configuration asks for."""
    own = model.generation_config.eos_token_id
    ends = {own} if isinstance(own, int) else set(own or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return GenerationConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,  # transformers' default: it warns of any other without sampling
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        pad_token_id=min(ends, default=0),  # what an answer that has ended is filled up with
        eos_token_id=sorted(ends) or None,
    )


def _answer_in(text: str, example: TaskExample, patterns: Patterns) -> str | None:
    """What the example's pattern finds: its first match unless told otherwise, since models go on to invent another
    question; without a pattern, the whole text.
    """
    if example.pattern is None:
        return text
    try:
        return patterns.find(example.pattern, text, on_multiple=example.on_multiple)
    except BadPattern as error:
        raise InvalidTask(str(error)) from error


def _mixed(by: Sequence[str | None]) -> dict[str, Any]:
    """What PEFT is told of a batch: the adapter of each row, where several are on the model."""
    return {} if None in by else {"adapter_names": list(by)}


def _logits_at(model: PreTrainedModel, input_ids: Tensor, places: Tensor, *, by: Sequence[str | None]) -> Tensor:
    """The logits (len(places), vocabulary) at places of the flattened batch, which is padded on the right.

    Where the model lets it, the output layer sees these places only: the logits of 8,192 tokens and a vocabulary of
    152K are 5 GB.
    """
    device = model.device
    with _output_at(model, places.to(device)) as reduced:
        logits: Tensor = model(input_ids=input_ids.to(device), use_cache=False, **_mixed(by)).logits
    return logits.flatten(0, 1) if reduced else logits.flatten(0, 1)[places.to(device)]


@contextmanager
def _output_at(model: PreTrainedModel, places: Tensor) -> Iterator[list[bool]]:
    """Give the output layer the hidden states at `places` only; the list is not empty once it has got them."""
    reduced: list[bool] = []

    def reduce(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        reduced.append(True)
        return (arguments[0].flatten(0, 1)[places].unsqueeze(0), *arguments[1:])

    layer = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    if not isinstance(layer, nn.Module):
        yield reduced
        return
    handle = layer.register_forward_pre_hook(reduce)
    try:
        yield reduced
    finally:
        handle.remove()
