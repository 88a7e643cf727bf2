"""Asking a chat model about rows: at a rate, in parallel, again where the endpoint fails, and never anywhere else.

The endpoint is an OpenAI-compatible one that the settings of this worker allow; redirects are not followed, a reply is
read up to `MAX_REPLY` bytes, and what becomes of it is the strict reading of datastore/letters.py. Needs no torch.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import httpx
from gradstore.types import Capability, Labeller

from datastore.annotations import Reply
from datastore.errors import LabellerFails, LabellerRefuses
from datastore.letters import INSTRUCTIONS, options, question
from datastore.rows import Example

MINUTE = 60.0  # seconds
TIMEOUT = 120.0  # seconds that an endpoint may be silent
MAX_REPLY = 1 << 22  # bytes of an answer
PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds before the second attempt, each next one after twice as long, and at most
LOOK = 0.5  # seconds between two looks whether the work is still wanted
REFUSALS = {401, 403, 404, 405}
"""Answers that every other row would get, too."""
NO_QUESTION = "the row has no question: no prompt and no turn of a user"


class NotWanted(Exception):
    """The work is not to be gone on with."""


class Rate:
    """At most so many calls begun within any `seconds`, by whatever clock."""

    def __init__(self, calls: int, *, seconds: float = MINUTE, clock: Callable[[], float] = time.monotonic) -> None:
        self._calls, self._seconds, self._clock = calls, seconds, clock
        self._begun: deque[float] = deque(maxlen=calls)
        self._lock = threading.Lock()

    def reserve(self) -> float:
        """Take the next place; seconds until the call may begin. Nobody waits for others inside."""
        with self._lock:
            now = self._clock()
            due = now if len(self._begun) < self._calls else max(now, self._begun[0] + self._seconds)
            self._begun.append(due)
            return due - now


@dataclass(frozen=True)
class Asking:
    """Asks one endpoint about rows."""

    http: httpx.Client
    url: str
    labeller: Labeller
    capabilities: Sequence[Capability]
    rate: Rate
    unwanted: threading.Event = field(default_factory=threading.Event)
    """Set when nothing more is to be asked."""

    def reply(self, row: int, example: Example) -> Reply:
        """Ask about a row. Raises `LabellerRefuses`, `LabellerFails` and `NotWanted`."""
        text = question_of(example)
        if text is None:
            return Reply(row, None, NO_QUESTION)
        said = self._said(question(self.capabilities, text))
        found = options(said, len(self.capabilities))
        return Reply(row, found, None if found is not None else said or "an empty reply")

    def _said(self, text: str) -> str:
        """What the endpoint replies, tried `attempts` times."""
        pause = PAUSE
        for attempt in range(1, self.labeller.attempts + 1):
            self._sleep(self.rate.reserve())
            try:
                return self._once(text)
            except _Passing as error:
                if attempt == self.labeller.attempts:
                    raise LabellerFails(
                        f"{self.url} has failed {attempt} times in a row ({error}): its replies so far are kept, and "
                        "POST /jobs/{id}/retry, with the job's id, goes on from there"
                    ) from error
                self._sleep(error.after if error.after is not None else pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("attempts is at least 1")

    def _once(self, text: str) -> str:
        body = {
            "model": self.labeller.model,
            "temperature": self.labeller.temperature,
            "top_p": self.labeller.top_p,
            "max_tokens": self.labeller.max_tokens,
            "messages": [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": text}],
        }
        try:
            with self.http.stream("POST", f"{self.url}/chat/completions", json=body) as answer:
                status, after = answer.status_code, _seconds(answer.headers.get("retry-after"))
                content = _read(answer) if status == 200 else b""
        except httpx.TransportError as error:
            raise _Passing(type(error).__name__, None) from error
        if status == 429 or status >= 500:
            raise _Passing(f"status {status}", after)
        if status in REFUSALS or 300 <= status < 400:
            raise LabellerRefuses(
                f"{self.url}/chat/completions answers {status}: check the URL in GRADSTORE_LABELLERS, its key in "
                "GRADSTORE_LABELLER_KEYS, and the model's name; redirects are not followed"
            )
        return _content(content) if status == 200 else f"the endpoint refuses this row with the status {status}"

    def _sleep(self, seconds: float) -> None:
        """Wait, unless nothing more is to be asked. Raises `NotWanted`."""
        if self.unwanted.wait(seconds) if seconds > 0 else self.unwanted.is_set():
            raise NotWanted


def replies(
    asking: Asking, rows: Iterable[tuple[int, Example]], *, check: Callable[[], None]
) -> Generator[list[Reply], None, None]:
    """Ask about rows, several at a time; what has come is given as soon as it is there, in no order.

    `check` is called at least every `LOOK` seconds, and its exception ends the work. Where a row raises, those that
    came with it are given first.
    """
    with ThreadPoolExecutor(asking.labeller.parallel, "labeller") as pool:
        pending: set[Future[Reply]] = set()
        try:
            for row, example in rows:
                pending.add(pool.submit(asking.reply, row, example))
                while len(pending) >= 2 * asking.labeller.parallel:
                    pending = yield from _arrived(pending, check)
            while pending:
                pending = yield from _arrived(pending, check)
        finally:
            asking.unwanted.set()
            for future in pending:
                future.cancel()


def _arrived(
    pending: set[Future[Reply]], check: Callable[[], None]
) -> Generator[list[Reply], None, set[Future[Reply]]]:
    """Give what has come, and return what has not."""
    done, pending = wait(pending, timeout=LOOK, return_when=FIRST_COMPLETED)
    check()
    good = [future.result() for future in done if future.exception() is None]
    if good:
        yield good
    for future in done:
        future.result()
    return pending


def question_of(example: Example) -> str | None:
    """What a labeller is asked about: the prompt, or the first turn of the user; never the answer."""
    found = example.prompt or next((turn.content for turn in example.messages if turn.role == "user"), "")
    return found if found.strip() else None


class _Passing(Exception):
    """What may go better the next time."""

    def __init__(self, reason: str, after: float | None) -> None:
        super().__init__(reason)
        self.after = after
        """Seconds that the endpoint asks to wait."""


def _seconds(header: str | None) -> float | None:
    try:
        return None if header is None else min(max(float(header), 0.0), LONGEST_PAUSE)
    except ValueError:  # a date
        return None


def _read(answer: httpx.Response) -> bytes:
    content = bytearray()
    for piece in answer.iter_bytes():
        content += piece
        if len(content) > MAX_REPLY:
            raise LabellerRefuses(f"the endpoint sends more than {MAX_REPLY:,} bytes in one answer: is it a chat API?")
    return bytes(content)


def _content(answer: bytes) -> str:
    """The text of a chat completion; of anything else, words that are no list of letters."""
    try:
        found: Any = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return "the answer is no chat completion"
    return found if isinstance(found, str) else "the reply has no text"
