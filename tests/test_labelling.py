"""A labeller: asked once for each row, at its rate, at no other address, and read strictly."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import typer
from gradstore.types import AnnotationRequest, AnnotationResult, AnyJob, Capability, Labeller
from pydantic import SecretStr, ValidationError
from sqlalchemy import text

from datastore import redaction, taxonomies
from datastore.annotations import Reply
from datastore.errors import InvalidInput, LabellerFails, LabellerRefuses
from datastore.options import configured
from datastore.processes import environment
from datastore.redaction import HIDDEN, guard, redacted
from datastore.rows import Example, Message
from datastore.settings import Settings
from tests.labellers import Answer, Endpoint, chat, endpoint, failing
from tests.test_streams import with_ids
from tests.workplace import Workplace
from worker import labelling
from worker.labelling import Asking, NotWanted, Rate, question_of

KEY = "sk-labeller-key-Zx91"
CAPABILITIES = [Capability(name=name) for name in ("Sums", "Manners", "Poetry")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "PAUSE", 0.001)


@pytest.fixture
def unguarded() -> Iterator[None]:
    """What a test has this process hide is hidden during the test only."""
    handlers = {handler: handler.formatter for handler in logging.getLogger().handlers}
    known = list(redaction._known)
    yield
    redaction._known[:] = known
    for handler, formatter in handlers.items():
        handler.setFormatter(formatter)


def place(tmp_path: Path, url: str, **settings: Any) -> Workplace:
    workplace = Workplace.at(tmp_path, labellers=url, **settings)
    taxonomies.record(workplace.context.catalog, CAPABILITIES, name="small")
    return workplace


def asked(workplace: Workplace, pool: str, **labeller: Any) -> AnyJob:
    request = {"dataset": pool, "by": "labeller", "taxonomy": "small", "labeller": {"model": "m", **labeller}}
    return workplace.context.annotations.start(AnnotationRequest.model_validate(request))[0]


def result_of(workplace: Workplace, id: str) -> AnnotationResult:
    job = workplace.job(id)
    assert job.status == "succeeded", job.error
    return AnnotationResult.model_validate(job.result.model_dump() if job.result else None)


def by_number(asked: str) -> Answer:
    """Sums of every row, manners of those that say please, and prose about row 4."""
    if "Add 4 and 5" in asked:
        return chat("A rather long answer")
    return chat("A, B" if "please" in asked else "A")


def test_a_labeller_is_asked_about_every_row_and_read_strictly(tmp_path: Path) -> None:
    with endpoint(by_number) as server:
        workplace = place(tmp_path, server.url)
        pool = workplace.pool(with_ids(7))
        job = asked(workplace, pool.id, temperature=0.25)
        assert workplace.work() == ["succeeded"]
    labels, known = workplace.context.annotations.labels(job.id)
    polite = [row % 4 > 0 for row in range(7)]
    assert known.tolist() == [row != 4 for row in range(7)]
    np.testing.assert_array_equal(labels[known], np.array([[True, each, False] for each in polite])[known])
    result = result_of(workplace, job.id)
    assert [each.rows for each in result.capabilities] == [6, 5, 0]
    assert [(each.row, each.id, each.reply) for each in result.unparsed] == [(4, "row-4", "A rather long answer")]
    assert (result.labelled_rows, result.total_unparsed) == (6, 1)
    assert Counter(server.paths) == {"/v1/chat/completions": 7}
    assert len(set(server.questions)) == 7
    assert {body["temperature"] for body in server.asked} == {0.25}
    everything = str(server.asked)
    assert "The answer is" not in everything  # of the completions
    assert "A. Sums" in everything


def test_unparsed_replies_are_asked_for_again_and_nothing_else(tmp_path: Path) -> None:
    with endpoint(by_number) as server:
        workplace = place(tmp_path, server.url)
        first = asked(workplace, workplace.pool(with_ids(7)).id)
        workplace.work()
        before = workplace.context.annotations.labels(first.id)
        server.asked.clear()
        server.answer = lambda _: chat("C")
        again, works = workplace.context.annotations.start(AnnotationRequest(again=first.id))
        assert works
        assert again.id != first.id
        workplace.work()
        assert [question.startswith("Add 4 and 5") for question in server.questions] == [True]
    labels, known = workplace.context.annotations.labels(again.id)
    assert known.all()
    assert labels[4].tolist() == [False, False, True]
    others = np.arange(7) != 4
    np.testing.assert_array_equal(labels[others], before[0][others])
    assert result_of(workplace, again.id).total_unparsed == 0
    for old, now in zip(before, workplace.context.annotations.labels(first.id), strict=True):
        np.testing.assert_array_equal(old, now)  # what was finished has not changed


def test_rows_that_have_a_reply_are_not_asked_for_after_a_failure(tmp_path: Path) -> None:
    served = itertools.count()

    def answer(_: str) -> Answer:
        return chat("B") if next(served) < 3 else failing(503)

    with endpoint(answer) as server:
        workplace = place(tmp_path, server.url, max_attempts=1)
        job = asked(workplace, workplace.pool(with_ids(6)).id, parallel=1, attempts=2)
        assert workplace.work() == ["failed"]
        error = workplace.job(job.id).error
        assert error is not None
        assert "has failed 2 times in a row (status 503)" in error.detail
        kept = list(dict.fromkeys(server.questions))[:3]
        server.asked.clear()
        server.answer = lambda _: chat("A")
        workplace.context.jobs.retry(job.id)
        assert workplace.work() == ["succeeded"]
        assert not set(server.questions) & set(kept)
        assert len(server.questions) == 3
    assert workplace.context.annotations.labels(job.id)[0].sum(0).tolist() == [3, 3, 0]


def test_a_failing_endpoint_is_asked_again_after_a_pause_that_doubles_or_that_it_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(labelling, "PAUSE", 2.0)
    statuses = iter([failing(500), failing(429, retry_after="7"), failing(502), chat("C")])
    waited: list[float] = []

    class Impatient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0)
            return False

    with endpoint(lambda _: next(statuses)) as server, httpx.Client() as http:
        labeller = Labeller(model="m", attempts=4)
        asking = Asking(http, server.url, labeller, CAPABILITIES, Rate(100), Impatient())
        assert asking.reply(0, Example("x", "o", prompt="Add.", completion="3")).labels == [2]
    assert waited == [2.0, 7.0, 8.0]


def test_a_redirect_is_not_followed_and_a_refusal_fails_the_job_at_once(tmp_path: Path) -> None:
    with endpoint(lambda _: chat("A")) as other, endpoint(lambda _: failing(302, location=other.url)) as server:
        workplace = place(tmp_path, server.url)
        job = asked(workplace, workplace.pool(with_ids(3)).id, parallel=1)
        assert workplace.work() == ["failed"]
        assert not other.asked
        error = workplace.job(job.id).error
    assert error is not None
    assert "answers 302" in error.detail
    assert "redirects are not followed" in error.detail


def test_only_addresses_of_the_setting_are_asked(tmp_path: Path) -> None:
    workplace = place(tmp_path, "https://one.example/v1,https://two.example/v1/")
    pool = workplace.pool(with_ids(1)).id
    for url in ("http://169.254.169.254/latest", "https://one.example/v1/..", "https://one.example.evil.example/v1"):
        with pytest.raises(InvalidInput, match="none of them"):
            asked(workplace, pool, url=url)
    with pytest.raises(InvalidInput, match="say which"):
        asked(workplace, pool)
    assert asked(workplace, pool, url="https://two.example/v1").status == "queued"
    closed = Workplace.at(tmp_path, model=workplace.model)
    with pytest.raises(InvalidInput, match="GRADSTORE_LABELLERS"):
        asked(closed, pool, url="https://two.example/v1")
    assert closed.work() == ["failed"]  # a worker that is not told of the address does not ask it either


@pytest.mark.usefixtures("unguarded")
def test_a_key_goes_to_its_own_address_and_is_nowhere_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    reply = f"your key is {KEY}"
    with endpoint(lambda _: chat(reply)) as mine, endpoint(lambda _: chat("A")) as other:
        workplace = place(tmp_path, f"{other.url},{mine.url}", labeller_keys=SecretStr(f",{KEY}"))
        guard(workplace.context.settings)
        pool = workplace.pool(with_ids(2)).id
        jobs = [asked(workplace, pool, url=url) for url in (mine.url, other.url)]
        workplace.work()
    assert {headers.get("authorization") for headers in mine.headers} == {f"Bearer {KEY}"}
    assert {headers.get("authorization") for headers in other.headers} == {None}
    assert {each.reply for each in result_of(workplace, jobs[0].id).unparsed} == {f"your key is {HIDDEN}"}
    with workplace.context.catalog.engine.connect() as connection:
        for table in ("jobs", "shards", "replies"):
            assert KEY not in str(connection.execute(text(f"SELECT * FROM {table}")).all())  # noqa: S608 - ours
    assert KEY not in caplog.text
    assert KEY not in repr(workplace.context.settings)


@pytest.mark.parametrize(
    "labellers",
    [
        {},
        {"labellers": ("https://a.example:8443/v1",)},
        {"labellers": ("https://a.example/v1", "https://b.example/v1"), "labeller_keys": SecretStr(f",{KEY}")},
    ],
)
def test_the_embedded_worker_is_told_of_the_labellers_and_their_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labellers: dict[str, Any]
) -> None:
    settings = Settings(data=tmp_path, **labellers)
    for name, value in environment(settings).items():
        if name.startswith("GRADSTORE_"):
            monkeypatch.setenv(name, value)
    told = Settings()
    assert told.labellers == settings.labellers
    assert [told.labeller_key(url) for url in told.labellers] == [settings.labeller_key(url) for url in told.labellers]


def test_a_command_names_the_setting_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_LABELLER_KEYS", KEY)
    with pytest.raises(typer.BadParameter, match=r"GRADSTORE_LABELLER_KEYS: .*more keys") as refused:
        configured()
    assert KEY not in str(refused.value)


@pytest.mark.usefixtures("unguarded")
def test_the_keys_of_labellers_are_hidden_from_the_log() -> None:
    keys = SecretStr(f"{KEY},other-key-Zx92")
    guard(Settings(labellers=("https://a.example", "https://b.example"), labeller_keys=keys))
    assert redacted(f"{KEY} other-key-Zx92") == f"{HIDDEN} {HIDDEN}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"labellers": ("ftp://a.example",)},
        {"labellers": ("https://user:secret-Zx93@a.example",)},
        {"labellers": ("not a url",)},
        {"labellers": (), "labeller_keys": KEY},
        {"labellers": ("https://a.example",), "labeller_keys": f"{KEY},b"},
    ],
)
def test_settings_of_labellers_that_cannot_be_meant_are_refused_without_their_keys(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(**wrong)
    assert KEY not in str(refused.value)
    assert "Zx93" not in str(refused.value)


def test_no_more_calls_begin_within_a_minute_than_the_rate_says() -> None:
    now = 0.0
    rate = Rate(10, clock=lambda: now)
    begun = []
    for number in range(200):
        begun.append(now + rate.reserve())
        now += 0.5 * (number % 3)  # some calls come sooner than they may begin, some later
    assert begun == sorted(begun)
    for first, last in zip(begun, begun[10:], strict=False):
        assert last - first >= 60
    assert begun[9] == pytest.approx(4.5)  # the first ten did not wait


def test_a_rate_is_kept_by_all_who_ask_at_once() -> None:
    rate = Rate(50, clock=lambda: 0.0)
    found: list[float] = []
    threads = [threading.Thread(target=lambda: found.extend(rate.reserve() for _ in range(25))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(found) == {60.0 * minute: 50 for minute in range(4)}


def test_waiting_for_a_place_ends_when_nothing_more_is_wanted() -> None:
    asking = Asking(httpx.Client(), "http://127.0.0.1:9", Labeller(model="m"), CAPABILITIES, Rate(1, clock=lambda: 0.0))
    asking.rate.reserve()
    asking.unwanted.set()
    with pytest.raises(NotWanted):
        asking.reply(0, Example("x", "o", prompt="Add.", completion="3"))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {}, b"<html>"), "the answer is no chat completion"),
        ((200, {}, b'{"choices": []}'), "the answer is no chat completion"),
        (chat(None), "the reply has no text"),
        (chat(""), "an empty reply"),
        (failing(400), "the endpoint refuses this row with the status 400"),
    ],
)
def test_what_is_no_reply_is_said_of_the_row(answer: Answer, said: str) -> None:
    with endpoint(lambda _: answer) as server:
        reply = ask(server)
    assert reply.labels is None
    assert reply.said == said


def test_an_answer_without_an_end_is_not_read_to_its_end() -> None:
    with endpoint(lambda _: (200, {}, b"x" * (labelling.MAX_REPLY + 1))) as server, pytest.raises(LabellerRefuses):
        ask(server)


def test_an_endpoint_that_is_not_there_fails_the_job_so_that_it_can_be_retried() -> None:
    with endpoint(lambda _: chat("A")) as server:
        pass
    with pytest.raises(LabellerFails, match="ConnectError"):
        ask(server)


def ask(server: Endpoint) -> Reply:
    with httpx.Client() as http:
        asking = Asking(http, server.url, Labeller(model="m"), CAPABILITIES, Rate(100))
        return asking.reply(0, Example("x", "o", prompt="Add.", completion="3"))


def test_the_question_is_the_first_of_the_user_and_never_the_answer() -> None:
    turns = (
        Message("system", "Be nice."),
        Message("user", "First?"),
        Message("assistant", "Yes."),
        Message("user", "2?"),
    )
    assert question_of(Example("x", "o", messages=turns)) == "First?"
    assert question_of(Example("x", "o", prompt="Add.", completion="3")) == "Add."
    assert question_of(Example("x", "o", prompt="", completion="A text.")) is None
