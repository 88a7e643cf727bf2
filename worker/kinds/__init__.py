"""What is done for each kind of job: a module a kind, whose `work` computes a shard and answers with its commit.

    gradients.py     features of a range of rows     finetunes.py     a training, its run and checkpoints
    conversions.py   stored features, rounded        evaluations.py   losses and metrics on test rows
    imports.py       features of other programs      validations.py   a training that is measured and not kept
    scoring.py       a piece of a pool's scores      attributions.py  questions' features, and their search
    predictors.py    influence, learnt and predicted cascades.py      gradients of the rows that are predicted best
    estimates.py     what subsets would give         estimate_validations.py  a training on such a subset
    projectors.py    a network, trained and kept     embeddings.py    rows in its ability space
    comparisons.py   a selection, or a training on one
    adapter_choices.py  what a few adapters make of the shots of a task
    streams.py       pooled states of a range        labelling.py     rows that a chat model is asked about
    generations.py   answers to prompts, and their experts

needed.py does the jobs of other kinds that comparisons and cascades wait for.
They load, call and record; the arithmetic is in the modules beside this package.
"""

from __future__ import annotations

from collections.abc import Callable

from datastore.leases import Claim
from worker.context import Context
from worker.heartbeat import Heartbeat

Commit = Callable[[], bool]
"""Writes and commits what a shard came to; whether it was in time. The next shard may be computed meanwhile."""

Work = Callable[[Claim, Context, Heartbeat], Commit]
"""Computes a shard. What it raises becomes its job's error (worker/jobs.py)."""
