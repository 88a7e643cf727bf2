"""A row that takes its worker down is found in a bounded number of attempts, and the rest of its job is done."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gradstore.types import AnyJob, GradientsRequest

from datastore.catalog import Catalog
from datastore.isolation import MOST_POISONED, POISONED, Isolation
from datastore.leases import Claim, Jobs, NewShard
from tests.processes import wait_for
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered, worker_process

ROWS, BATCH = 12, 4
HOOK = """
import importlib.abc, importlib.machinery, os, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "worker.losses":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            run = module.run

            def deadly(model, inputs, **options):
                if (inputs.input_ids == {token}).any():
                    os.kill(os.getpid(), signal.SIGKILL)
                return run(model, inputs, **options)

            module.run = deadly

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize.py with which a forward pass over the token kills its process."""


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    catalog = Catalog(f"sqlite:///{tmp_path}/catalog.sqlite3")
    catalog.migrate()
    return Jobs(catalog, lease=0.0, max_attempts=3)


def start(jobs: Jobs) -> None:
    jobs.create(id="grad_1", kind="gradients", request={}, plan={}, shards=[NewShard({}, ROWS)])


def claim(jobs: Jobs) -> Claim:
    found = jobs.claim("worker", kinds=["gradients"])
    assert found is not None
    return found


def attempt(jobs: Jobs, deadly: Sequence[int]) -> bool:
    """An attempt that goes through the shard as a worker does, and dies at these rows; whether it came to its end."""
    held = claim(jobs)
    known = held.isolation
    tries = [(row,) for row in known.suspects] if known else []
    rows = [row for row in range(ROWS) if row not in held.poisoned]
    for at in [*tries, *(tuple(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH))]:
        if known is not None:
            known = Isolation(at, known.suspects)
            assert jobs.trying(held, known)
        if set(deadly) & set(at):
            time.sleep(0.01)
            assert jobs.sweep() == 1
            return False
        if known is not None and len(at) == 1:
            known = known.cleared(at[0])
    assert jobs.succeed(held)
    return True


def attempts(jobs: Jobs, deadly: Sequence[int], *, at_most: int = 100) -> int:
    """How many attempts end before one comes to its end, or the job fails."""
    for number in range(at_most):
        if jobs.get("grad_1").finished or attempt(jobs, deadly):
            return number
    raise AssertionError("it never ends")


@pytest.mark.parametrize(("deadly", "ended"), [([5], 4), ([5, 6], 6), ([0, 11], 7), ([1, 5, 10], 10)])
def test_every_culprit_is_found_and_the_shard_is_done_without_them(jobs: Jobs, deadly: list[int], ended: int) -> None:
    start(jobs)
    assert attempts(jobs, deadly) == ended
    assert jobs.get("grad_1").status == "succeeded"


def test_a_shard_of_nothing_but_culprits_is_done_without_rows(jobs: Jobs) -> None:
    start(jobs)
    assert attempts(jobs, range(ROWS)) <= 1 + 3 * ROWS
    assert jobs.get("grad_1").status == "succeeded"


def lose(jobs: Jobs, at: tuple[int, ...] = ()) -> AnyJob:
    """An attempt that ends with its worker, at some rows."""
    held = claim(jobs)
    if held.isolation is not None:
        assert jobs.trying(held, Isolation(at, held.isolation.suspects))
    time.sleep(0.01)
    jobs.sweep()
    return jobs.get("grad_1")


def test_too_many_culprits_fail_the_job_which_names_them(jobs: Jobs) -> None:
    start(jobs)
    lose(jobs)
    for row in range(MOST_POISONED + 1):
        lose(jobs, (row, 100))
        lose(jobs, (row,))
        job = lose(jobs, (row,))
    assert job.status == "failed"
    assert job.error is not None
    assert ", ".join(map(str, range(MOST_POISONED + 1))) in job.error.detail


def test_workers_that_die_of_something_else_poison_no_row_and_fail_the_job(jobs: Jobs) -> None:
    start(jobs)
    states = [lose(jobs), lose(jobs, (3, 4)), lose(jobs, (3,)), lose(jobs, (7, 8)), lose(jobs, (0, 1)), lose(jobs)]
    assert [job.status for job in states] == ["running"] * 5 + ["failed"]
    assert states[-1].error is not None
    assert "alone" not in states[-1].error.detail


def test_a_worker_that_dies_before_it_computes_has_the_usual_attempts(jobs: Jobs) -> None:
    start(jobs)
    assert [lose(jobs).status for _ in range(3)] == ["running", "running", "failed"]


def test_a_retry_knows_nothing_of_the_rows_that_were_poisoned(jobs: Jobs) -> None:
    start(jobs)
    for at in [(), (1, 2), (1,), (1,)]:
        lose(jobs, at)
    assert claim(jobs).poisoned == (1,)
    jobs.cancel("grad_1")
    jobs.retry("grad_1")
    assert claim(jobs).poisoned == ()


def poisoned_rows(culprit: int) -> list[dict[str, str]]:
    rows = numbered(range(40))
    rows[culprit]["completion"] += " Zürich"
    return rows


@pytest.mark.slow
def test_a_row_that_kills_every_worker_is_left_out_and_all_others_have_their_features(tmp_path: Path) -> None:
    culprit = 17
    model = save_tiny_model(tmp_path / "model", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    place = Workplace.at(tmp_path / "place", model=model, lease=2.0)
    rows = poisoned_rows(culprit)
    tokenizer = place.context.loaded.tokenizer(str(model), None)
    usual = {
        token for row in numbered(range(40)) for token in tokenizer(row["prompt"] + row["completion"])["input_ids"]
    }
    token = next(token for token in tokenizer(rows[culprit]["completion"])["input_ids"] if token not in usual)
    (tmp_path / "sitecustomize.py").write_text(HOOK.replace("{token}", str(token)))
    request = GradientsRequest(
        dataset=place.pool(rows).id, checkpoints=[place.checkpoint().id], dims=[32], token_budget=256
    )
    job = place.start(request)
    with worker_process(place, "--concurrency", "2", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path])):
        wait_for(lambda: place.job(job.id).finished)
    done = place.job(job.id)
    assert done.status == "succeeded", done.error
    assert done.result is not None
    result = done.result.model_dump()
    assert [(row["row"], row["reason"]) for row in result["excluded"]] == [(culprit, POISONED)]
    healthy = Workplace.at(tmp_path / "healthy", model=model)
    asked = request.model_copy(update={"dataset": healthy.pool(rows).id, "checkpoints": [healthy.checkpoint().id]})
    expected = healthy.stored(healthy.done(asked)["feature_sets"][0]["id"])
    found = place.stored(result["feature_sets"][0]["id"])
    others = np.arange(40) != culprit
    assert not found[culprit].any()
    norms = np.linalg.norm(expected[others], axis=1)
    assert np.all(np.linalg.norm(found[others] - expected[others], axis=1) <= 0.02 * norms)  # a step of int8
