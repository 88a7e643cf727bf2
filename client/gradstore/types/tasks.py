"""Tasks and their subtasks."""

from __future__ import annotations

from datetime import datetime

from gradstore.types.base import Body, Metric, Name, Request, ServerPath, TaskKind


class Subtask(Body):
    """A part of a task: a subject of MMLU, a language of TyDiQA."""

    name: str
    validation: int
    """Rows used for selection."""
    test: int
    """Rows used for evaluation only."""
    metric: Metric


class Task(Body):
    """What the model should get better at, given by a few validation rows."""

    id: str
    name: str
    kind: TaskKind
    validation: int
    test: int
    subtasks: list[Subtask]
    notes: list[str]
    created_at: datetime


class TaskRegister(Request):
    """Register a task from a folder or file of the server, inside an allowed root."""

    name: Name
    kind: TaskKind
    path: ServerPath
    replace: bool = False
