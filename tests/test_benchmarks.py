"""The benchmark runs, and its numbers are about what they say; how fast anything is, no test asserts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.contestants import Less, Ours, Plain, exact_gradients
from benchmarks.counting import operations, projection_bytes
from benchmarks.gradients import _spread, main
from benchmarks.results import DEFAULT, Line, missed_targets
from benchmarks.stages import STAGES, by_operation, shares
from benchmarks.workload import PRESETS, Workload, draw_lengths, make_workload, read_lengths
from worker.directions import Kind
from worker.layouts import Packed, Padded

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workload() -> Workload:
    preset = PRESETS["tiny"]
    return make_workload(preset, device=CPU, lengths=draw_lengths(preset, examples=preset.examples))


def test_the_benchmark_writes_a_line_for_each_contestant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    arguments = ["--preset", "tiny", "--rounds", "2", "--device", "cpu", "--no-memory", "--json", str(file)]
    assert main([*arguments, "--only", "adam less", "--only", "LESS"]) == 0
    lines = {line["name"]: line for line in json.loads(file.read_text())}
    assert list(lines)[:2] == ["plain", DEFAULT]
    assert {"gradstore adam less rademacher", "gradstore adam less none", "LESS's loop"} <= lines.keys()
    assert lines["plain"]["ratio_to_plain"] == 1
    assert lines["plain"]["pearson"] is None
    printed = capsys.readouterr().out
    for name, line in lines.items():
        assert line["examples_per_second"] > 0
        assert line["lowest_ratio"] <= line["ratio_to_plain"] <= line["highest_ratio"]
        assert f"| {name} |" in printed
    assert lines["gradstore adam less none"]["pearson"] == pytest.approx(1, abs=1e-6)
    assert lines[DEFAULT]["pearson"] > 0.8


def test_a_process_of_its_own_tells_a_contestants_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", "--device", "cpu", "--memory-of", DEFAULT, "--token-budget", "64"]) == 0
    assert int(capsys.readouterr().out) >= 0


@pytest.mark.parametrize("kind", ["adam less", "adam exact", "sgd", "sign"])
def test_the_engine_without_a_projection_is_what_fidelity_is_measured_against(workload: Workload, kind: str) -> None:
    name, _, form = kind.partition(" ")
    engine = Ours(workload, Kind(name, form or "less"), projection="none")  # type: ignore[arg-type]
    engine.token_budget = 64
    exact = torch.stack(list(exact_gradients(workload, workload.rows, engine.exact))).numpy()  # type: ignore[arg-type]
    features = engine.features(workload.rows)
    if kind == "sign":  # where a number is zero but for rounding, its sign is anyone's
        assert (features == exact).mean() > 0.999
    else:
        np.testing.assert_allclose(features, exact, atol=2e-5 * float(np.abs(exact).max()))


def test_less_keeps_inner_products(workload: Workload) -> None:
    exact = torch.stack(list(exact_gradients(workload, workload.rows, "adam less"))).numpy()
    features = Less(workload).features(workload.rows)
    assert features.shape == (len(workload.rows), workload.dims)
    error = features @ features.T - exact @ exact.T
    scale = np.outer(np.linalg.norm(exact, axis=1), np.linalg.norm(exact, axis=1))
    assert np.sqrt(np.mean((error / scale) ** 2)) <= 2 * (2 / workload.dims) ** 0.5


def test_a_plain_step_leaves_no_gradient(workload: Workload) -> None:
    plain = Plain(workload)
    plain.token_budget = 64
    plain.run(workload.rows)
    assert all(parameter.grad is None for parameter in workload.model.parameters())


@pytest.mark.parametrize("packing", [False, True])
def test_the_stages_add_up(workload: Workload, packing: bool) -> None:
    engine = Ours(workload, Kind("adam"), projection="blocks")
    engine.engine.packing = packing
    engine.token_budget = 1000  # all rows in one batch: one that a row has to itself is never packed
    before = torch.Tensor.backward, Padded.outer, Packed.outer
    parts = shares(engine, workload.rows)
    assert engine.engine.packing == packing
    assert sum(parts.values()) == pytest.approx(1)
    assert list(parts) == list(STAGES)
    assert min(parts.values()) > 0
    assert (torch.Tensor.backward, Padded.outer, Packed.outer) == before


def test_every_operation_is_of_some_sort(workload: Workload) -> None:
    plain, engine = Plain(workload), Ours(workload, Kind("adam"), projection="blocks")
    for contestant in (plain, engine):
        contestant.token_budget = 64
        parts = by_operation(contestant, workload.rows, CPU)
        assert sum(parts.values()) == pytest.approx(1)
        assert list(parts) == ["products", "attention", "softmax", "elementwise", "calls"]
        assert min(parts.values()) > 0


def test_operations_are_counted_as_published() -> None:
    """Llama-2-7B, LoRA r 128, 371 tokens: 10.3 TFLOP."""
    preset = PRESETS["llama-2-7b"]
    shape = make_workload(preset, device=torch.device("meta"), lengths=[371], train=False)
    assert shape.parameters == 134_217_728
    assert operations(shape) == pytest.approx(10.3e12, rel=0.005)


def test_bytes_of_a_projection_are_those_of_its_operations() -> None:
    """Llama-2-7B's 256 parameters have 2¹⁹ numbers each, as many as their transforms; the small one's 16 have 128."""
    shape = make_workload(PRESETS["llama-2-7b"], device=torch.device("meta"), lengths=[371], train=False)
    tiny = make_workload(PRESETS["tiny"], device=CPU, lengths=[4], train=False)
    numbers = 134_217_728
    assert tiny.parameters == 16 * 128
    assert projection_bytes("blocks", shape) == projection_bytes("none", shape) == 12 * numbers
    assert projection_bytes("rademacher", shape) == 4 * numbers
    assert projection_bytes("sjlt", shape) == 28 * numbers
    assert projection_bytes("sjlt", tiny) == 20 * 16 * 128
    assert projection_bytes("fft", shape) == 16 * numbers + 256 * 20 * 8192
    assert projection_bytes("fft", tiny) == 16 * (12 * 128 + 12 * 512 + 20 * 512)


@pytest.mark.parametrize("mean", [None, 30.0])
def test_lengths_come_from_a_file_of_rows(tmp_path: Path, mean: float | None) -> None:
    file = tmp_path / "rows.jsonl"
    row = {
        "id": "not counted",
        "messages": [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y" * 40}],
    }
    file.write_text(json.dumps(row) + "\n\n" + json.dumps({"prompt": "x" * 100, "completion": "y" * 60}) + "\n")
    lengths = read_lengths(file, examples=200, mean_tokens=mean)
    assert len(lengths) == 200
    assert len(set(lengths)) == 2
    assert max(lengths) / min(lengths) == pytest.approx(2, rel=0.06)
    if mean is None:
        assert set(lengths) == {20, 40}
    else:
        assert sum(lengths) / 200 == pytest.approx(mean, rel=0.03)


def test_log_normal_lengths_have_the_mean_they_are_said_to() -> None:
    lengths = draw_lengths(PRESETS["llama-2-7b"], examples=512)
    assert sum(lengths) / 512 == pytest.approx(371, rel=0.01)


def test_a_share_has_the_lengths_of_all(workload: Workload) -> None:
    share = _spread(workload.rows, 3, 1)
    sizes = sorted(len(row.input_ids) for row in workload.rows)
    assert [len(row.input_ids) for row in share] == sizes[1::3]


def _line(name: str, ratio: float, share: float = 0.7, rate: float = 50) -> Line:
    return Line(name, rate, ratio, ratio, ratio, None, 1, 1, None, None, 1, share, None, {}, {})


@pytest.mark.parametrize(
    ("ours", "less", "faults"),
    [(0.98, 0.04, []), (0.96, 0.04, ["plain"]), (0.98, 0.06, ["LESS's loop"]), (0.5, 0.05, ["plain", "LESS's loop"])],
)
def test_a_missed_ratio_is_named(ours: float, less: float, faults: list[str]) -> None:
    missed = missed_targets("256x6", [_line("plain", 1), _line(DEFAULT, ours), _line("LESS's loop", less)])
    assert len(missed) == len(faults)
    assert all(f"times {name}, not" in fault for name, fault in zip(faults, missed, strict=True))


@pytest.mark.parametrize(("share", "rate", "missed"), [(0.6, 45, 0), (0.59, 45, 1), (0.6, 44, 1), (0.5, 40, 2)])
def test_a_missed_rate_is_named(share: float, rate: float, missed: int) -> None:
    lines = [_line("plain", 1, share), _line(DEFAULT, 0.99, share, rate)]
    assert len(missed_targets("llama-2-7b", lines)) == missed


@pytest.mark.parametrize(
    ("peer", "make"),
    [
        ("bergson", lambda workload: peers.Bergson(workload, "global")),
        ("dattri-llm", lambda workload: peers.DattriLlm(workload, "dense")),
    ],
)
@pytest.mark.filterwarnings("default")  # those of other libraries are theirs
def test_an_installed_peer_makes_a_feature_of_each_row(
    workload: Workload, peer: str, make: Callable[[Workload], peers.Bergson | peers.DattriLlm]
) -> None:
    if lacking := peers.missing(peer):
        pytest.skip(f"{', '.join(lacking)} not installed")
    contestant = make(workload)
    contestant.token_budget = 64
    features = contestant.features(workload.rows)
    exact = torch.stack(list(exact_gradients(workload, workload.rows, "sgd"))).numpy()
    assert features.shape == (len(workload.rows), workload.dims)
    lengths = np.linalg.norm(features, axis=1) / np.linalg.norm(exact, axis=1)
    assert lengths == pytest.approx(np.ones(len(lengths)), abs=0.6)
