"""Examples as token ids: what is learnt from, which examples share a batch, and the batch's tensors.

The text of an example is tokenised in one piece, as at training time, and a token is learnt from where any of its
characters is: the token that a boundary runs through (" Paris" after "Answer: ") carries the answer. The tokenizer adds
its beginning of sequence where it does so by default; whatever it would add at the end is left off, since templates
write their own.

The name of a special token inside an example's own text ("</s>" in a question about HTML) is tokenised as text. Only a
text that holds such a name is tokenised in several pieces, cut where the example's own text begins and ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from datastore.rows import Example
from worker.templates import Segment, Unsupervised, prompt, render, special_names, wants_special_tokens

if TYPE_CHECKING:  # collate imports torch itself: planning needs none
    from gradstore.types import TemplateName
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED", "Batch", "Encoded", "Unsupervised", "collate", "encode", "encode_answer", "encode_prompt", "plan",
    "slices",
]  # fmt: skip

IGNORED = -100
"""Label of a token that is not learnt from."""

BATCH_PRICE = 32  # a batch costs as much as this part of the token budget, beside its tokens


@dataclass(frozen=True)
class Encoded:
    """An example as the model gets it."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token where it is learnt from, else IGNORED; not shifted, and IGNORED at 0, which nothing predicts."""


@dataclass(frozen=True)
class Batch:
    """Examples of one forward pass, padded on the right: three int64 tensors (examples, tokens)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def encode(example: Example, *, tokenizer: PreTrainedTokenizerBase, template: TemplateName, max_length: int) -> Encoded:
    """Tokenise an example and keep its first `max_length` tokens.

    Raises Unsupervised where none of them is learnt from, and NoChatTemplate.
    """
    segments = render(example, template, tokenizer)
    ids, learnt = _tokenise(segments, tokenizer, special=wants_special_tokens(example, template))
    _refuse_nothing_learnt(learnt, max_length=max_length)
    return _encoded(ids[:max_length], learnt[:max_length])


def encode_answer(
    example: Example, answer: str, *, tokenizer: PreTrainedTokenizerBase, template: TemplateName, max_length: int
) -> Encoded:
    """Tokenise the text before the example's last answer with `answer` in its place, no end of sequence after it.

    The last `max_length` tokens are kept, so that what is lost of a long prompt is its beginning. Raises Unsupervised
    where the answer is empty.
    """
    segments = [*prompt(render(example, template, tokenizer)), Segment(answer, supervised=True, verbatim=True)]
    ids, learnt = _tokenise(segments, tokenizer, special=wants_special_tokens(example, template))
    _refuse_nothing_learnt(learnt, max_length=len(ids))
    return _encoded(ids[-max_length:], learnt[-max_length:])


def encode_prompt(
    example: Example, *, tokenizer: PreTrainedTokenizerBase, template: TemplateName, max_length: int
) -> tuple[int, ...]:
    """Tokenise the text before the example's last answer, for a model to go on from; the last `max_length` tokens."""
    segments = prompt(render(example, template, tokenizer))
    ids, _ = _tokenise(segments, tokenizer, special=wants_special_tokens(example, template))
    return tuple(ids[-max_length:])


def plan(lengths: Sequence[int], *, token_budget: int, packed: bool = False) -> list[list[int]]:
    """Group indices into batches of at most `token_budget` tokens with their padding, longest first.

    Examples of like length share a batch. Of all such plans this is the one with the least tokens, a batch itself
    counting as much as 1/32 of the budget: full batches of mixed lengths pad a lot, and many small ones cost their
    calls. A `packed` batch has no padding, so there the fewest batches win. An example longer than the budget is a
    batch of its own.

    >>> plan([3, 9, 2, 3], token_budget=9)
    [[1], [0, 3, 2]]
    >>> plan([3, 9, 2, 4, 3], token_budget=12, packed=True)
    [[1], [3, 0, 4, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    stops = _best_stops([lengths[index] for index in order], token_budget=token_budget, packed=packed)
    batches = []
    start = 0
    while start < len(order):
        batches.append(order[start : stops[start]])
        start = stops[start]
    return batches


def _best_stops(lengths: Sequence[int], *, token_budget: int, packed: bool) -> list[int]:
    """Return where the batch that starts at each place stops, from lengths that do not grow (dynamic programming)."""
    count = len(lengths)
    ends = np.cumsum([0, *lengths])
    stops = [0] * count
    rest = np.zeros(count + 1, dtype=np.int64)  # the price of all from a place on
    for start in reversed(range(count)):
        if packed:
            most = int(np.searchsorted(ends, ends[start] + token_budget, side="right")) - 1 - start
        else:
            most = token_budget // max(1, lengths[start])
        sizes = np.arange(max(1, min(count - start, most)), 0, -1)  # the largest first: it wins at equal prices
        tokens = ends[start + sizes] - ends[start] if packed else sizes * lengths[start]
        prices = tokens + rest[start + sizes]
        best = int(prices.argmin())
        stops[start] = start + int(sizes[best])
        rest[start] = prices[best] + max(1, token_budget // BATCH_PRICE)
    return stops


def collate(encoded: Sequence[Encoded], *, pad_id: int) -> Batch:
    """Pad examples on the right to the longest of them."""
    import torch  # noqa: PLC0415  # a plan is made, and a cost estimated, without torch

    width = max(len(row.input_ids) for row in encoded)

    def padded(rows: Iterator[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)

    return Batch(
        input_ids=padded((row.input_ids for row in encoded), pad_id),
        attention_mask=padded(([1] * len(row.input_ids) for row in encoded), 0),
        labels=padded((row.labels for row in encoded), IGNORED),
    )


def slices(examples: int, size: int, *, elements: int) -> Iterator[slice]:
    """Cut `examples` rows of `size` numbers into slices of at most `elements` numbers, at least one row each.

    >>> list(slices(3, 10, elements=25))
    [slice(0, 2, None), slice(2, 3, None)]
    """
    at_once = max(1, elements // max(1, size))
    for start in range(0, examples, at_once):
        yield slice(start, min(start + at_once, examples))


def _encoded(ids: Sequence[int], learnt: Sequence[bool]) -> Encoded:
    labels = [token if keep else IGNORED for token, keep in zip(ids, learnt, strict=True)]
    return Encoded(input_ids=tuple(ids), labels=(IGNORED, *labels[1:]))


def _refuse_nothing_learnt(learnt: Sequence[bool], *, max_length: int) -> None:
    if any(learnt[1:max_length]):
        return
    if not any(learnt):
        raise Unsupervised("there is no text to learn from: no answer with content")
    if not any(learnt[1:]):
        raise Unsupervised("the only token to learn from is the first one, which nothing predicts")
    # Nothing of this row alone: rows are counted by their reason.
    raise Unsupervised(f"truncation leaves no token to learn from: max_length is {max_length:,}")


# Tokens and their characters ----------------------------------------------------------------------------------------


def _tokenise(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> tuple[list[int], list[bool]]:
    """Tokenise the joined segments: token ids, and whether each is learnt from."""
    ids: list[int] = []
    learnt: list[bool] = []
    for number, piece in enumerate(_pieces(segments, tokenizer)):
        more, flags = _tokenise_piece(piece, tokenizer, special=special and number == 0)
        ids += more
        learnt += flags
    return ids, learnt


def _pieces(segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase) -> list[list[Segment]]:
    """Cut the text for tokenisation: not at all, unless a special token's name stands in the example's own text."""
    name = special_names(tokenizer)
    if not any(name.search(segment.text) for segment in segments if segment.verbatim):
        return [[Segment(segment.text, segment.supervised) for segment in segments]]
    return [list(run) for _, run in groupby(segments, key=lambda segment: segment.verbatim)]


def _tokenise_piece(
    piece: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> tuple[list[int], list[bool]]:
    marks = b"".join(bytes([segment.supervised]) * len(segment.text) for segment in piece)
    encoding = tokenizer(
        "".join(segment.text for segment in piece),
        add_special_tokens=special,
        split_special_tokens=piece[0].verbatim,
        return_offsets_mapping=True,
        verbose=False,  # no warning about the model's longest sequence: what is too long is cut off here
    )
    ids: list[int] = encoding["input_ids"]
    sources: list[int | None] = encoding.sequence_ids(0)
    while sources and sources[-1] is None:  # an end of sequence that the tokenizer adds
        sources.pop()
    learnt, reached = [], 0
    for source, (start, end) in zip(sources, encoding["offset_mapping"], strict=False):
        # byte-level offsets leave out the space that a token begins with, and several tokens may share one character
        begin = min(start, reached)
        learnt.append(source is not None and marks.find(1, begin, max(end, begin + 1)) >= 0)
        reached = max(reached, end)
    return ids[: len(learnt)], learnt
