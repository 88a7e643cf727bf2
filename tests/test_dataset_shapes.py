"""Rows of every shape become the example a trainer would see; what cannot be learnt from is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from datastore.rows import Example, Message
from datastore.shapes import BadRow, example

ASKED, ANSWERED = Message("user", "2 + 2?"), Message("assistant", "4")
TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def read(row: object) -> Example:
    return example(row, file="pool.jsonl")[0]


def remarks(row: object) -> list[str]:
    return example(row, file="pool.jsonl")[1]


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TURNS}, (ASKED, ANSWERED)),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            (ASKED, ANSWERED),
        ),
        ({"conversations": TURNS}, (ASKED, ANSWERED)),
        *(
            ({"conversations": [{"from": "user", "value": "2 + 2?"}, {"from": name, "value": "4"}]}, (ASKED, ANSWERED))
            for name in ("chatgpt", "bing", "bard", "model")
        ),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "system": "Add."},
            (Message("system", "Add."), ASKED, ANSWERED),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "function_call", "value": "add(2, 2)"},
                    {"from": "observation", "value": "4"},
                    {"from": "gpt", "value": "4"},
                ]
            },
            (ASKED, Message("assistant", "add(2, 2)"), Message("tool", "4"), ANSWERED),
        ),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, (ASKED, ANSWERED)),
        ({"instruction": "2 + 2?", "output": "4"}, (ASKED, ANSWERED)),
        ({"instruction": "2 + 2?", "input": None, "answer": "4"}, (ASKED, ANSWERED)),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, (Message("user", "Add.\n\n2, 2"), ANSWERED)),
        ({"instruction": "Add.", "context": "2, 2", "response": "4"}, (Message("user", "Add.\n\n2, 2"), ANSWERED)),
        ({"instruction": "2 + 2?", "output": "4", "answer": "B"}, (ASKED, ANSWERED)),
        ({"instruction": "2 + 2?", "output": "4", "system": "Add."}, (Message("system", "Add."), ASKED, ANSWERED)),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "value": "2 + 2?"}]}, TURNS[1]]},
            (ASKED, ANSWERED),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "2 +"}, {"type": "text", "text": "2?"}]},
                    TURNS[1],
                ]
            },
            (Message("user", "2 +\n2?"), ANSWERED),
        ),
        ({"messages": TURNS, "prompt": "unused", "completion": "unused"}, (ASKED, ANSWERED)),
        ({"instruction": "2 + 2?", "output": "4", "prompt": "Below is an instruction: 2 + 2?"}, (ASKED, ANSWERED)),
        ({"messages": None, "instruction": "2 + 2?", "output": "4"}, (ASKED, ANSWERED)),
    ],
)
def test_every_shape_of_conversation_becomes_messages(row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    assert read(row).messages == messages


def test_prompt_and_completion_stay_apart() -> None:
    found = read({"prompt": "2 + 2 =", "completion": " 4"})
    assert (found.messages, found.prompt, found.completion) == ((), "2 + 2 =", " 4")


def test_text_is_never_changed() -> None:
    text = "  <|assistant|>\n\u202eשלום\u200d 👩\u200d👩\u200d👧 cafe\u0301\u2028\n"
    assert read(conversation(("user", text), ("assistant", text))).messages == (
        Message("user", text),
        Message("assistant", text),
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "the row is a list"),
        ("text", "the row is a string"),
        (None, "the row is null"),
        (3, "the row is a number"),
        ({}, "no field at all"),
        ({"message": TURNS}, "this one has 'message'"),
        ({"messages": None}, "messages is null"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": {}}, "messages is an object"),
        ({"messages": "2 + 2?"}, "messages is a string"),
        ({"messages": ["2 + 2?"]}, "message 1 is a string"),
        ({"messages": [{"content": "2 + 2?"}, TURNS[1]]}, "message 1 has no role"),
        ({"messages": [{"role": 1, "content": "2 + 2?"}, TURNS[1]]}, "the role of message 1 is a number"),
        ({"messages": [TURNS[0], {"role": "bot", "content": "4"}]}, "message 2 has the unknown role 'bot'"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, "message 2 has no content"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, "the content of message 2 is null"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": 4}]}, "the content of message 2 is a number"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": True}]}, "true or false"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, TURNS[1]]},
            "type 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, TURNS[1]]}, "a part of message 1 has no text"),
        ({"messages": [{"role": "user", "content": [3]}, TURNS[1]]}, "a part of message 1 is a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "2"}]}, TURNS[1]]},
            "a part of message 1 has the type ['text']",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": {}, "text": "2"}]}, TURNS[1]]},
            "a part of message 1 has the type {}",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "message 2 holds tool_calls and no text",
        ),
        (conversation(("user", "2 + 2?")), "no assistant turn"),
        (conversation(("system", "Add.")), "no assistant turn"),
        (conversation(("user", "2 + 2?"), ("assistant", "")), "the assistant's text is empty"),
        (conversation(("user", "2 + 2?"), ("assistant", " \n\t")), "the assistant's text is empty"),
        (conversation(("user", "2 + 2?"), ("assistant", "\u00a0\u200b\ufeff")), "the assistant's text is empty"),
        ({"prompt": "2 + 2 =", "completion": ""}, "the completion is empty"),
        ({"prompt": "2 + 2 ="}, "the row has no completion"),
        ({"completion": "4"}, "the row has no prompt"),
        ({"prompt": "2 + 2 =", "completion": None}, "completion is null"),
        ({"prompt": [1], "completion": "4"}, "prompt is a list"),
        ({"instruction": "2 + 2?"}, "an instruction without output"),
        ({"instruction": "2 + 2?", "output": ["4"]}, "output is a list"),
        ({"instruction": "2 + 2?", "output": ""}, "the assistant's text is empty"),
        ({"instruction": 3, "output": "4"}, "instruction is a number"),
    ],
)
def test_a_row_without_a_clear_lesson_is_refused_with_its_reason(row: object, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(row)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("row", "remark"),
    [
        (conversation(("User", "2 + 2?"), ("assistant", "4")), "the role 'User' of message 1 was read as 'user'"),
        (conversation(("system", "Add."), ("assistant", "4")), "no user turn stands before the first assistant turn"),
        (conversation(("user", "2 + 2?"), ("user", "Well?"), ("assistant", "4")), "two user turns in a row"),
        (conversation(("user", "2 + 2?"), ("assistant", "4"), ("assistant", "!")), "two assistant turns in a row"),
        (
            conversation(("user", "2 + 2?"), ("assistant", "4"), ("user", "Thanks.")),
            "nothing is learnt from what follows the last assistant turn",
        ),
        (
            conversation(("user", "2 + 2?"), ("system", "Be brief."), ("assistant", "4")),
            "a system turn stands inside the conversation",
        ),
        (conversation(("user", ""), ("assistant", "4")), "the user turn 1 is empty"),
        (
            conversation(("user", "2 + 2?"), ("assistant", ""), ("user", "Well?"), ("assistant", "4")),
            "the assistant turn 2 is empty",
        ),
        (conversation(("user", "2 + 2?"), ("assistant", "4<|endoftext|>")), "the text holds <|endoftext|>"),
        ({"prompt": "", "completion": "4"}, "the prompt is empty"),
        ({"prompt": "[INST] 2 + 2?", "completion": "4"}, "the text holds [INST]"),
        ({"messages": TURNS, "tools": [{"name": "add"}]}, "'tools' is kept in the row"),
        ({"instruction": "2 + 2?", "output": "4", "history": [["a", "b"]]}, "'history' is kept in the row"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "message 2 has the weight 0"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"id": "1"}]}]}, "the tool_calls of message 2 are kept"),
        (
            {
                "messages": [
                    TURNS[0],
                    {
                        "role": "assistant",
                        "content": [{"type": "reasoning", "value": "…"}, {"type": "text", "text": "4"}],
                    },
                ]
            },
            "the parts of message 2 (reasoning, text) were joined by line ends",
        ),
        ({"messages": TURNS, "id": {"a": 1}}, "the id is an object"),
    ],
)
def test_an_odd_row_is_taken_with_a_remark(row: dict[str, Any], remark: str) -> None:
    (found,) = remarks(row)
    assert found.startswith(remark)


def test_an_ordinary_row_needs_no_remark() -> None:
    system, tool = {"role": "system", "content": "Add."}, {"role": "tool", "content": "4"}
    turns = [system, TURNS[0], {"role": "assistant", "content": "add(2, 2)"}, tool, TURNS[1]]
    assert remarks({"dataset": "sums", "id": "1", "messages": turns, "tools": "[]", "score": 0.5}) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        ("", ""),
        (" ", " "),
        ("007", "007"),
        (7, "7"),
        (7.0, "7.0"),
        (True, "true"),
        (None, None),
        ("../../outside", "../../outside"),
        ("cafe\u0301", "cafe\u0301"),
    ],
)
def test_an_id_is_the_text_that_json_writes(value: object, text: str | None) -> None:
    assert read({"messages": TURNS, "id": value}).id == text


def test_a_row_may_lack_an_id() -> None:
    assert read({"messages": TURNS}).id is None


@pytest.mark.parametrize(
    ("row", "origin"),
    [
        ({}, "pool.jsonl"),
        ({"dataset": None}, "pool.jsonl"),
        ({"dataset": " "}, "pool.jsonl"),
        ({"dataset": {}}, "pool.jsonl"),
        ({"dataset": "dolly"}, "dolly"),
        ({"dataset": 3}, "3"),
    ],
)
def test_the_origin_is_the_dataset_field_or_the_file(row: dict[str, Any], origin: str) -> None:
    assert read({"messages": TURNS, **row}).origin == origin
