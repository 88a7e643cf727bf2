"""TyDiQA, gold passage: questions answered by a stretch of a passage, in nine languages.

Files: `tydiqa-one-shot.json` (language → [{"context", "question", "answers": [{"text"}]}]) to select for, and the
SQuAD-shaped `tydiqa-goldp-v1.1-dev.json` (any `tydiqa*.json`, in a folder `test`, if there is one) to evaluate on. The
language of a test question is the beginning of its id ("arabic--38…").

Instruction and labels are in the language of the question. Judged by token F1 against the best of the answers given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datastore.tasks.reading import TaskExample, TaskFolder, TaskRows, question

ONE_SHOT = "tydiqa-one-shot.json"


@dataclass(frozen=True)
class Wording:
    """The instruction and the labels of one language."""

    instruction: str
    passage: str
    question: str
    answer: str


WORDINGS = {
    "arabic": Wording("اقرأ المقطع التالي ثم أجب عن السؤال بالاعتماد عليه.", "المقطع:", "السؤال:", "الجواب:"),
    "bengali": Wording("নিচের অনুচ্ছেদটি পড়ে তার ভিত্তিতে প্রশ্নের উত্তর দাও।", "অনুচ্ছেদ:", "প্রশ্ন:", "উত্তর:"),
    "english": Wording("Read the passage and answer the question from it.", "Passage:", "Question:", "Answer:"),
    "finnish": Wording("Lue teksti ja vastaa kysymykseen sen perusteella.", "Teksti:", "Kysymys:", "Vastaus:"),
    "indonesian": Wording(
        "Bacalah bacaan berikut, lalu jawab pertanyaannya berdasarkan bacaan itu.", "Bacaan:", "Pertanyaan:", "Jawaban:"
    ),
    "korean": Wording("다음 글을 읽고 그 내용에 따라 질문에 답하세요.", "글:", "질문:", "답:"),
    "russian": Wording("Прочитайте отрывок и ответьте по нему на вопрос.", "Отрывок:", "Вопрос:", "Ответ:"),
    "swahili": Wording("Soma kifungu hiki kisha ujibu swali kwa kukitegemea.", "Kifungu:", "Swali:", "Jibu:"),
    "telugu": Wording("కింది భాగాన్ని చదివి, దాని ఆధారంగా ప్రశ్నకు జవాబు ఇవ్వండి.", "భాగం:", "ప్రశ్న:", "జవాబు:"),
}


class Tydiqa:
    """Reads `tydiqa-one-shot.json` and the gold-passage development set."""

    kind = "tydiqa"

    def read(self, folder: Path) -> TaskRows:
        """Read the languages in `folder`."""
        task = TaskFolder(folder, kind=self.kind)
        one_shot = task.only(task.require(task.find(ONE_SHOT), ONE_SHOT))
        validation = list(_one_shot(task, one_shot))
        test: list[TaskExample] = []
        for path in task.find_test("tydiqa*.json", but=["*one-shot*", "*train*"]):
            test += _squad(task, path)
        return task.finish(TaskRows(validation, test))


def _one_shot(task: TaskFolder, path: Path) -> Iterator[TaskExample]:
    content = task.json(path)
    if not isinstance(content, dict) or not all(isinstance(items, list) for items in content.values()):
        task.problem(path, "an object of language → list of questions is needed")
        return
    for language, items in content.items():
        for number, item in enumerate(items):
            fields = item if isinstance(item, dict) else {}
            row = _row(task, path, language, fields.get("context"), fields, f"{language}_{number}")
            if row is not None:
                yield row


def _squad(task: TaskFolder, path: Path) -> Iterator[TaskExample]:
    content = task.json(path)
    try:
        asked = [
            (paragraph["context"], item)
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for item in paragraph["qas"]
        ]
        languages = [item["id"].split("-", 1)[0] for _, item in asked]
    except (KeyError, TypeError, AttributeError):
        task.problem(
            path, 'the shape {"data": [{"paragraphs": [{"context", "qas": [{"id", "question", …}]}]}]} is needed'
        )
        return
    for language, (context, item) in zip(languages, asked, strict=True):
        row = _row(task, path, language, context, item, item["id"])
        if row is not None:
            yield row


def _row(
    task: TaskFolder, path: Path, language: str, context: object, item: dict[str, Any], number: str
) -> TaskExample | None:
    wording = WORDINGS.get(language)
    answers = _answers(item.get("answers"))
    asked = item.get("question")
    if wording is None:
        task.problem(path, f"{number}: the language {language!r} is none of {', '.join(WORDINGS)}")
    elif not isinstance(context, str) or not isinstance(asked, str) or not answers:
        task.problem(path, f"{number}: context, question and answers[].text are needed")
    else:
        text = f"{wording.instruction}\n\n{wording.passage} {context}\n{wording.question} {asked}"
        return TaskExample(
            example=question("tydiqa", number, text, f" {answers[0]}", prefix=wording.answer),
            subtask=language,
            metric="token_f1",
            answers=tuple(answers),
        )
    return None


def _answers(value: object) -> list[str]:
    texts = [item.get("text") if isinstance(item, dict) else None for item in value] if isinstance(value, list) else []
    return [text for text in texts if isinstance(text, str) and text.strip()]


READER = Tydiqa()
