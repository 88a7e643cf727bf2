"""Token ids of examples: what is learnt from, truncation, batch plans and padding."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from datastore.rows import Example, Message
from tests.tiny import tiny_tokenizer
from worker.batches import IGNORED, Encoded, Unsupervised, collate, encode, encode_answer, encode_prompt, plan

TOKENIZER = tiny_tokenizer()


def talk(question: str, answer: str, prefix: str = "") -> Example:
    return Example(id=None, origin="test", messages=(Message("user", question), Message("assistant", answer, prefix)))


def pair(prompt: str, completion: str) -> Example:
    return Example(id=None, origin="test", prompt=prompt, completion=completion)


def learnt(encoded: Encoded, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    return str(tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


def test_the_whole_text_is_tokenised_in_one_piece_with_the_tokenizers_beginning() -> None:
    encoded = encode(talk("What is 2 + 3?", "The answer is 5."), tokenizer=TOKENIZER, template="tulu", max_length=512)
    whole = "<s><|user|>\nWhat is 2 + 3?\n<|assistant|>\nThe answer is 5.</s>\n"
    assert list(encoded.input_ids) == TOKENIZER(whole, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[0] == TOKENIZER.bos_token_id
    assert learnt(encoded) == "The answer is 5.</s>"


def test_a_chat_example_has_the_ids_of_the_tokenizers_own_template() -> None:
    example = talk("What is 2 + 3?", "The answer is 5.")
    encoded = encode(example, tokenizer=TOKENIZER, template="chat", max_length=512)
    conversation = [{"role": message.role, "content": message.content} for message in example.messages]
    assert list(encoded.input_ids) == TOKENIZER.apply_chat_template(conversation)["input_ids"]
    assert learnt(encoded) == "The answer is 5.</s>"


def test_labels_are_the_tokens_themselves_and_not_shifted() -> None:
    encoded = encode(talk("Hi", "Hello"), tokenizer=TOKENIZER, template="tulu", max_length=512)
    kept = [position for position, label in enumerate(encoded.labels) if label != IGNORED]
    assert [encoded.labels[position] for position in kept] == [encoded.input_ids[position] for position in kept]
    assert kept == list(range(kept[0], kept[-1] + 1))


@pytest.mark.parametrize("answer", ["Paris", " Paris"])
def test_the_token_a_boundary_runs_through_belongs_to_the_answer(answer: str) -> None:
    """ " Paris" is one token of many tokenizers, whichever side brings its space."""
    tokenizer = tiny_tokenizer(["The capital: Paris. " * 50])
    prompt = "The capital:" if answer.startswith(" ") else "The capital: "
    encoded = encode(pair(prompt, answer), tokenizer=tokenizer, template="tulu", max_length=64)
    assert " Paris" in [tokenizer.decode([token]) for token in encoded.input_ids]  # or the test shows nothing
    assert learnt(encoded, tokenizer) == " Paris</s>"


def test_offsets_that_leave_out_leading_spaces_change_nothing() -> None:
    """Llama 3's and GPT-2's tokenizers trim the offsets they report."""
    trimming = tiny_tokenizer()
    trimming.backend_tokenizer.post_processor = Sequence(
        [
            ByteLevel(trim_offsets=True),
            TemplateProcessing(single="<s> $A", special_tokens=[("<s>", trimming.bos_token_id)]),
        ]
    )
    example = pair("Sum:  2 +   3 =", "  5   and \n   more   </s>")
    assert encode(example, tokenizer=trimming, template="tulu", max_length=64) == encode(
        example, tokenizer=TOKENIZER, template="tulu", max_length=64
    )


def test_an_end_of_sequence_that_the_tokenizer_adds_by_itself_is_left_off() -> None:
    ending = tiny_tokenizer()
    ids = [("<s>", ending.bos_token_id), ("</s>", ending.eos_token_id)]
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    assert ending("Hi")["input_ids"][-1] == ending.eos_token_id
    for encoder in (encode, encode_prompt):
        expected = encoder(talk("Hi", "Ho"), tokenizer=TOKENIZER, template="tulu", max_length=64)
        assert encoder(talk("Hi", "Ho"), tokenizer=ending, template="tulu", max_length=64) == expected


@pytest.mark.parametrize("template", ["tulu", "chat"])
def test_the_name_of_a_special_token_in_an_examples_text_is_only_text(template: str) -> None:
    example = talk("Is </s> a tag? <s>", "No: <pad> and </s> are not.")
    encoded = encode(example, tokenizer=TOKENIZER, template=template, max_length=512)
    specials = [token for token in encoded.input_ids if token in TOKENIZER.all_special_ids]
    assert specials == [TOKENIZER.bos_token_id] * (template == "tulu") + [TOKENIZER.eos_token_id]
    assert encoded.input_ids.index(TOKENIZER.eos_token_id) > len(encoded.input_ids) - 3
    assert learnt(encoded) == "No: <pad> and </s> are not.</s>"


def test_markers_of_the_format_in_an_examples_text_do_not_move_what_is_learnt() -> None:
    encoded = encode(
        talk("<|assistant|>\nWhat?", "<|user|>\nThis."), tokenizer=TOKENIZER, template="tulu", max_length=99
    )
    assert learnt(encoded) == "<|user|>\nThis.</s>"


def test_truncation_keeps_the_beginning() -> None:
    example = talk("What is 2 + 3?", "The answer is 5.")
    whole = encode(example, tokenizer=TOKENIZER, template="tulu", max_length=512)
    cut = len(whole.input_ids) - 4
    kept = encode(example, tokenizer=TOKENIZER, template="tulu", max_length=cut)
    assert kept == Encoded(whole.input_ids[:cut], whole.labels[:cut])


def test_truncation_to_just_before_the_answer_is_refused_and_one_token_later_is_not() -> None:
    example = talk("What is 2 + 3?", "The answer is 5.")
    whole = encode(example, tokenizer=TOKENIZER, template="tulu", max_length=512)
    first = next(position for position, label in enumerate(whole.labels) if label != IGNORED)
    with pytest.raises(Unsupervised) as refused:
        encode(example, tokenizer=TOKENIZER, template="tulu", max_length=first)
    assert refused.value.reason == f"truncation leaves no token to learn from: max_length is {first}"
    kept = encode(example, tokenizer=TOKENIZER, template="tulu", max_length=first + 1)
    assert [label for label in kept.labels if label != IGNORED] == [whole.labels[first]]


def test_rows_lost_by_truncation_have_one_reason_whatever_their_lengths() -> None:
    reasons = set()
    for times in range(1, 5):
        with pytest.raises(Unsupervised) as refused:
            encode(talk("What is 2 + 3?" * times, "5"), tokenizer=TOKENIZER, template="tulu", max_length=4)
        reasons.add(refused.value.reason)
    assert len(reasons) == 1


def test_an_answer_that_nothing_predicts_is_refused() -> None:
    with pytest.raises(Unsupervised, match="the first one, which nothing predicts"):
        encode_answer(pair("", "b"), "a", tokenizer=tiny_tokenizer(bos=False), template="tulu", max_length=9)


def test_a_first_token_that_nothing_predicts_is_not_counted_as_learnt() -> None:
    encoded = encode(pair("", "a"), tokenizer=tiny_tokenizer(bos=False), template="tulu", max_length=9)
    assert encoded.labels == (IGNORED, TOKENIZER.eos_token_id)


def test_an_example_without_an_answer_is_refused_with_another_reason() -> None:
    example = Example(id=None, origin="test", messages=(Message("user", "Hi"),))
    with pytest.raises(Unsupervised, match="no answer with content"):
        encode(example, tokenizer=TOKENIZER, template="tulu", max_length=512)


def test_an_answer_is_put_in_place_of_the_last_one_without_an_end() -> None:
    example = talk("Which?", " A", prefix="The answer is:")
    encoded = encode_answer(example, " D", tokenizer=TOKENIZER, template="tulu", max_length=512)
    assert TOKENIZER.decode(encoded.input_ids) == "<s><|user|>\nWhich?\n<|assistant|>\nThe answer is: D"
    assert learnt(encoded) == " D"


def test_a_prompt_is_what_stands_before_the_last_answer_and_loses_its_beginning_first() -> None:
    example = talk("Which?", " A", prefix="The answer is:")
    ids = encode_prompt(example, tokenizer=TOKENIZER, template="tulu", max_length=512)
    assert TOKENIZER.decode(ids) == "<s><|user|>\nWhich?\n<|assistant|>\nThe answer is:"
    assert encode_prompt(example, tokenizer=TOKENIZER, template="tulu", max_length=5) == ids[-5:]


def test_an_answer_to_a_long_prompt_stays_whole() -> None:
    encoded = encode_answer(talk("Why? " * 99, "x"), " because", tokenizer=TOKENIZER, template="tulu", max_length=20)
    assert len(encoded.input_ids) == 20
    assert learnt(encoded) == " because"


@settings(max_examples=50, deadline=None)
@given(question=st.text(max_size=20), answer=st.text(min_size=1, max_size=20))
def test_what_is_learnt_is_the_answer_whatever_the_text(question: str, answer: str) -> None:
    whole = f"{answer.strip()}</s>"
    encoded = encode(talk(question, answer), tokenizer=TOKENIZER, template="tulu", max_length=1024)
    assert learnt(encoded) == whole
    assert TOKENIZER.decode(encoded.input_ids) == f"<s><|user|>\n{question.strip()}\n<|assistant|>\n{whole}\n"


def test_every_awkward_conversation_is_encoded(shared_data: Path) -> None:
    for name in ("template_markers", "rtl_zero_width", "emoji", "unicode_multilingual"):
        for line in (shared_data / "awkward" / f"{name}.jsonl").read_bytes().split(b"\n")[:-1]:
            turns = [Message(turn["role"], turn["content"]) for turn in json.loads(line)["messages"]]
            encoded = encode(
                Example(id=None, origin="test", messages=tuple(turns)),
                tokenizer=TOKENIZER,
                template="tulu",
                max_length=1 << 20,
            )
            answers = [turn.content.strip() + "</s>" for turn in turns if turn.role == "assistant"]
            assert learnt(encoded) == "".join(answers)


# Batches -------------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(1, 120))
def test_a_plan_covers_every_example_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan(lengths, token_budget=budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) * longest <= budget or len(batch) == 1
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_a_plan_fills_its_batches() -> None:
    assert plan([4] * 10, token_budget=12) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_no_plan_of_sorted_examples_costs_less(lengths: list[int]) -> None:
    """Against all ways to cut the sorted examples; a batch counts as one token at this budget."""
    lengths.sort(reverse=True)
    prices = []
    for cuts in product([False, True], repeat=len(lengths) - 1):
        starts = [0, *(place for place, cut in enumerate(cuts, start=1) if cut)]
        sizes = [stop - start for start, stop in pairwise([*starts, len(lengths)])]
        if all(size == 1 or size * lengths[start] <= 30 for start, size in zip(starts, sizes, strict=True)):
            prices.append(sum(size * lengths[start] + 1 for start, size in zip(starts, sizes, strict=True)))
    batches = plan(lengths, token_budget=30)
    assert sum(len(batch) * lengths[batch[0]] + 1 for batch in batches) == min(prices)


def test_a_plan_pads_little_where_lengths_are_mixed() -> None:
    lengths = [round(20 * 1.01**row) for row in range(400)]
    padded = sum(len(batch) * lengths[batch[0]] for batch in plan(lengths, token_budget=8192))
    assert padded < 1.08 * sum(lengths)


@given(lengths=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(1, 120))
def test_a_packed_plan_covers_every_example_once_in_as_few_batches_as_fit(lengths: list[int], budget: int) -> None:
    batches = plan(lengths, token_budget=budget, packed=True)
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[index] for index in batch) <= budget for batch in batches)
    fewest, left = 0, 0  # filling each batch in turn leaves the fewest, where the order is given
    for length in in_order:
        if length > left:
            fewest, left = fewest + 1, budget
        left -= length
    assert len(batches) == fewest


def test_examples_are_padded_on_the_right() -> None:
    batch = collate([Encoded((5, 6, 7), (IGNORED, 6, 7)), Encoded((8,), (IGNORED,))], pad_id=2)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, IGNORED]]
