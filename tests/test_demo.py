"""The demo: labels that are right, skills that nobody could tell by length, and a verdict that can be a bad one."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from gradstore.types import EvaluationRow

from examples.demo.__main__ import Outcome, _report
from examples.demo.skills import LONGEST, SHORTEST, SKILLS, pool, target

ANSWERS = {
    "copy": "d a c b e",
    "reverse": "e b c a d",
    "sort": "a b c d e",
    "descend": "e d c b a",
    "rotate": "a c b e d",
    "back": "e d a c b",
    "swap": "a d b c e",
    "next": "e b d c f",
    "mirror": "m p n o l",
    "spread": "d c e a b",
}


@pytest.mark.parametrize("skill", SKILLS)
def test_a_skill_does_what_its_name_says(skill: str) -> None:
    assert SKILLS[skill][1](["d", "a", "c", "b", "e"]) == ANSWERS[skill].split()


def test_every_skill_has_its_share_of_the_pool() -> None:
    rows = list(pool(1000, seed=0))
    assert Counter(row["dataset"] for row in rows) == dict.fromkeys(SKILLS, 100)
    for row in rows:
        question, answer = (turn["content"] for turn in row["messages"])
        word, _, letters = question.partition(" : ")
        words, function = SKILLS[row["dataset"]]
        assert word in words
        assert answer.split() == function(letters.split())


def test_length_says_nothing_about_the_skill() -> None:
    """Guessing the skill from the answer's length is right as often as always guessing the same one, within chance."""
    lengths: dict[int, Counter[str]] = defaultdict(Counter)
    rows = list(pool(20_000, seed=1))
    for row in rows:
        lengths[len(row["messages"][1]["content"].split())][row["dataset"]] += 1
    assert set(lengths) == set(range(SHORTEST, LONGEST + 1))
    right = sum(skills.most_common(1)[0][1] for skills in lengths.values())
    assert right / len(rows) < 1 / len(SKILLS) + 0.01


def test_target_rows_and_pool_rows_are_drawn_apart() -> None:
    seen = {row["messages"][0]["content"] for row in target("mirror", 50, seed=1)}
    other = {row["messages"][0]["content"] for row in target("mirror", 50, seed=2)}
    assert len(seen & other) < 5


def outcome(*, selected: float, drawn: float, share: float) -> Outcome:
    """What a seed gives whose trainings end with these target losses, and whose selection has this share."""
    losses = {"base": 1.0, "selected 5 %": selected, "random 5 %": drawn, "all rows": 0.1}
    return Outcome(
        share=share,
        pool_share=0.1,
        rows=dict.fromkeys(list(losses)[1:], 100),
        measured={
            label: EvaluationRow(
                model="tuned", task="task_0", task_name="mirror", subtask=None, examples=200, loss=loss,
                loss_interval=None, metric="exact_match", value=0.5, interval=None, unparsed=0,
            )
            for label, loss in losses.items()
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        pytest.param([outcome(selected=0.7, drawn=0.9, share=0.6)] * 3, 0, id="better and of the right kind"),
        pytest.param([outcome(selected=0.9, drawn=0.9, share=0.6)] * 3, 1, id="no better than random"),
        pytest.param(
            [outcome(selected=0.7, drawn=0.9, share=0.2)] * 3, 1, id="twice the pool's share, not three times"
        ),
        pytest.param([outcome(selected=float("nan"), drawn=0.9, share=0.6)] * 3, 1, id="a loss that is no number"),
        pytest.param(
            [outcome(selected=0.7, drawn=0.9, share=0.6), outcome(selected=1.4, drawn=0.9, share=0.6)],
            1,
            id="worse in the mean over seeds",
        ),
    ],
)
def test_the_demo_fails_unless_the_selection_has_proven_itself(
    outcomes: list[Outcome], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _report(outcomes, seconds=1.0) == status
    assert ("NOT proven" in capsys.readouterr().out) == bool(status)
