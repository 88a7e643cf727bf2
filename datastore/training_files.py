"""Chosen rows as the trainers of others read them: the data, a configuration to start from, and the provenance card.

    trl             messages.jsonl, prompt_completion.jsonl, train.py
    axolotl         messages.jsonl, prompt_completion.jsonl, axolotl.yaml
    llama-factory   messages.json, prompt_completion.json, dataset_info.json, train.yaml

Conversations and prompts with completions are different things to every trainer, so each kind is a file of its own,
and a file without rows is left out. What each format must look like is said at its writer, with its source. What a
trainer would drop is left out beforehand and told, with its rank, in `left_out.jsonl`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradstore.types import Provenance, SelectedRow, Trainer

from datastore.provenance import DataFile, card
from datastore.rows import Example
from datastore.strict_json import compact

Kind = Literal["messages", "prompt_completion"]
KINDS: tuple[Kind, ...] = ("messages", "prompt_completion")
Row = dict[str, Any]

ChosenExamples = Callable[[], Iterable[tuple[SelectedRow, Example]]]
"""Gives, each time it is called, all chosen rows and their examples, best first."""

DEFAULT_MODEL = "the/base-model"  # of a selection whose checkpoints are deleted


class _Unfit(Exception):
    """A row that the trainer would drop; the message says why."""


@dataclass(frozen=True)
class _Format:
    """What a trainer's files look like."""

    ending: Literal["jsonl", "json"]
    messages: Callable[[Example], Row]
    completion: Callable[[Example], Row]
    configuration: Callable[[Provenance, Sequence[Kind]], dict[str, str]]
    """Names and texts of the other files, for these kinds of rows."""
    advice: str
    """How they are used: Markdown."""


def files(trainer: Trainer, rows: ChosenExamples, provenance: Provenance) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Every file of a trainer's folder, as its name and its pieces; each is read before the next is asked for."""
    chosen = _FORMATS[trainer]
    counts = Counter(_kind(example) if _fits(chosen, example) else "unfit" for _, example in rows())
    unfit = counts.pop("unfit", 0)
    kinds: list[Kind] = [kind for kind in KINDS if kind in counts]
    data = {kind: f"{kind}.{chosen.ending}" for kind in kinds}
    told = f"{unfit:,} rows that the trainer cannot take are named in `left_out.jsonl`, with the reason."
    notes = [chosen.advice, *([told] if unfit else [])]
    shown = [DataFile(kind, path) for kind, path in data.items()]
    yield "README.md", [card(provenance, files=shown, notes=notes).encode()]
    yield "provenance.json", [provenance.model_dump_json(indent=1).encode() + b"\n"]
    for name, text in chosen.configuration(provenance, kinds).items():
        yield name, [text.encode()]
    if unfit:
        yield "left_out.jsonl", _lines(_left_out(chosen, rows))
    for kind, path in data.items():
        found = _of_kind(chosen, rows, kind)
        yield path, _lines(found) if chosen.ending == "jsonl" else _array(found)


def _kind(example: Example) -> Kind:
    return "messages" if example.messages else "prompt_completion"


def _converted(chosen: _Format, example: Example) -> Row:
    return chosen.messages(example) if example.messages else chosen.completion(example)


def _fits(chosen: _Format, example: Example) -> bool:
    try:
        _converted(chosen, example)
    except _Unfit:
        return False
    return True


def _of_kind(chosen: _Format, rows: ChosenExamples, kind: Kind) -> Iterator[Row]:
    for _, example in rows():
        if _kind(example) == kind and _fits(chosen, example):
            yield _converted(chosen, example)


def _left_out(chosen: _Format, rows: ChosenExamples) -> Iterator[Row]:
    for row, example in rows():
        try:
            _converted(chosen, example)
        except _Unfit as reason:
            yield {"rank": row.rank, "dataset": row.dataset, "row": row.row, "reason": str(reason)}


def _lines(rows: Iterable[Row]) -> Iterator[bytes]:
    return (compact(row) + b"\n" for row in rows)


def _array(rows: Iterable[Row]) -> Iterator[bytes]:
    before = b"[\n"
    for row in rows:
        yield before + compact(row)
        before = b",\n"
    yield b"\n]\n"


# TRL ----------------------------------------------------------------------------------------------------------------


def _chat(example: Example) -> Row:
    """A conversation as TRL, Axolotl and the OpenAI API have it: `messages`, each with `role` and `content`.

    TRL: "conversational language modeling" (https://huggingface.co/docs/trl/dataset_formats). Axolotl: `chat_template`
    (https://docs.axolotl.ai/docs/dataset-formats/conversation.html).
    """
    return {"messages": [{"role": message.role, "content": message.content} for message in example.messages]}


def _completion(example: Example) -> Row:
    """TRL's "standard prompt-completion" (https://huggingface.co/docs/trl/dataset_formats): the two are joined as they
    are, so the space that gradstore trains with between them stands at the completion's beginning.
    """
    prompt, completion = example.prompt or "", example.completion or ""
    return {"prompt": prompt, "completion": _joining(prompt, completion) + completion}


def _joining(prompt: str, completion: str) -> str:
    """What stands between a prompt and its completion: a space, unless one of them brings white space, or has none."""
    return " " if prompt and not prompt[-1].isspace() and not completion[:1].isspace() else ""


def _trl(provenance: Provenance, kinds: Sequence[Kind]) -> dict[str, str]:
    """A script for TRL's SFTTrainer (https://huggingface.co/docs/trl/sft_trainer), one training a kind of rows."""
    kind = kinds[0] if kinds else "messages"
    learnt = {"messages": "assistant_only_loss=True", "prompt_completion": "completion_only_loss=True"}[kind]
    text = f'''\
"""Fine-tune on the rows of {provenance.selection}: pip install trl, then python train.py in this folder."""

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

# {" and ".join(kinds)}: rows of one kind are trained on at a time
dataset = load_dataset("json", data_files="{kind}.jsonl", split="train")
trainer = SFTTrainer(
    model={json.dumps(_model(provenance), ensure_ascii=False)},
    train_dataset=dataset,
    args=SFTConfig(output_dir="tuned", max_length={_max_length(provenance)}, {learnt}),
)
trainer.train()
'''
    return {"train.py": text}


_TRL_ADVICE = """\
`python train.py` fine-tunes with [TRL](https://huggingface.co/docs/trl/sft_trainer). `assistant_only_loss` needs a chat
template that marks what the assistant says (`{% generation %}`), as TRL has it for the usual families of models; leave
it out with other templates, and all of a conversation is learnt."""


# Axolotl ------------------------------------------------------------------------------------------------------------


def _instruction(example: Example) -> Row:
    """A prompt and its completion as a row of Alpaca's shape (`instruction`, `input`, `output`), which both Axolotl
    (https://docs.axolotl.ai/docs/dataset-formats/inst_tune.html) and LLaMA-Factory (its data/README.md) read.
    """
    return {"instruction": example.prompt or "", "input": "", "output": example.completion or ""}


def _spaced(example: Example) -> Row:
    """The same for a format that adds no text of its own: the joining space is the output's beginning, as in TRL's."""
    row = _instruction(example)
    return {**row, "output": _joining(row["instruction"], row["output"]) + row["output"]}


def _axolotl(provenance: Provenance, kinds: Sequence[Kind]) -> dict[str, str]:
    """The parts of a configuration that this data decides; JSON texts are YAML, too.

    Prompts with completions get a `type` of their own ("How to add custom prompt format" on the page of instruction
    tuning) with no words around the instruction: Alpaca's would change what is trained on.
    """
    entries = {
        "messages": """\
  - path: messages.jsonl
    ds_type: json
    type: chat_template
    field_messages: messages
    message_property_mappings:
      role: role
      content: content
    roles_to_train: ["assistant"]
""",
        "prompt_completion": """\
  - path: prompt_completion.jsonl
    ds_type: json
    type:
      system_prompt: ""
      field_instruction: instruction
      field_input: input
      field_output: output
      format: "{instruction}"
      no_input_format: "{instruction}"
""",
    }
    text = "".join(
        [
            f"# The rows of {provenance.selection}: axolotl train axolotl.yaml, in this folder.\n",
            f"base_model: {json.dumps(_model(provenance), ensure_ascii=False)}\n",
            "datasets:\n" if kinds else "datasets: []\n",
            *(entries[kind] for kind in kinds),
            "train_on_inputs: false\n",
            f"sequence_len: {_max_length(provenance)}\n",
            "output_dir: tuned\n",
        ]
    )
    return {"axolotl.yaml": text}


_AXOLOTL_ADVICE = """\
`axolotl train axolotl.yaml` fine-tunes with [Axolotl](https://docs.axolotl.ai/docs/dataset-formats/conversation.html);
batch sizes, learning rate and adapter are yours to add."""


# LLaMA-Factory ------------------------------------------------------------------------------------------------------

_ASKING, _ANSWERING = ("user", "tool"), ("assistant",)


def _alternating(example: Example) -> Row:
    """LLaMA-Factory's `sharegpt` format with OpenAI's tags (data/README.md of its repository, "OpenAI Format").

    There may be a system prompt at the beginning; after it users and tools speak in the odd places, assistants in the
    even ones, and the last word is an assistant's. Rows that are otherwise are skipped there with a warning
    (`SharegptDatasetConverter`). What follows the last assistant's turn is never learnt, and is cut off here.
    """
    turns = list(example.messages)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    for number, turn in enumerate(spoken):
        if turn.role not in (_ASKING, _ANSWERING)[number % 2]:
            raise _Unfit(
                f"LLaMA-Factory takes no {turn.role} turn in place {number + 1}: users and assistants take turns"
            )
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}


def _llama_factory(provenance: Provenance, kinds: Sequence[Kind]) -> dict[str, str]:
    """dataset_info.json, the dataset descriptions that LLaMA-Factory looks up by name, and a configuration."""
    described: Mapping[Kind, Row] = {
        "messages": {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                "observation_tag": "tool", "system_tag": "system",
            },
        },
        "prompt_completion": {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
    }  # fmt: skip
    named = {kind: f"{provenance.selection}_{kind}" for kind in kinds}
    info = {named[kind]: {"file_name": f"{kind}.json", **described[kind]} for kind in kinds}
    train = (
        f"# The rows of {provenance.selection}: llamafactory-cli train train.yaml, in this folder.\n"
        f"model_name_or_path: {json.dumps(_model(provenance), ensure_ascii=False)}\n"
        "stage: sft\n"
        "do_train: true\n"
        "finetuning_type: lora\n"
        "dataset_dir: .\n"
        f"dataset: {','.join(named.values())}\n"
        "template: default  # the model's own, from the list in LLaMA-Factory's README\n"
        f"cutoff_len: {_max_length(provenance)}\n"
        "output_dir: tuned\n"
    )
    return {"dataset_info.json": json.dumps(info, indent=2) + "\n", "train.yaml": train}


_LLAMA_FACTORY_ADVICE = """\
`llamafactory-cli train train.yaml` fine-tunes with
[LLaMA-Factory](https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md), which finds the data by
`dataset_info.json`; set `template` to the model's own."""


def _model(provenance: Provenance) -> str:
    """The model that the gradients are of."""
    return next((one.model for one in provenance.checkpoints if one.model is not None), DEFAULT_MODEL)


def _max_length(provenance: Provenance) -> int:
    return int(provenance.recipe.get("max_length") or 2048)


_FORMATS: Mapping[Trainer, _Format] = {
    "trl": _Format("jsonl", _chat, _completion, _trl, _TRL_ADVICE),
    "axolotl": _Format("jsonl", _chat, _spaced, _axolotl, _AXOLOTL_ADVICE),
    "llama-factory": _Format("json", _alternating, _instruction, _llama_factory, _LLAMA_FACTORY_ADVICE),
}
