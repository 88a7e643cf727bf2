"""An example as everything downstream sees it, whatever shape its row was uploaded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    prefix: str = ""
    """Unsupervised beginning of an assistant's turn, such as MMLU's "The answer is:"."""


@dataclass(frozen=True)
class Example:
    """A row of a dataset or task: either `messages`, or `prompt` and `completion`."""

    id: str | None
    origin: str
    """The row's `dataset` field, else the name of its file."""
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    completion: str | None = None

    @property
    def text(self) -> str:
        """What user and assistant say, or prompt and completion, a line for each: no template's marks."""
        said = [each.prefix + each.content for each in self.messages if each.role in ("user", "assistant")]
        return "\n".join(said or [part for part in (self.prompt, self.completion) if part])
