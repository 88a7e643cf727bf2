"""The regular expressions of tasks, which come from outside: searched for in a process of their own, within limits.

On the wrong text an expression such as `(a+)+$` takes for ever, and Python's `re` lets nothing else of its process go
on meanwhile: no heartbeat, no other request. (The package `regex` has a time limit for a search but none for reading an
expression, and forty characters make it take all memory.) The process is this file as a script, so it imports nothing
but the standard library; a search in it costs some 50 µs more than one in this process.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Literal, NoReturn, cast

OnMultiple = Literal["first", "last", "fail"]
"""Which of several places in a text counts, or that none of them does."""
SECONDS = 1.0  # of processor time, for reading an expression and searching for it in one text
MEMORY = 1 << 30  # bytes


class BadPattern(ValueError):
    """An expression that cannot be used; the message is told to the task's user."""


class SlowPattern(BadPattern):
    """It takes too long: another text would do no better, so nothing more should be tried."""


class Patterns:
    """Searches for expressions in texts; the process is there from the first search to the end of the `with` block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def find(self, pattern: str, text: str, *, on_multiple: OnMultiple = "first") -> str | None:
        """What the expression finds in the text, of several places the one meant: its first group, where it has one.

        None: it finds nothing, or, where that is to `fail`, something in several places. Raises `BadPattern` for what
        is no expression, and `SlowPattern`.

        >>> with Patterns() as patterns:
        ...     [patterns.find("is (.)", "is A is A", on_multiple=each) for each in ("first", "last", "fail")]
        ['A', 'A', None]
        """
        answer = self._ask([pattern, text, on_multiple])
        if "wrong" in answer:
            raise BadPattern(f"pattern is no regular expression: {answer['wrong']}")
        if "slow" in answer:
            raise SlowPattern(
                f"the pattern {pattern!r} takes too {answer['slow']} on a text of {len(text):,} characters: rewrite it "
                "so that it has no repetition inside a repetition, such as (a+)+"
            )
        return answer["found"]

    def _ask(self, question: Sequence[str]) -> dict[str, str | None]:
        if self._process is None:
            self._process = subprocess.Popen(  # noqa: S603 - this file
                [sys.executable, "-I", "-S", "-W", "ignore", __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                start_new_session=True,  # a Ctrl-C is for the server
            )  # fmt: skip
        questions, answers = cast("tuple[IO[str], IO[str]]", (self._process.stdin, self._process.stdout))
        questions.write(json.dumps(question) + "\n")
        questions.flush()
        line = answers.readline() or '{"slow": "much memory"}'  # the process itself has ended
        answer: dict[str, str | None] = json.loads(line)
        return answer

    def __enter__(self) -> Patterns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate()  # the end of its input is the end of it
            self._process = None


# The process ----------------------------------------------------------------------------------------------------------


def _serve() -> None:
    """Answer each line of stdin, the arguments of `find`, with one of `{"found": …}`, `{"wrong": …}`, `{"slow": …}`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _interrupt)  # `re` looks for signals while it searches
    for line in sys.stdin:
        pattern, text, on_multiple = json.loads(line)
        try:
            answer = _answer(pattern, text, on_multiple)
        except TimeoutError:  # the signal came when the search was over and its timer not yet off
            answer = {"slow": "long"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(pattern: str, text: str, on_multiple: OnMultiple) -> dict[str, str | None]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        matches = re.finditer(pattern, text)
        match = next(matches, None)
        if on_multiple == "last":
            match = next(iter(deque(matches, maxlen=1)), match)
        elif on_multiple == "fail" and next(matches, None) is not None:
            match = None
        return {"found": match[1 if match.re.groups else 0] if match else None}
    except (re.error, OverflowError, RecursionError) as error:
        return {"wrong": str(error)}
    except TimeoutError:
        return {"slow": "long"}
    except MemoryError:
        return {"slow": "much memory"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _interrupt(*_: object) -> NoReturn:
    raise TimeoutError


if __name__ == "__main__":
    _serve()
