"""Chat formats: an example as text, and which parts of that text are learnt from.

`tulu` is LESS's: `<|system|>\\n…\\n`, `<|user|>\\n…\\n`, `<|assistant|>\\n…{eos}\\n`, contents stripped, loss on the
assistant's text and its eos. Tool turns are written alike, as `<|tool|>\\n…\\n`, and not learnt from. A turn's `prefix`
is written before its content and not learnt from; content after a prefix keeps the white space it begins with.

`chat` is the tokenizer's own template. Where the contents lie in its text is found by rendering the conversation a
second time with placeholders for contents; that costs one more rendering (about 0.1 ms), and it also works where a
template treats a conversation's last turn differently, as Qwen3's does, so that a conversation's beginning is not the
beginning of its text. Learnt from: the assistant's text and the token that ends its turn. Dates in a template are
pinned, or a feature would depend on the day it was computed.

Prompt and completion are text as it stands: no format is put around them, whichever is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import jinja2

from datastore.rows import Example, Message

if TYPE_CHECKING:  # the gradient engine imports without pydantic
    from gradstore.types import TemplateName
    from transformers import PreTrainedTokenizerBase

DATE = "26 Jul 2024"  # what templates that name today's date are told; Llama 3's own choice where it knows none
_PINNED_CLOCK = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}"


class Unsupervised(ValueError):
    """The example leaves nothing to learn from; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NoChatTemplate(ValueError):
    """The tokenizer has no chat template, so `template=chat` cannot be used with this model at all."""


@dataclass(frozen=True)
class Segment:
    """A stretch of an example's text."""

    text: str
    supervised: bool = False
    """Whether its tokens are learnt from."""
    verbatim: bool = False
    """Whether it is the example's own text, in which the name of a special token is only text."""


def render(example: Example, template: TemplateName, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Write an example as text; joined, the segments are that text.

    Raises NoChatTemplate, and Unsupervised where the chat template refuses the conversation or changes its contents.
    """
    segments: Iterable[Segment]
    if not example.messages:
        segments = _plain(example, tokenizer)
    elif template == "tulu":
        segments = _tulu(example.messages, tokenizer)
    else:
        segments = _chat(example.messages, tokenizer)
    return [segment for segment in segments if segment.text]


def prompt(segments: Sequence[Segment]) -> list[Segment]:
    """Take what stands before the last answer: the text from which a model has to give that answer itself."""
    end = len(segments)
    while end and not segments[end - 1].supervised:
        end -= 1
    while end and segments[end - 1].supervised:
        end -= 1
    return list(segments[:end])


def wants_special_tokens(example: Example, template: TemplateName) -> bool:
    """Tell whether the tokenizer shall add its beginning of sequence; a chat template writes that itself."""
    return template == "tulu" or not example.messages


@lru_cache(maxsize=4)  # tokenizers with thousands of added tokens take milliseconds to list them
def special_names(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Match the name of a special token: text that the tokenizer reads as one token wherever it stands."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _any_of(added | set(tokenizer.all_special_tokens))


@lru_cache(maxsize=4)
def _turn_ends(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Match a token that may end a turn, which need not be declared special, and white space before it."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return re.compile(rf"\s*(?:{_any_of({token for token in added if not token.isspace()}).pattern})")


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


# Prompt and completion, and tulu ------------------------------------------------------------------------------------


def _plain(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Segment]:
    question, answer = example.prompt or "", example.completion or ""
    eos = tokenizer.eos_token or ""
    if question and not question[-1].isspace() and not answer[:1].isspace():
        answer = f" {answer}"
    yield Segment(question, verbatim=True)
    yield Segment(answer.removesuffix(eos), supervised=True, verbatim=True)  # older files end their rows themselves
    yield Segment(eos, supervised=True)


def _tulu(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Iterator[Segment]:
    for message in messages:
        learnt = message.role == "assistant"
        yield Segment(f"<|{message.role}|>\n")
        yield Segment(message.prefix.lstrip(), verbatim=True)
        yield Segment(_stripped(message), supervised=learnt, verbatim=True)
        if learnt:
            yield Segment(tokenizer.eos_token or "", supervised=True)
        yield Segment("\n")


def _stripped(message: Message) -> str:
    return message.content.rstrip() if message.prefix else message.content.strip()


# The tokenizer's own template ---------------------------------------------------------------------------------------


def _chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    template = _template(tokenizer)
    text = _apply(template, tokenizer, [message.prefix + message.content for message in messages], messages)
    frame, order = _frame(template, tokenizer, messages)
    treatments: list[Callable[[Message], str]] = [lambda message: message.content, _stripped]
    for treat in treatments:  # templates either keep contents as they are or trim them
        contents = [treat(messages[position]) for position in order]
        if "".join(_alternate(frame, contents)) == text:
            return _segments(frame, contents, [messages[position] for position in order], tokenizer)
    raise Unsupervised("the tokenizer's chat template changes the text of this conversation: use template=tulu")


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise NoChatTemplate(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'!r} has no chat template: use template=tulu"
        )
    template: str = tokenizer.get_chat_template()
    return _PINNED_CLOCK + template if "strftime_now" in template else template


def _apply(
    template: str, tokenizer: PreTrainedTokenizerBase, contents: Sequence[str], messages: Sequence[Message]
) -> str:
    conversation = [
        {"role": message.role, "content": content} for message, content in zip(messages, contents, strict=True)
    ]
    try:
        text = tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, date_string=DATE, enable_thinking=False
        )
    except jinja2.TemplateError as error:
        raise Unsupervised(f"the tokenizer's chat template refuses the conversation: {error}") from error
    return str(text)


def _frame(
    template: str, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[str], list[int]]:
    """Find the template's own text around the contents, and the messages' positions in the order it puts them.

    The placeholders are two private-use characters around a number; a conversation that holds such a thing is refused.
    """
    if any(re.search("\ue000[0-9]+\ue001", message.prefix + message.content) for message in messages):
        raise Unsupervised("the text holds the private-use characters U+E000 and U+E001: use template=tulu")
    contents = [f"{message.prefix}\ue000{position}\ue001" for position, message in enumerate(messages)]
    parts = re.split("\ue000([0-9]+)\ue001", _apply(template, tokenizer, contents, messages))
    frame, order = parts[0::2], [int(position) for position in parts[1::2]]
    answers = {position for position, message in enumerate(messages) if message.role == "assistant"}
    if len(set(order)) != len(order) or not answers <= set(order):
        raise Unsupervised("the tokenizer's chat template leaves out or repeats a turn: use template=tulu")
    return frame, order


def _alternate(frame: Sequence[str], contents: Sequence[str]) -> Iterator[str]:
    for around, content in zip(frame, contents, strict=False):
        yield around
        yield content
    yield frame[-1]


def _segments(
    frame: Sequence[str], contents: Sequence[str], messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """Mark the contents of assistant turns, each with the token that ends its turn, as learnt from."""
    segments = [Segment(frame[0])]
    for content, message, after in zip(contents, messages, frame[1:], strict=True):
        learnt = message.role == "assistant"
        end = _turn_ends(tokenizer).match(after) if learnt else None
        cut = end.end() if end else 0
        segments.append(Segment(content, supervised=learnt, verbatim=True))
        segments.append(Segment(after[:cut], supervised=True))
        segments.append(Segment(after[cut:]))
    return segments
