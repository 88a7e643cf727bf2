"""Chat formats: the text of an example, and which parts of it are learnt from."""

from __future__ import annotations

import datetime as dt

import pytest

from datastore.rows import Example, Message
from tests.tiny import tiny_tokenizer
from worker.templates import NoChatTemplate, Segment, Unsupervised, prompt, render

TALK = (
    Message("system", "  Be brief.\n"),
    Message("user", "Hi "),
    Message("assistant", "\nHello!  "),
    Message("user", "And now?"),
    Message("assistant", "Bye."),
)
THINKING = (  # as Qwen3's: only the last turn is written with its (here empty) thoughts
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + eos_token + '\n' }}{% endfor %}"
)
TRIMMING = (  # as Llama 3's
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | trim + eos_token }}{% endfor %}"
)
SYSTEM_INSIDE = (  # as Mistral's: the system text goes into the last user turn
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.index0 == messages|length - 2 and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def talk(*messages: Message) -> Example:
    return Example(id=None, origin="test", messages=messages)


def pair(prompt: str, completion: str) -> Example:
    return Example(id=None, origin="test", prompt=prompt, completion=completion)


def text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def learnt(segments: list[Segment]) -> list[str]:
    """The stretches learnt from, neighbours joined."""
    parts: list[str] = []
    previous = False
    for segment in segments:
        if segment.supervised and previous:
            parts[-1] += segment.text
        elif segment.supervised:
            parts.append(segment.text)
        previous = segment.supervised
    return parts


def test_tulu_strips_contents_and_learns_from_answers_and_their_eos() -> None:
    segments = render(talk(*TALK), "tulu", tiny_tokenizer())
    assert text(segments) == (
        "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello!</s>\n<|user|>\nAnd now?\n<|assistant|>\nBye.</s>\n"
    )
    assert learnt(segments) == ["Hello!</s>", "Bye.</s>"]


def test_tulu_keeps_the_space_between_a_prefix_and_the_answer() -> None:
    question = Message("user", "1 + 1?\nAnswer:")
    segments = render(talk(question, Message("assistant", " B ", prefix="The answer is:")), "tulu", tiny_tokenizer())
    assert text(segments) == "<|user|>\n1 + 1?\nAnswer:\n<|assistant|>\nThe answer is: B</s>\n"
    assert learnt(segments) == [" B</s>"]


def test_tulu_shows_tool_turns_and_does_not_learn_from_them() -> None:
    segments = render(talk(Message("tool", "42"), Message("assistant", "It is 42.")), "tulu", tiny_tokenizer())
    assert text(segments) == "<|tool|>\n42\n<|assistant|>\nIt is 42.</s>\n"
    assert learnt(segments) == ["It is 42.</s>"]


@pytest.mark.parametrize(
    ("question", "answer", "whole", "part"),
    [
        ("2 + 2 =", "4", "2 + 2 = 4</s>", " 4</s>"),
        ("2 + 2 =\n", "4", "2 + 2 =\n4</s>", "4</s>"),
        ("2 + 2 =", "\t4", "2 + 2 =\t4</s>", "\t4</s>"),
        ("", "4", "4</s>", "4</s>"),
        ("2 + 2 =", " 4</s>", "2 + 2 = 4</s>", " 4</s>"),
    ],
)
def test_prompt_and_completion_are_joined_with_a_space_unless_one_brings_it(
    question: str, answer: str, whole: str, part: str
) -> None:
    for template in ("tulu", "chat"):
        segments = render(pair(question, answer), template, tiny_tokenizer())
        assert (text(segments), learnt(segments)) == (whole, [part])


def test_chat_writes_what_the_tokenizers_template_writes() -> None:
    tokenizer = tiny_tokenizer()
    segments = render(talk(*TALK), "chat", tokenizer)
    conversation = [{"role": message.role, "content": message.content} for message in TALK]
    assert text(segments) == tokenizer.apply_chat_template(conversation, tokenize=False)
    assert learnt(segments) == ["\nHello!  </s>", "Bye.</s>"]


def test_chat_finds_answers_where_the_last_turn_is_written_differently() -> None:
    segments = render(talk(*TALK[1:]), "chat", tiny_tokenizer(chat_template=THINKING))
    assert text(segments) == (
        "<|user|>Hi </s>\n<|assistant|>\nHello!  </s>\n<|user|>And now?</s>\n<|assistant|><think></think>Bye.</s>\n"
    )
    assert learnt(segments) == ["\nHello!  </s>", "Bye.</s>"]


def test_chat_finds_answers_that_the_template_trims() -> None:
    segments = render(talk(*TALK), "chat", tiny_tokenizer(chat_template=TRIMMING))
    assert text(segments) == (
        "[system]Be brief.</s>[user]Hi</s>[assistant]Hello!</s>[user]And now?</s>[assistant]Bye.</s>"
    )
    assert learnt(segments) == ["Hello!</s>", "Bye.</s>"]


def test_chat_finds_answers_where_turns_change_places() -> None:
    messages = (Message("system", "Be brief."), *TALK[1:])
    segments = render(talk(*messages), "chat", tiny_tokenizer(chat_template=SYSTEM_INSIDE))
    assert text(segments) == "[INST] Hi [/INST] \nHello!   </s>[INST] Be brief.\n\nAnd now?[/INST] Bye. </s>"
    assert learnt(segments) == ["\nHello!   </s>", "Bye. </s>"]


def test_chat_finds_an_answer_that_is_also_a_word_of_the_template() -> None:
    segments = render(talk(Message("user", "user"), Message("assistant", "assistant")), "chat", tiny_tokenizer())
    assert text(segments) == "<|user|>user\n<|assistant|>assistant</s>\n"
    assert learnt(segments) == ["assistant</s>"]


def test_chat_does_not_learn_from_a_prefix() -> None:
    example = talk(Message("user", "1 + 1?"), Message("assistant", " B", prefix="The answer is:"))
    for template in (None, TRIMMING, THINKING):
        options = {} if template is None else {"chat_template": template}
        assert learnt(render(example, "chat", tiny_tokenizer(**options))) == [" B</s>"]


def test_a_date_in_a_chat_template_does_not_depend_on_the_day() -> None:
    dated = "{{ strftime_now('%Y') + '|' }}{{ date_string + '|' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rendered = text(render(talk(*TALK[1:3]), "chat", tiny_tokenizer(chat_template=dated)))
    assert rendered.startswith("26 Jul 2024|26 Jul 2024|")
    assert str(dt.datetime.now(tz=dt.UTC).year) not in rendered


def test_a_tokenizer_without_a_chat_template_is_told_apart_from_a_bad_example() -> None:
    with pytest.raises(NoChatTemplate, match="use template=tulu"):
        render(talk(*TALK), "chat", tiny_tokenizer(chat_template=None))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "changes the text"),
        ("{{ messages[0]['content'] }}", "leaves out or repeats a turn"),
        ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "leaves out or repeats a turn"),
    ],
)
def test_a_chat_template_that_does_not_keep_the_conversation_excludes_it_with_a_reason(
    template: str, reason: str
) -> None:
    with pytest.raises(Unsupervised, match=reason):
        render(talk(*TALK[1:]), "chat", tiny_tokenizer(chat_template=template))


def test_a_text_like_a_placeholder_is_refused_rather_than_misread() -> None:
    with pytest.raises(Unsupervised, match="U\\+E000"):
        render(talk(Message("user", "\ue0000\ue001"), Message("assistant", "a")), "chat", tiny_tokenizer())


@pytest.mark.parametrize("template", ["tulu", "chat"])
def test_the_prompt_ends_where_the_last_answer_begins(template: str) -> None:
    example = talk(Message("user", "1 + 1?"), Message("assistant", "2"), *TALK[3:])
    segments = render(example, template, tiny_tokenizer())
    assert text(segments) == text(prompt(segments)) + ("Bye.</s>\n")
    assert learnt(prompt(segments)) == ["2</s>"]


def test_the_prompt_of_a_pair_leaves_the_joining_space_to_the_answer() -> None:
    assert text(prompt(render(pair("2 + 2 =", "4"), "tulu", tiny_tokenizer()))) == "2 + 2 ="
