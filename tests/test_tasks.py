"""Target tasks: the benchmarks' files read into LESS's prompts, kept by content, refused with file and line."""

from __future__ import annotations

import json
import re
import threading
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import datastore.tasks
from datastore.archives import unpack
from datastore.errors import Damaged, InvalidTask, NotFound, TooLarge
from datastore.rows import Message
from datastore.tasks import TaskExample, Tasks, readers
from datastore.tasks.patterns import Patterns


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), "utf-8")
    return folder


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(kind: str, folder: Path) -> tuple[list[TaskExample], list[TaskExample]]:
    rows = readers()[kind].read(folder)
    return rows.validation, rows.test


def refused(kind: str, folder: Path) -> InvalidTask:
    with pytest.raises(InvalidTask) as error:
        readers()[kind].read(folder)
    return error.value


def turns(row: TaskExample) -> tuple[str, str, str]:
    """User's text, the assistant's prefix, the assistant's text."""
    user, assistant = row.example.messages
    assert (user.role, user.prefix, assistant.role) == ("user", "", "assistant")
    return user.content, assistant.prefix, assistant.content


# MMLU ----------------------------------------------------------------------------------------------------------------

MMLU_ROW = '"Is ""it""\nso?",no,"yes, so",maybe,never,B\r\n'


def test_mmlu_has_less_prompts(tmp_path: Path) -> None:
    validation, test = read("mmlu", write(tmp_path, {"dev/moral_disputes_dev.csv": MMLU_ROW}))
    assert [turns(row) for row in validation] == [
        (
            "The following are multiple choice questions (with answers) about moral disputes.\n\n"
            'Is "it"\nso?\nA. no\nB. yes, so\nC. maybe\nD. never\nAnswer:',
            "The answer is:",
            " B",
        )
    ]
    assert test == []
    row = validation[0]
    assert (row.subtask, row.metric, row.choices, row.answers) == (
        "moral_disputes",
        "choice",
        (" A", " B", " C", " D"),
        (" B",),
    )


@pytest.mark.parametrize("where", ["", "mmlu/", "data/eval/mmlu/"])
@pytest.mark.parametrize("folders", [("dev/", "test/"), ("", "")])
def test_files_are_found_wherever_a_zip_puts_them(where: str, folders: tuple[str, str], tmp_path: Path) -> None:
    names = (f"{where}{folders[0]}law_dev.csv", f"{where}{folders[1]}law_test.csv")
    validation, test = read("mmlu", write(tmp_path, dict.fromkeys(names, "q,a,b,c,d,D\n")))
    assert (len(validation), len(test)) == (1, 1)


def test_mmlu_names_file_and_line_of_every_bad_row(tmp_path: Path) -> None:
    rows = '"two\nlines",a,b,c,d,A\nq,a,b,c,d,E\n\nq,a,b,c,d\nquestion,A,B,C,D,answer\n'
    error = refused("mmlu", write(tmp_path, {"x/law_dev.csv": rows, "law_test.csv": b"q,a,b,c,\xff,A\n"}))
    assert [(item.line, item.detail) for item in error.errors] == [
        (3, "x/law_dev.csv: the answer is 'E'; A, B, C or D is needed (no header)"),
        (5, "x/law_dev.csv: 5 cells; question,A,B,C,D,answer are needed"),
        (6, "x/law_dev.csv: the answer is 'answer'; A, B, C or D is needed (no header)"),
        (None, "law_test.csv: byte 0xFF at 9 is not UTF-8"),
    ]
    assert error.total_errors == 4
    assert "x/law_dev.csv" in str(error)
    assert "(line 3), and 3 more" in str(error)


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path: Path) -> None:
    error = refused("mmlu", write(tmp_path, {"law_dev.csv": "q,a,b,c,d,E\n" * 50}))
    assert (len(error.errors), error.total_errors) == (20, 50)


def test_two_files_of_one_subject_are_refused(tmp_path: Path) -> None:
    files = {"a/law_dev.csv": "q,a,b,c,d,A\n", "b/law_dev.csv": "q,a,b,c,d,A\n"}
    assert "a second dev file of law" in str(refused("mmlu", write(tmp_path, files)))


def test_real_mmlu_is_read_whole(shared_data: Path) -> None:
    validation, test = read("mmlu", shared_data / "eval" / "mmlu")
    assert Counter(Counter(row.subtask for row in validation).values()) == {5: 57}
    assert len(test) == 2403
    assert len({row.subtask for row in test}) == 12
    plain = [json.loads(line) for line in (shared_data / "targets" / "mmlu_dev_285.jsonl").read_text().splitlines()]
    assert len(plain) == len(validation)
    for row, known in zip(validation, sorted(plain, key=lambda row: row["subtask"]), strict=True):
        question, answer = (message["content"] for message in known["messages"])
        assert turns(row)[0].strip().endswith(question.strip())
        assert (row.subtask, turns(row)[2]) == (known["subtask"], answer)


# BBH -----------------------------------------------------------------------------------------------------------------

SNARKS = (
    "Find the sarcasm.\n\nIt is said with\nanother meaning.\n\n"
    "Q: One?\n(A) x\nA: Think. So the answer is (A).\n\n"
    "Q: Two?\nA: Think\n\ntwice. So the answer is (B).\n\n"
    "Q: Three?\nA: Think. So the answer is (C)."
)
HEAD = "Find the sarcasm.\n\nIt is said with\nanother meaning.\n\n"
BLOCKS = (
    "Q: One?\n(A) x\nA: Think. So the answer is (A).",
    "Q: Two?\nA: Think\n\ntwice. So the answer is (B).",
    "Q: Three?\nA: Think. So the answer is (C).",
)


def test_bbh_asks_each_block_in_turn_after_the_other_two(tmp_path: Path) -> None:
    validation, _ = read("bbh", write(tmp_path, {"bbh-three-shot.json": {"snarks": SNARKS}}))
    assert [turns(row) for row in validation] == [
        (f"{HEAD}{BLOCKS[1]}\n\n{BLOCKS[2]}\n\nQ: One?\n(A) x", "A:", " Think. So the answer is (A)."),
        (f"{HEAD}{BLOCKS[0]}\n\n{BLOCKS[2]}\n\nQ: Two?", "A:", " Think\n\ntwice. So the answer is (B)."),
        (f"{HEAD}{BLOCKS[0]}\n\n{BLOCKS[1]}\n\nQ: Three?", "A:", " Think. So the answer is (C)."),
    ]
    assert [row.answers for row in validation] == [("(A)",), ("(B)",), ("(C)",)]


def test_bbh_test_questions_come_after_all_three(tmp_path: Path) -> None:
    item = {"input": "Four?", "target": "(D)"}
    files = {"bbh-three-shot.json": {"snarks": SNARKS}, "test/snarks.json": {"canary": "…", "examples": [item]}}
    _, test = read("bbh", write(tmp_path, files))
    assert [turns(row) for row in test] == [(f"{SNARKS}\n\nQ: Four?", "A:", " So the answer is (D).")]
    assert (test[0].metric, test[0].answers) == ("exact_match", ("(D)",))


def test_bbh_prompts_may_come_as_the_files_they_were_made_from(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"bbh-three-shot.json": {"snarks": SNARKS}})
    canary = "BENCHMARK DATA … canary GUID 26b5c67b\n-----\n"
    two = write(tmp_path / "two", {"cot-prompts/snarks.txt": canary + SNARKS})
    assert read("bbh", one) == read("bbh", two)


def test_bbh_prompts_with_the_line_ends_of_windows_are_the_same_prompts(tmp_path: Path) -> None:
    prompt = "BENCHMARK DATA … canary GUID 26b5c67b\n-----\n" + SNARKS
    one = write(tmp_path / "one", {"cot-prompts/snarks.txt": prompt})
    two = write(tmp_path / "two", {"cot-prompts/snarks.txt": prompt.replace("\n", "\r\n").encode()})
    assert read("bbh", one) == read("bbh", two)


def test_bbh_says_what_does_not_fit(tmp_path: Path) -> None:
    files = {
        "bbh-three-shot.json": {"snarks": SNARKS, "bad": "Q: One?\n\nQ: Two?\nA: b"},
        "test/other.json": {"examples": []},
        "test/snarks.json": {"examples": [{"input": "a", "target": "b"}, {"input": "a"}]},
        "test/list.json": [],
    }
    assert [(item.line, item.detail) for item in refused("bbh", write(tmp_path, files)).errors] == [
        (None, "bbh-three-shot.json: bad: blocks of 'Q: …' and 'A: …', parted by blank lines, are needed"),
        (None, 'test/list.json: an object {"examples": [{"input", "target"}, …]} is needed'),
        (None, "test/other.json: there are no worked examples for 'other'; tasks with some: snarks"),
        (2, "test/snarks.json: target must be given as text"),
    ]


def test_real_bbh_has_three_examples_of_each_of_27_tasks(shared_data: Path) -> None:
    folder = shared_data / "eval" / "bbh"
    validation, test = read("bbh", folder)
    assert Counter(Counter(row.subtask for row in validation).values()) == {3: 27}
    assert len(test) == 1511
    known = [json.loads(line) for line in (shared_data / "targets" / "bbh_3shot_81.jsonl").read_text().splitlines()]
    for row, other in zip(validation, sorted(known, key=lambda row: row["subtask"]), strict=True):
        question, answer = (message["content"] for message in other["messages"])
        assert turns(row)[2] == answer
        assert turns(row)[0].endswith(question.removesuffix("\nA:").partition("\n\nQ: ")[2])
        assert turns(row)[0].count("\n\nQ: ") == 3
        assert answer.rstrip(".").endswith(f"the answer is {row.answers[0]}")
    assert read("bbh", folder / "cot-prompts")[0] == validation


# TyDiQA --------------------------------------------------------------------------------------------------------------


def asked(text: str, *answers: str, **more: str) -> dict[str, object]:
    return {"question": text, "answers": [{"text": answer, "answer_start": 0} for answer in answers], **more}


def test_tydiqa_speaks_the_language_of_the_question(tmp_path: Path) -> None:
    one_shot = {
        "english": [asked("Who?", "Ada", context="Ada wrote it.")],
        "finnish": [asked("Kuka?", "Ada", context="Ada kirjoitti.")],
    }
    validation, _ = read("tydiqa", write(tmp_path, {"dev/tydiqa-one-shot.json": one_shot}))
    assert [turns(row) for row in validation] == [
        (
            "Read the passage and answer the question from it.\n\nPassage: Ada wrote it.\nQuestion: Who?",
            "Answer:",
            " Ada",
        ),
        (
            "Lue teksti ja vastaa kysymykseen sen perusteella.\n\nTeksti: Ada kirjoitti.\nKysymys: Kuka?",
            "Vastaus:",
            " Ada",
        ),
    ]
    assert [(row.subtask, row.metric, row.answers) for row in validation] == [
        ("english", "token_f1", ("Ada",)),
        ("finnish", "token_f1", ("Ada",)),
    ]


def squad(*questions: dict[str, object]) -> dict[str, object]:
    return {"data": [{"title": "t", "paragraphs": [{"context": "Ada wrote it.", "qas": list(questions)}]}]}


def test_tydiqa_test_questions_keep_all_answers_and_take_the_language_from_the_id(tmp_path: Path) -> None:
    files = {
        "tydiqa-one-shot.json": {"english": [asked("Who?", "Ada", context="Ada wrote it.")]},
        "tydiqa-one-shot-zh.json": {},
        "tydiqa-goldp-v1.1-train.json": squad(asked("x", "y", id="english-1")),
        "tydiqa-goldp-v1.1-dev.json": squad(asked("Nani?", "Ada", "Ada L.", id="swahili--12-3")),
    }
    _, test = read("tydiqa", write(tmp_path, files))
    assert [(row.subtask, row.answers) for row in test] == [("swahili", ("Ada", "Ada L."))]


def test_tydiqa_says_what_does_not_fit(tmp_path: Path) -> None:
    files = {
        "tydiqa-one-shot.json": {"english": [asked("Who?", context="c")], "klingon": [asked("q", "a", context="c")]},
        "test/tydiqa.json": squad(asked("q", "a")),
    }
    details = [item.detail for item in refused("tydiqa", write(tmp_path, files)).errors]
    assert details[0] == "tydiqa-one-shot.json: english_0: context, question and answers[].text are needed"
    assert details[1].startswith("tydiqa-one-shot.json: klingon_0: the language 'klingon' is none of arabic, bengali")
    assert details[2].startswith("test/tydiqa.json: the shape")


def test_real_tydiqa_covers_nine_languages(shared_data: Path) -> None:
    validation, test = read("tydiqa", shared_data / "eval" / "tydiqa")
    assert len({row.subtask for row in validation}) == len(validation) == 9
    assert Counter(row.subtask for row in test) == dict.fromkeys((row.subtask for row in validation), 15)
    headings = {turns(row)[1] for row in validation} | {turns(row)[0].partition("\n")[0] for row in validation}
    assert len(headings) == 18  # no wording twice


# GSM8K and ScienceQA -------------------------------------------------------------------------------------------------


def test_gsm8k_is_judged_by_the_number_after_the_hashes(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "Two and two.\n#### 1,004"}
    files = {"validation_30.jsonl": lines(row), "test.jsonl": lines(row, row), "train.jsonl": lines(row)}
    validation, test = read("gsm8k", write(tmp_path, files))
    assert [turns(row) for row in validation] == [("How many?", "", "Two and two.\n#### 1,004")]
    assert (validation[0].metric, validation[0].answers, len(test)) == ("exact_match", ("1,004",), 2)


def test_gsm8k_units_are_no_part_of_the_answer(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "#### 3\nNo:\n#### $4 each"}
    validation, _ = read("gsm8k", write(tmp_path, {"validation.jsonl": lines(row)}))
    assert validation[0].answers == ("4",)


def test_gsm8k_takes_its_training_rows_where_it_has_no_others(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "#### 4"}
    rows = readers()["gsm8k"].read(write(tmp_path, {"train.jsonl": lines(*[row] * 1001)}))
    assert len(rows.validation) == 1001
    assert rows.notes == ["1,001 validation rows: a few dozen are enough to select for, and cost as much less"]


def test_gsm8k_names_bad_lines(tmp_path: Path) -> None:
    good = lines({"question": "How many?", "answer": "#### 4"})
    words = [{"question": "How many?", "answer": answer} for answer in ("4", "#### four", "#### 4\n####")]
    bad = lines(*words, {"question": 1}, [])
    error = refused("gsm8k", write(tmp_path, {"validation.jsonl": good + "\n" + bad + "{"}))
    assert [item.line for item in error.errors] == [3, 4, 5, 6, 7, 8]
    assert [item.detail.removeprefix("validation.jsonl: ") for item in error.errors[:5]] == [
        "the answer does not end in '#### <number>'",
        "the answer does not end in '#### <number>'",
        "the answer does not end in '#### <number>'",
        "question, answer must be given as text",
        "no JSON object",
    ]


def test_a_git_lfs_pointer_is_named_for_what_it_is(shared_data: Path, tmp_path: Path) -> None:
    pointer = (shared_data / "awkward" / "git_lfs_pointer.jsonl").read_bytes()
    error = refused("gsm8k", write(tmp_path, {"validation.jsonl": pointer}))
    assert "validation.jsonl: this is a Git-LFS pointer" in str(error)


def test_real_gsm8k_is_read_whole(shared_data: Path) -> None:
    validation, test = read("gsm8k", shared_data / "eval" / "gsm8k")
    assert (len(validation), len(test)) == (30, 100)


PROBLEM = {
    "question": "Which?",
    "choices": ["this", "that", "both"],
    "answer": 2,
    "hint": "Look.",
    "image": None,
    "subject": "natural science",
}


def test_scienceqa_in_its_own_layout_leaves_out_images(tmp_path: Path) -> None:
    problems = {"1": PROBLEM, "2": PROBLEM | {"image": "image.png"}, "3": PROBLEM | {"hint": ""}, "4": {}}
    splits = {"train": ["4"], "val": ["1", "2"], "test": ["3"]}
    folder = write(tmp_path, {"ScienceQA/problems.json": problems, "ScienceQA/pid_splits.json": splits})
    rows = readers()["scienceqa"].read(folder)
    asked = "Question: Which?\nOptions: (A) this (B) that (C) both"
    assert [turns(row) for row in rows.validation] == [(f"Context: Look.\n{asked}", "Answer: The answer is", " C.")]
    assert [turns(row)[0] for row in rows.test] == [f"Context: N/A\n{asked}"]
    assert (rows.test[0].choices, rows.test[0].answers, rows.test[0].subtask) == (
        (" A", " B", " C"),
        (" C",),
        "natural science",
    )
    assert rows.notes == ["1 questions with an image were left out"]


def test_scienceqa_without_splits_goes_by_each_problems_own(tmp_path: Path) -> None:
    problems = {pid: PROBLEM | {"split": split} for pid, split in (("1", "val"), ("2", "test"), ("3", "train"))}
    validation, test = read("scienceqa", write(tmp_path, {"problems.json": problems}))
    assert [row.example.id for row in validation + test] == ["1", "2"]


def test_scienceqa_says_what_does_not_fit(tmp_path: Path) -> None:
    problems = {
        "1": PROBLEM | {"answer": 3},
        "2": PROBLEM | {"choices": ["one"]},
        "3": PROBLEM | {"subject": None},
        "4": PROBLEM | {"choices": ["one", 2]},
    }
    files = {"problems.json": problems, "pid_splits.json": {"val": ["1", "2", "3", "4", "9"], "test": []}}
    assert [item.detail for item in refused("scienceqa", write(tmp_path, files)).errors] == [
        "pid_splits.json: 1 pids are not in problems.json, the first 9",
        "problems.json: 1: the answer 3 is none of the 3 choices",
        "problems.json: 2: choices must be a list of 2 to 26 texts",
        "problems.json: subject must be given as text",
        "problems.json: 4: choices must be a list of 2 to 26 texts",
    ]


def test_two_lists_of_scienceqa_splits_are_not_chosen_from(tmp_path: Path) -> None:
    splits = {"val": ["1"], "test": []}
    files = {"problems.json": {"1": PROBLEM}, "a/pid_splits.json": splits, "b/pid_splits.json": splits}
    assert "which of these is meant? a/pid_splits.json, b/pid_splits.json" in str(
        refused("scienceqa", write(tmp_path, files))
    )


def test_real_scienceqa_reads_alike_from_both_layouts(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "raw" / "scienceqa"
    validation, test = read("scienceqa", folder)
    assert (len(validation), len(test)) == (122, 146)
    for split in ("train", "validation", "test"):
        (tmp_path / f"mola_{split}.jsonl").symlink_to(folder / f"mola_{split}.jsonl")
    for split, rows in zip(("validation", "test"), read("scienceqa", tmp_path), strict=True):
        known = [json.loads(line) for line in (folder / f"mola_{split}.jsonl").read_text("utf-8").split("\n")[:-1]]
        assert [turns(row)[0] for row in rows] == [row["instruction"].strip() for row in known]
        assert [turns(row)[1] + turns(row)[2] for row in rows] == [row["output"] for row in known]


def test_written_scienceqa_asks_for_a_text_that_says_its_answer_once(tmp_path: Path) -> None:
    splits = {"val": ["1"], "test": ["1"]}
    folder = write(tmp_path / "files", {"problems.json": {"1": PROBLEM}, "pid_splits.json": splits})
    (row,) = readers()["scienceqa-written"].read(folder).test
    (chosen,) = readers()["scienceqa"].read(folder).test
    assert turns(row) == (turns(chosen)[0], "", "Answer: The answer is C.")
    assert (row.subtask, row.metric, row.choices, row.answers) == ("natural science", "exact_match", (), ("C",))
    assert (row.pattern, row.on_multiple) == (r"The answer is ([A-Z]).", "fail")
    store = Tasks(tmp_path / "store")
    assert store.test(store.store("scienceqa-written", folder).id) == [row]


def test_real_written_scienceqa_judges_molas_outputs_right(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "raw" / "scienceqa"
    for split in ("validation", "test"):
        (tmp_path / f"mola_{split}.jsonl").symlink_to(folder / f"mola_{split}.jsonl")
    validation, test = read("scienceqa-written", tmp_path)
    assert (len(validation), len(test)) == (140, 148)
    known = [json.loads(line) for line in (folder / "mola_test.jsonl").read_text("utf-8").split("\n")[:-1]]
    with Patterns() as patterns:
        for row, mola in zip(test, known, strict=True):
            assert turns(row)[0] == mola["instruction"].strip()
            assert row.pattern is not None
            found = patterns.find(row.pattern, mola["output"], on_multiple=row.on_multiple)
            assert [found] == [mola["answer"]] == list(row.answers)


# JSONL ---------------------------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "The answer is 4."}]}


def test_jsonl_takes_any_shape_with_subtask_and_metric(tmp_path: Path) -> None:
    rows = [
        CHAT | {"subtask": "b", "pattern": r"is (\d+)"},
        {"prompt": "Q", "completion": "yes", "choices": ["yes", "no"], "id": 7},
        {"instruction": "Q", "output": "Ada Lovelace", "metric": "token_f1", "answers": ["Ada", "Lovelace"]},
        CHAT | {"subtask": "c"},
    ]
    validation, test = read("jsonl", write(tmp_path, {"validation.jsonl": lines(*rows), "test.jsonl": lines(CHAT)}))
    assert [(row.subtask, row.metric, row.choices, row.answers, row.pattern) for row in validation] == [
        ("b", "exact_match", (), ("4",), r"is (\d+)"),
        ("all", "choice", ("yes", "no"), ("yes",), None),
        ("all", "token_f1", (), ("Ada", "Lovelace"), None),
        ("c", "none", (), (), None),
    ]
    assert (validation[1].example.prompt, validation[1].example.completion) == ("Q", "yes")
    assert len(test) == 1


def test_jsonl_says_which_of_several_matches_is_the_answer_and_else_nothing_is_stored_of_it(tmp_path: Path) -> None:
    row = {"prompt": "Q", "completion": "1, 2 or 3", "pattern": r"\d"}
    rows = [row, row | {"on_multiple": "first"}, row | {"on_multiple": "last"}]
    tasks = Tasks(tmp_path / "store")
    ids = [tasks.store("jsonl", write(tmp_path / str(n), {"a.jsonl": lines(each)})).id for n, each in enumerate(rows)]
    assert ids[0] == ids[1] != ids[2]
    first, last = (tasks.validation(id)[0] for id in ids[1:])
    assert (first.answers, first.on_multiple, last.answers, last.on_multiple) == (("1",), "first", ("3",), "last")
    assert "on_multiple" not in (tmp_path / "store" / ids[0] / "validation.jsonl").read_text()


def test_one_jsonl_file_of_any_name_is_validation(tmp_path: Path) -> None:
    folder = write(tmp_path, {"my_target.jsonl": lines(CHAT)})
    assert [len(rows) for rows in read("jsonl", folder)] == [1, 0]
    assert read("jsonl", folder / "my_target.jsonl") == read("jsonl", folder)


def test_jsonl_keeps_a_prefix_of_an_assistants_turn(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": " B", "prefix": "It is:"}]
    validation, _ = read("jsonl", write(tmp_path, {"a.jsonl": lines({"messages": messages})}))
    assert validation[0].example.messages == (Message("user", "Q"), Message("assistant", " B", "It is:"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"subtask": ""}, "subtask must be a text that is not empty"),
        ({"metric": "bleu"}, "the metric 'bleu' is none of choice"),
        ({"metric": "choice"}, "needs choices"),
        ({"metric": "token_f1", "choices": ["a", "b"]}, "needs choices, and only it has them"),
        ({"choices": ["a", "b"]}, "must be one of choices"),
        ({"choices": ["a", "a"]}, "two different texts"),
        ({"answers": ["a"]}, "add a metric"),
        ({"metric": "token_f1", "answers": [1]}, "must be a text or a list of texts"),
        ({"metric": "token_f1", "pattern": "a"}, "only the metric exact_match has a pattern"),
        ({"pattern": "("}, "pattern is no regular expression"),
        ({"pattern": "(" * 249 + "a" + ")" * 250}, "pattern is no regular expression"),
        ({"pattern": "a" * 501}, "at most 500 characters"),
        ({"pattern": "a{99999999999}"}, "pattern is no regular expression"),
        ({"pattern": 4}, "pattern must be a text of at most 500"),
        ({"pattern": "a", "on_multiple": "both"}, "on_multiple 'both' is none of first, last, fail"),
        ({"on_multiple": "last"}, "only a row with a pattern has on_multiple"),
        ({"pattern": "e", "on_multiple": "fail"}, "finds nothing in the row's own answer"),
        ({"pattern": "zebra"}, "finds nothing in the row's own answer"),
        ({"messages": [*CHAT["messages"], {"role": "user", "content": "And?"}]}, "the last message must be"),
        ({"messages": [{"role": "user", "content": "Q", "prefix": "x"}, CHAT["messages"][1]]}, "only an assistant's"),
        ({"messages": "Q"}, "messages"),
    ],
)
def test_jsonl_names_the_line_and_the_field_that_cannot_be_used(
    fields: dict[str, object], reason: str, tmp_path: Path
) -> None:
    error = refused("jsonl", write(tmp_path, {"validation.jsonl": lines(CHAT, CHAT | fields)}))
    assert [item.line for item in error.errors] == [2]
    assert reason in error.errors[0].detail


def test_a_pattern_that_never_ends_is_refused_and_holds_nobody_up(tmp_path: Path) -> None:
    """Python's own `re` would hold every thread of the service for years."""
    row = {"prompt": "Q", "completion": "a" * 60 + "b", "pattern": "(a|a)*$"}
    ticks = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.02):
            ticks.append(1)

    clock = threading.Thread(target=tick)
    clock.start()
    error = refused("jsonl", write(tmp_path, {"validation.jsonl": lines(row, row, row)}))
    stop.set()
    clock.join()
    assert [item.line for item in error.errors] == [1]
    assert "the pattern '(a|a)*$' takes too long on a text of 61 characters" in str(error)
    assert len(ticks) > 5


def test_a_pattern_as_large_as_the_memory_is_refused(tmp_path: Path) -> None:
    large = {"prompt": "Q", "completion": "a", "pattern": "(?:(?:(?:a{1000}){1000}){1000}){1000}"}
    error = refused("jsonl", write(tmp_path, {"validation.jsonl": lines(large)}))
    # on a machine that is busy or slow its second is over before anything is found
    assert re.search("finds nothing in the row's own answer|takes too (much memory|long)", str(error))
    hungry = {"prompt": "Q", "completion": "ab" * 5_000_000, "pattern": "(?:a|b|(c))*z"}
    error = refused("jsonl", write(tmp_path, {"validation.jsonl": lines(hungry)}))
    assert re.search("takes too (much memory|long) on a text of 10,000,000 characters", str(error))


def test_a_null_field_of_a_jsonl_row_is_a_missing_one(tmp_path: Path) -> None:
    """As in rows that a data frame has written."""
    nothing = dict.fromkeys(["subtask", "metric", "choices", "answers", "pattern", "on_multiple"])
    messages = [CHAT["messages"][0] | {"prefix": None}, CHAT["messages"][1] | {"prefix": None}]
    with_nulls, _ = read("jsonl", write(tmp_path / "a", {"a.jsonl": lines({"messages": messages, **nothing})}))
    without, _ = read("jsonl", write(tmp_path / "b", {"a.jsonl": lines({"messages": CHAT["messages"]})}))
    assert with_nulls == without


@pytest.mark.parametrize("name", ["mmlu_dev_285", "bbh_3shot_81", "gsm8k_val_30", "tydiqa_oneshot_9"])
def test_real_targets_are_read_as_jsonl(name: str, shared_data: Path) -> None:
    validation, _ = read("jsonl", shared_data / "targets" / f"{name}.jsonl")
    assert len(validation) == int(name.rpartition("_")[2])


# Storing -------------------------------------------------------------------------------------------------------------


def row(subtask: str, text: str) -> dict[str, object]:
    return {"prompt": text, "completion": "é\u2028", "subtask": subtask}


def test_a_stored_task_comes_back_ordered_by_subtask_and_then_as_in_its_file(tmp_path: Path) -> None:
    rows = [row("b", "1"), row("a", "2"), row("b", "3"), row("a", "4")]
    folder = write(tmp_path / "files", {"validation.jsonl": lines(*rows), "test.jsonl": lines(row("c", "5"))})
    tasks = Tasks(tmp_path / "store")
    stored = tasks.store("jsonl", folder)
    assert [row.example.prompt for row in tasks.validation(stored.id)] == ["2", "4", "1", "3"]
    assert [row.example.prompt for row in tasks.test(stored.id)] == ["5"]
    assert [(part.name, part.validation, part.test, part.metric) for part in stored.subtasks] == [
        ("a", 2, 0, "none"),
        ("b", 2, 0, "none"),
        ("c", 0, 1, "none"),
    ]
    assert stored.notes == [
        "validation rows for 2 of 3 subtasks, none for c",
        "test rows for 1 of 3 subtasks, none for a, b",
    ]


@pytest.mark.parametrize("kind", ["mmlu", "bbh", "tydiqa", "gsm8k"])
def test_what_is_stored_is_what_was_read(kind: str, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "eval" / kind
    tasks = Tasks(tmp_path)
    stored = tasks.store(kind, folder)
    validation, test = read(kind, folder)
    assert tasks.validation(stored.id) == sorted(validation, key=lambda row: row.subtask)
    assert tasks.test(stored.id) == sorted(test, key=lambda row: row.subtask)
    assert sum(part.validation for part in stored.subtasks) == len(validation)


def test_the_same_examples_are_the_same_task_and_others_are_not(tmp_path: Path) -> None:
    tasks = Tasks(tmp_path / "store")
    files = {"zip/validation.jsonl": lines(row("a", "1"), row("b", "2"))}
    first = tasks.store("jsonl", write(tmp_path / "1", files))
    spaced = {
        "validation.jsonl": b"\xef\xbb\xbf\r\n" + lines(row("b", "2"), row("a", "1")).replace("\n", "\r\n").encode()
    }
    again = tasks.store("jsonl", write(tmp_path / "2", spaced))
    other = tasks.store("jsonl", write(tmp_path / "3", {"validation.jsonl": lines(row("a", "1"), row("b", "3"))}))
    assert first.id == again.id != other.id
    assert sorted(path.name for path in (tmp_path / "store").glob("task_*")) == sorted([first.id, other.id])


def test_a_zip_of_a_folder_is_the_same_task_as_the_folder(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "eval" / "mmlu"
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as packed:
        for path in folder.rglob("*.csv"):
            packed.write(path, Path("mmlu") / path.relative_to(folder))
    with (tmp_path / "mmlu.zip").open("rb") as upload:
        unpack(upload, "mmlu.zip", tmp_path / "unpacked")
    tasks = Tasks(tmp_path / "store")
    assert tasks.store("mmlu", tmp_path / "unpacked") == tasks.store("mmlu", folder)


def test_each_kind_finds_its_own_files_in_a_folder_of_all_of_them(tmp_path: Path) -> None:
    question = {"question": "How many?", "answer": "#### 4"}
    files = {
        "mmlu/dev/anatomy_dev.csv": MMLU_ROW,
        "mmlu/test/anatomy_test.csv": MMLU_ROW,
        "bbh/bbh-three-shot.json": {"snarks": SNARKS},
        "bbh/test/snarks.json": {"examples": [{"input": "Four?", "target": "(D)"}]},
        "tydiqa/dev/tydiqa-one-shot.json": {"english": [asked("Who?", "Ada", context="Ada wrote it.")]},
        "tydiqa/test/tydiqa-goldp-v1.1-dev.json": squad(asked("Who?", "Ada", id="english-1")),
        "gsm8k/validation.jsonl": lines(question),
        "gsm8k/test.jsonl": lines(question),
    }
    write(tmp_path, files)
    for kind, validation in {"mmlu": 1, "bbh": 3, "tydiqa": 1, "gsm8k": 1}.items():
        assert [len(rows) for rows in read(kind, tmp_path)] == [validation, 1], kind


def test_a_problem_quotes_no_more_of_a_file_than_can_be_read(tmp_path: Path) -> None:
    error = refused(
        "gsm8k", write(tmp_path, {"validation.jsonl": '{"' + "k" * 9999 + '": 1, "' + "k" * 9999 + '": 1}'})
    )
    assert len(error.errors[0].detail) < 500


def test_a_file_that_is_read_whole_has_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.tasks.reading.WHOLE", 10)
    for kind, name in {"bbh": "bbh-three-shot.json", "mmlu": "anatomy_dev.csv"}.items():
        with pytest.raises(TooLarge, match=f"{name} has 11 bytes"):
            readers()[kind].read(write(tmp_path / kind, {name: "x" * 11}))


def test_files_that_were_not_read_are_mentioned(tmp_path: Path) -> None:
    files = {"law_dev.csv": "q,a,b,c,d,A\n", "law_val.csv": "", "notes/README": "", ".hidden": "", "__MACOSX/._x": ""}
    assert Tasks(tmp_path / "store").store("mmlu", write(tmp_path / "files", files)).notes == [
        "no test rows: the task can be selected for, not evaluated on",
        "not read: law_val.csv, notes/README",
    ]


@pytest.mark.parametrize("kind", ["mmlu", "bbh", "tydiqa", "gsm8k", "scienceqa", "scienceqa-written", "jsonl"])
def test_files_of_another_kind_are_refused_with_what_is_needed(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidTask, match=rf"a {kind} task needs .*; the upload holds notes\.md"):
        Tasks(tmp_path / "store").store(kind, write(tmp_path / "files", {"notes.md": ""}))
    assert not (tmp_path / "store").exists()


def test_a_task_without_validation_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidTask, match="nothing to select for"):
        Tasks(tmp_path / "store").store("mmlu", write(tmp_path / "files", {"law_dev.csv": ""}))


def test_a_subtask_with_two_metrics_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", {"validation.jsonl": lines(CHAT, CHAT | {"pattern": r"\d"})})
    with pytest.raises(InvalidTask, match="metrics none and exact_match"):
        Tasks(tmp_path / "store").store("jsonl", folder)


def test_validation_rows_need_no_metric_where_the_test_rows_have_one(tmp_path: Path) -> None:
    measured = CHAT | {"pattern": r"\d"}
    files = {"validation.jsonl": lines(CHAT), "test.jsonl": lines(measured)}
    assert [
        part.metric for part in Tasks(tmp_path / "store").store("jsonl", write(tmp_path / "files", files)).subtasks
    ] == ["exact_match"]
    other = {"validation.jsonl": lines(measured), "test.jsonl": lines(CHAT | {"metric": "token_f1"})}
    with pytest.raises(InvalidTask, match="metrics exact_match and token_f1"):
        Tasks(tmp_path / "store").store("jsonl", write(tmp_path / "other", other))


def test_a_deleted_task_is_gone_and_deleting_again_is_no_error(tmp_path: Path) -> None:
    tasks = Tasks(tmp_path / "store")
    task = tasks.store("jsonl", write(tmp_path / "files", {"validation.jsonl": lines(CHAT)})).id
    tasks.delete(task)
    tasks.delete(task)
    tasks.delete("../files")
    assert (tmp_path / "files").is_dir()
    for name in (task, "task_0", "../files"):
        with pytest.raises(NotFound):
            tasks.validation(name)


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    tasks = Tasks(tmp_path / "store")
    task = tasks.store("jsonl", write(tmp_path / "files", {"validation.jsonl": lines(CHAT)})).id
    path = tmp_path / "store" / task / "validation.jsonl"
    path.write_bytes(path.read_bytes().replace(b"4", b"5"))
    with pytest.raises(Damaged, match=r"validation\.jsonl"):
        tasks.validation(task)
    path.unlink()
    with pytest.raises(Damaged):
        tasks.validation(task)


def test_a_new_kind_of_task_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = """
from datastore.tasks.reading import TaskExample, TaskFolder, TaskRows, question

class Riddles:
    kind = "riddles"

    def read(self, folder):
        task = TaskFolder(folder, kind=self.kind)
        path = task.only(task.require(task.find("riddles.txt"), "riddles.txt"))
        asked, answer = task.text(path).split("=")
        return task.finish(TaskRows([TaskExample(question("riddles", "1", asked, answer), "all", "none")]))

READER = Riddles()
"""
    write(tmp_path, {"plugins/riddles.py": module, "files/riddles.txt": "What?=That."})
    monkeypatch.setattr(datastore.tasks, "__path__", [*datastore.tasks.__path__, str(tmp_path / "plugins")])
    stored = Tasks(tmp_path / "store").store("riddles", tmp_path / "files")
    assert [(part.name, part.validation) for part in stored.subtasks] == [("all", 1)]


def test_an_unknown_kind_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidTask, match="there are bbh, gsm8k, jsonl, mmlu, scienceqa, scienceqa-written, tydiqa"):
        Tasks(tmp_path).store("squad", tmp_path)
