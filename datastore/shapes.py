"""The shapes a row may have, and the example each becomes.

    {"messages": [{"role", "content"}, …]}            open-instruct, OpenAI
    {"conversations": [{"from", "value"}, …]}         ShareGPT
    {"prompt", "completion"}
    {"instruction", "input", "output"}                Alpaca; also with `answer`, or Dolly's `context` and `response`

The shape is found for every row by itself, so a file may mix them. What a trainer would take is taken, with a remark
where it is odd; a row from which nothing can be learnt, or whose meaning must be guessed, is refused.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from datastore.rows import Example, Message, Role

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Names of roles in either shape of a conversation, as OpenAI, ShareGPT's collections, Glaive and Gemini have them."""

MARKERS = re.compile(r"<\|\w+\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>|<(?:bos|eos)>")
"""Marks that templates write between turns, or that tokenizers read as special tokens."""

TEXT_PARTS = frozenset({"text", "reasoning", "thinking", "tool_call"})
"""Kinds of content parts that are text."""


class BadRow(ValueError):
    """A row that is no example; the message says why."""


def example(row: object, *, file: str) -> tuple[Example, list[str]]:
    """The example a parsed row holds, and remarks on what is odd about it; `file` names its origin if it does not.

    Raises BadRow.
    """
    if not isinstance(row, dict):
        raise BadRow(f"the row is {_kind(row)}; an object is needed")
    remarks: list[str] = []
    shape = next((read for field, read in _SHAPES if row.get(field) is not None), None)
    if shape is None:
        raise BadRow(_unknown(row))
    messages, prompt, completion = shape(row, remarks)
    _remark_on_markers([message.content for message in messages] or [prompt or "", completion or ""], remarks)
    _remark_on_fields(row, remarks)
    origin = _scalar(row.get("dataset"))
    return (
        Example(
            id=_identifier(row, remarks),
            origin=file if origin is None or not visible(origin) else origin,
            messages=messages,
            prompt=prompt,
            completion=completion,
        ),
        remarks,
    )


def visible(text: str) -> bool:
    """Whether anything in the text can be seen: spaces, zero-width and control characters cannot.

    >>> visible(" \\u00a0\\u200b\\n"), visible("⟨ ⟩")
    (False, True)
    """
    return any(not (mark.isspace() or unicodedata.category(mark) in {"Cc", "Cf"}) for mark in text)


Content = tuple[tuple[Message, ...], str | None, str | None]
"""Messages, prompt, completion."""


def _conversation(field: str) -> Callable[[dict[str, Any], list[str]], Content]:
    def read(row: dict[str, Any], remarks: list[str]) -> Content:
        turns = row[field]
        if not isinstance(turns, list):
            raise BadRow(f"{field} is {_kind(turns)}; a list is needed")
        if not turns:
            raise BadRow(f"{field} is an empty list")
        messages = [_message(turn, number, remarks) for number, turn in enumerate(turns, start=1)]
        if field == "conversations":
            messages = [*_system(row), *messages]
        _check_turns(messages, remarks)
        return tuple(messages), None, None

    return read


def _prompt_completion(row: dict[str, Any], remarks: list[str]) -> Content:
    prompt, completion = (_string(row, field) for field in ("prompt", "completion"))
    if not visible(completion):
        raise BadRow("the completion is empty: nothing can be learnt from the row")
    if not visible(prompt):
        remarks.append("the prompt is empty")
    return (), prompt, completion


def _instruction(row: dict[str, Any], remarks: list[str]) -> Content:
    """One user turn, instruction and input with a blank line between them, and one assistant turn."""
    answer = next((field for field in ("output", "answer", "response") if row.get(field) is not None), None)
    if answer is None:
        raise BadRow("an instruction without output, answer or response")
    given = next((field for field in ("input", "context") if row.get(field) is not None), None)
    parts = [_string(row, "instruction")] + ([_string(row, given)] if given else [])
    question = "\n\n".join(part for part in parts if visible(part))
    messages = [*_system(row), Message("user", question), Message("assistant", _string(row, answer))]
    if row.get("history"):
        remarks.append("'history' is kept in the row and not part of the text")
    _check_turns(messages, remarks)
    return tuple(messages), None, None


_SHAPES: Sequence[tuple[str, Callable[[dict[str, Any], list[str]], Content]]] = (
    ("messages", _conversation("messages")),
    ("conversations", _conversation("conversations")),
    ("completion", _prompt_completion),
    ("instruction", _instruction),
    ("prompt", _prompt_completion),
)
"""Fields that show a shape, the first one found decides."""


def _message(turn: object, number: int, remarks: list[str]) -> Message:
    where = f"message {number}"
    if not isinstance(turn, dict):
        raise BadRow(f"{where} is {_kind(turn)}; an object with role and content is needed")
    role = _role(turn, where, remarks)
    if turn.get("tool_calls"):
        _check_tool_calls(turn, where, remarks)
    field = "value" if "content" not in turn and "value" in turn else "content"
    if field not in turn:
        raise BadRow(f"{where} has no content")
    if role == "assistant" and any(turn.get(weight) == 0 for weight in ("weight", "loss_weight")):
        remarks.append(f"{where} has the weight 0, which is not read: its text is learnt from")
    return Message(role, _text(turn[field], where, remarks))


def _role(turn: dict[str, Any], where: str, remarks: list[str]) -> Role:
    name = turn.get("role", turn.get("from"))
    if name is None:
        raise BadRow(f"{where} has no role")
    if not isinstance(name, str):
        raise BadRow(f"the role of {where} is {_kind(name)}; a string is needed")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise BadRow(f"{where} has the unknown role {name!r}; known are {', '.join(ROLES)}")
    if name not in ROLES:
        remarks.append(f"the role {name!r} of {where} was read as {role!r}")
    return role


def _check_tool_calls(turn: dict[str, Any], where: str, remarks: list[str]) -> None:
    content = turn.get("content")
    if content is None or (isinstance(content, str) and not visible(content)):
        raise BadRow(f"{where} holds tool_calls and no text: write the call into its content")
    remarks.append(f"the tool_calls of {where} are kept in the row and not part of the text")


def _text(content: object, where: str, remarks: list[str]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"the content of {where} is {_kind(content)}; a string is needed")
    kinds, texts = [], []
    for part in content:
        kind, text = _part(part, where)
        kinds.append(kind)
        texts.append(text)
    if set(kinds) - {"text"}:
        remarks.append(f"the parts of {where} ({', '.join(kinds)}) were joined by line ends")
    return "\n".join(texts)


def _part(part: object, where: str) -> tuple[str, str]:
    """Kind and text of one part of a content list: `{"type", "value"}` or `{"type", "text"}`."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise BadRow(f"a part of {where} is {_kind(part)}; an object is needed")
    kind = "text" if part.get("type") is None else part["type"]
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise BadRow(f"a part of {where} has the type {kind!r}: only text can be learnt from")
    text = next((part[field] for field in ("text", "value", kind) if isinstance(part.get(field), str)), None)
    if text is None:
        raise BadRow(f"a part of {where} has no text")
    return kind, text


def _system(row: dict[str, Any]) -> list[Message]:
    """The system turn that ShareGPT and Alpaca files keep beside the conversation."""
    text = row.get("system")
    return [Message("system", text)] if isinstance(text, str) and visible(text) else []


def _check_turns(messages: Sequence[Message], remarks: list[str]) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise BadRow("no assistant turn: nothing can be learnt from the row")
    empty = [number for number, message in enumerate(messages, start=1) if not visible(message.content)]
    if all(number in empty for number, role in enumerate(roles, start=1) if role == "assistant"):
        raise BadRow("the assistant's text is empty: nothing can be learnt from the row")
    remarks.extend(f"the {roles[number - 1]} turn {number} is empty" for number in empty)
    if "user" not in roles[: roles.index("assistant")]:
        remarks.append("no user turn stands before the first assistant turn")
    if "system" in roles[1:]:
        remarks.append("a system turn stands inside the conversation")
    remarks.extend(f"two {role} turns in a row" for role in ("user", "assistant") if _in_a_row(role, roles))
    if roles[-1] != "assistant":
        remarks.append("nothing is learnt from what follows the last assistant turn")


def _in_a_row(role: str, roles: Sequence[str]) -> bool:
    return any(first == second == role for first, second in pairwise(roles))


def _remark_on_markers(texts: Sequence[str], remarks: list[str]) -> None:
    found = sorted({marker for text in texts for marker in MARKERS.findall(text)})
    if found:
        remarks.append(f"the text holds {', '.join(found[:5])}: kept as it is")


def _remark_on_fields(row: dict[str, Any], remarks: list[str]) -> None:
    if row.get("tools") not in (None, "", "[]", []):
        remarks.append("'tools' is kept in the row and not part of the text")


def _identifier(row: dict[str, Any], remarks: list[str]) -> str | None:
    value = row.get("id")
    if isinstance(value, dict | list):
        remarks.append(f"the id is {_kind(value)}: kept in the row, and not used as an id")
    return _scalar(value)


def _scalar(value: object) -> str | None:
    """A JSON scalar as text, the way JSON writes it; null, lists and objects have none."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, dict | list):
        return None
    return json.dumps(value)


def _string(row: dict[str, Any], field: str) -> str:
    if field not in row:
        raise BadRow(f"the row has no {field}")
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"{field} is {_kind(value)}; a string is needed")
    return value


def _unknown(row: dict[str, Any]) -> str:
    null = [field for field, _ in _SHAPES if field in row]
    if null:
        return f"{null[0]} is null"
    fields = ", ".join(repr(field) for field in list(row)[:8]) + (" …" if len(row) > 8 else "")
    return (
        "no shape fits: a row needs messages, conversations, prompt and completion, or instruction and output; "
        f"this one has {fields or 'no field at all'}"
    )


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
