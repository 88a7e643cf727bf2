"""What can be wrong, in the words of the datastore; status codes are the service's business.

    GradstoreError
    ├── NotFound
    ├── InvalidInput
    │   ├── InvalidDataset
    │   ├── InvalidTask
    │   ├── InvalidCheckpoint
    │   ├── InvalidFeatures
    │   ├── LabellerRefuses
    │   └── PathNotAllowed
    ├── TooLarge
    ├── NotEnoughSpace
    ├── Damaged
    ├── BucketUnreachable
    │   └── BucketRefused
    ├── HubUnreachable
    │   └── DownloadFailed
    ├── LabellerFails
    ├── Busy
    └── Conflict
        ├── NameTaken
        ├── NamedOtherwise
        ├── InUse
        ├── GradientsMissing
        ├── ForeignProjection
        └── Ambiguous

Every message says what to do next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from gradstore.types import Problem, ProblemItem

from datastore.redaction import redacted


class GradstoreError(Exception):
    """Base of all errors a user can act upon."""


class NotFound(GradstoreError):
    """Nothing has this id or name."""

    def __init__(self, noun: str, name: str, *, collection: str | Sequence[str], of: str = "") -> None:
        """`noun` stands behind "no" in the message; `collection` is the path, or the paths, that list what there is.

        `of` is what the message begins with: the part of a request that names it.
        """
        paths = [collection] if isinstance(collection, str) else collection
        listed = " and ".join(f"GET {path}" for path in paths) + (" lists" if len(paths) == 1 else " list")
        super().__init__(f"{of}no {noun} is called {name!r}; {listed} what there is")
        self.noun = noun
        self.name = name
        self.collection = collection


class InvalidInput(GradstoreError):
    """What was sent cannot be used; `errors` names the places."""

    def __init__(self, detail: str, *, errors: Sequence[ProblemItem] = (), total_errors: int | None = None) -> None:
        super().__init__(detail)
        self.errors = list(errors)
        self.total_errors = len(self.errors) if total_errors is None else total_errors


def refusal(detail: str, pointer: str) -> InvalidInput:
    """What is wrong at one place of a request's body, in the words in which the service refuses a body by itself."""
    return InvalidInput(f"{pointer}: {detail}", errors=[ProblemItem(pointer=pointer, detail=detail)])


class InvalidDataset(InvalidInput):
    """A file that is no dataset, or a dataset with rows that cannot be taken."""


class InvalidTask(InvalidInput):
    """Files that are not the task they are said to be."""


class InvalidCheckpoint(InvalidInput):
    """Files that are no adapter, or an adapter that does not fit its base model or its optimizer state."""


class InvalidFeatures(InvalidInput):
    """Files that are no features, or not those of the rows that they are said to be of."""


class PathNotAllowed(InvalidInput):
    """A server path outside the allowed roots."""


class TooLarge(GradstoreError):
    """An upload beyond the configured limit."""


class NotEnoughSpace(GradstoreError):
    """The disk cannot hold what the job would write."""

    def __init__(self, *, needed: int, free: int) -> None:
        super().__init__(
            f"the job would write {needed:,} bytes and {free:,} are free where the store lies: "
            "free some space, or ask for fewer checkpoints or a smaller dim"
        )
        self.needed = needed
        self.free = free


class Damaged(GradstoreError):
    """Stored bytes do not match their checksum."""


class BucketUnreachable(GradstoreError):
    """The object store that holds the store does not answer, or not as one: what was at work is to be tried again."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"{url} cannot be reached ({reason}): try again later, or check GRADSTORE_STORE and the AWS_ variables of "
            "the service and its workers"
        )


class BucketRefused(BucketUnreachable):
    """The object store answers and refuses: another bucket, key or right is needed."""


class HubUnreachable(GradstoreError):
    """The Hugging Face Hub does not say which commit a model's name means, and no download does."""

    advice = (
        "the Hugging Face Hub cannot be asked which commit of {model!r} is meant ({reason}), and no download on this "
        "machine says it: try again later, or send the commit's 40 digits as `revision`"
    )

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(self.advice.format(model=model, reason=reason))
        self.model = model


class DownloadFailed(HubUnreachable):
    """The Hugging Face Hub does not give the files of a model that a worker needs and does not have."""

    advice = (
        "the Hugging Face Hub does not give {model!r} ({reason}), and the worker's machine has no whole download of "
        "it: send the same request again when the hub answers, or have the model downloaded there beforehand"
    )


class LabellerRefuses(InvalidInput):
    """A labeller's endpoint answers, and not as an OpenAI-compatible API that takes this request."""


class LabellerFails(GradstoreError):
    """A labeller's endpoint has failed as often as may be; the job can be retried."""


class Busy(GradstoreError):
    """Others are being answered, one after the other, and this one's turn has not come: to be asked again."""


class Conflict(GradstoreError):
    """The request is right in itself and does not fit what is stored."""


class NameTaken(Conflict):
    """The name belongs to other content."""

    def __init__(self, noun: str, name: str, holder: str, *, movable: bool) -> None:
        otherwise = "send replace=true to move it" if movable else f"rename {holder} first"
        super().__init__(f"the name {name!r} belongs to {noun} {holder}; choose another, or {otherwise}")
        self.holder = holder


class NamedOtherwise(Conflict):
    """The same content is stored under another name, which somebody relies on; `id` is its own."""

    def __init__(self, id: str, name: str, *, otherwise: str) -> None:
        super().__init__(f"the same content is called {name!r} already ({id}): use that name, or {otherwise}")
        self.id = id


class InUse(Conflict):
    """Something else still needs this."""

    def __init__(self, noun: str, name: str, users: Sequence[str]) -> None:
        shown = ", ".join(users[:5]) + (" …" if len(users) > 5 else "")
        super().__init__(f"{noun} {name} is used by {shown}: delete these first")
        self.users = list(users)


class GradientsMissing(Conflict):
    """Features that the answer needs have not been computed; `body` is the POST /gradients that computes them."""

    def __init__(self, detail: str, *, body: dict[str, object]) -> None:
        super().__init__(detail)
        self.body = body


class ForeignProjection(Conflict):
    """Imported features would have to be compared with features of another projection, which means nothing."""


class Ambiguous(Conflict):
    """Several stored things fit the request; `choices` are paths with a query each, one of which is meant.

    Clients read the queries: what differs in them is what the request is to say.
    """

    def __init__(self, detail: str, *, choices: Sequence[str]) -> None:
        super().__init__(detail)
        if strange := [choice for choice in choices if not choice.startswith("/") or "?" not in choice]:
            raise ValueError(f"{strange[0]!r} is no path with a query")
        self.choices = list(choices)


def several(
    found: str, names: Sequence[str], *, parameter: str, path: str, said: Mapping[str, object] | None = None
) -> Ambiguous:
    """What a request is answered with that would take the only one there is, where there are several: `found` says of
    what, `parameter` tells them apart by their `names`, and what else was `said` stays.
    """
    choices = [f"{path}?{urlencode({**(said or {}), parameter: name}, doseq=True)}" for name in names]
    detail = f"{found}; say which one is meant ({parameter}), for example {parameter}={names[0]}"
    return Ambiguous(detail, choices=choices)


class UnexpectedError(Exception):
    """What nobody foresaw, in the words that the user is told."""


def is_outage(error: Exception) -> bool:
    """Whether the store is away for a while, which is nobody's fault: what was at work waits. A refusal lasts."""
    return isinstance(error, BucketUnreachable) and not isinstance(error, BucketRefused)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def problem_of(
    error: Exception, *, status: int, instance: str | None, errors: Sequence[ProblemItem] = (), total_errors: int = 0
) -> Problem:
    """An error as RFC 9457 has it, its type and title made from its name; which status it has, the caller knows.

    `errors` are the places it names; those of an `InvalidInput` need not be given.
    """
    if isinstance(error, InvalidInput) and not errors:
        errors, total_errors = error.errors, error.total_errors
    words = re.findall("[A-Z][a-z]*", type(error).__name__)
    return Problem(
        type="-".join(words).lower(),
        title=" ".join(words).capitalize(),
        status=status,
        detail=redacted(str(error)),
        instance=instance,
        errors=list(errors),
        total_errors=total_errors,
    )
