"""A token budget grows while that pays and fits; the rows decide whether looking for one is worth its price."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.tiny import save_tiny_model
from tests.workplace import tiny_adapter
from worker.batches import Encoded
from worker.budgets import RANGES, Budgets, Trial, find, is_out_of_memory, search
from worker.directions import Kind
from worker.gradients import GradientEngine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> GradientEngine:
    model = save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=16, intermediate_size=16)
    return GradientEngine(tiny_adapter(model), kinds=[Kind("sgd")], dims=[16])


def rows(count: int, length: int = 64) -> list[Encoded]:
    ids = tuple(range(5, 5 + length))
    return [Encoded(ids, (-100, *ids[1:]))] * count


def device(
    *, rate: Callable[[int], float], memory: float = math.inf, fits: int = 1 << 30
) -> tuple[Callable[[int], Trial], list[int]]:
    """A device that does so many tokens a second in batches of a budget, and what was tried on it.

    Its memory holds `memory` tokens, as far as can be told beforehand; beyond `fits` it is full.
    """
    tried: list[int] = []

    def measure(budget: int) -> Trial:
        tried.append(budget)
        if budget > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Trial(budget, budget / rate(budget), share=budget / memory)

    return measure, tried


def test_the_budget_stops_growing_where_the_device_gets_no_faster() -> None:
    measure, tried = device(rate=lambda budget: 1e6 * min(budget, 4096))
    assert search(measure, least=512, most=1 << 16) == 4096
    assert tried == [512, 1024, 2048, 4096, 8192]


def test_the_budget_stops_growing_where_the_next_would_not_fit() -> None:
    measure, tried = device(rate=lambda budget: 1e6 * budget, memory=9_000)
    assert search(measure, least=512, most=1 << 16) == 4096
    assert max(tried) == 4096, "what will not fit is not tried"


def test_a_trial_that_does_not_fit_against_the_forecast_is_the_last() -> None:
    measure, _ = device(rate=lambda budget: 1e6 * budget, fits=2048)
    assert search(measure, least=512, most=1 << 16) == 2048


def test_a_slow_device_is_not_kept_from_its_work() -> None:
    measure, tried = device(rate=lambda budget: budget / 20)
    assert search(measure, least=512, most=1 << 16) == 512
    assert tried == [512]


def test_an_error_that_is_no_lack_of_memory_is_not_swallowed() -> None:
    def measure(budget: int) -> Trial:
        if budget > 512:
            raise RuntimeError("shapes differ")
        return Trial(budget, 1e-3)

    with pytest.raises(RuntimeError, match="shapes differ"):
        search(measure, least=512, most=1 << 16)


def test_a_real_engine_finds_a_budget_within_its_devices_range(engine: GradientEngine) -> None:
    found = find(engine, rows(16 * RANGES["cpu"].usual // 64), pad_id=0)
    assert found is not None
    assert RANGES["cpu"].least <= found <= RANGES["cpu"].most


def test_rows_that_would_not_pay_for_the_search_get_none(engine: GradientEngine) -> None:
    assert find(engine, rows(16), pad_id=0) is None


def test_a_search_is_given_up_when_its_shard_is(engine: GradientEngine) -> None:
    class Lost(Exception):
        pass

    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Lost

    with pytest.raises(Lost):
        find(engine, rows(16 * RANGES["cpu"].usual // 64), pad_id=0, check=check)


def test_what_was_found_is_remembered_and_what_was_not_is_looked_for_again() -> None:
    budgets = Budgets()
    assert budgets.found("small", lambda: None, usual=2048) == 2048
    assert budgets.found("small", lambda: 1024, usual=2048) == 1024
    assert budgets.found("small", lambda: 4096, usual=2048) == 1024


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_a_lack_of_memory_is_known_whoever_tells_of_it(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_a_budget_that_was_found_and_did_not_fit_later_is_lower_for_the_next_job() -> None:
    budgets = Budgets()
    assert budgets.found("model", lambda: 4096, usual=512) == 4096
    budgets.limit("grad_1", 1024, key="model")
    assert budgets.found("model", lambda: 4096, usual=512) == 1024
    assert budgets.found("other", lambda: 4096, usual=512) == 4096


def test_a_limit_is_that_of_its_job() -> None:
    budgets = Budgets()
    budgets.limit("grad_1", 1000)
    assert [budgets.within_limit(job, 4096) for job in ("grad_1", "grad_2")] == [1000, 4096]
    assert budgets.within_limit("grad_1", 512) == 512
