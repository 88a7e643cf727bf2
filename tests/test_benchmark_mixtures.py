"""The benchmark of mixtures runs, and the way that was not taken computes the same; how fast, no test asserts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks.mixtures import contestants, main

ARGUMENTS = ["--width", "64", "--layers", "1", "--tokens", "8", "--rounds", "2", "--threads", "1"]


def test_every_contestant_gets_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert main([*ARGUMENTS, "--json", str(tmp_path / "out.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = {line["name"]: line for line in json.loads((tmp_path / "out.json").read_text())}
    assert list(lines) == ["lora", "mixture", "mixture, balance loss", "mixture, mor", "grouped"]
    assert lines["lora"]["step_ratios"] == [1, 1]
    assert lines["lora"]["parameters"] == 4 * 32 * 128
    assert lines["mixture"]["parameters"] == lines["grouped"]["parameters"] == 2 * 4 * 32 * 128 + 4 * 4 * 64
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed and len(line["forward_seconds"]) == 2 for name, line in lines.items())


def test_grouped_experts_give_what_all_experts_give() -> None:
    options = argparse.Namespace(
        width=64, layers=1, experts=4, top_k=2, rank=16, dropout=0.0, seed=0, device="cpu", dtype="float32", only=""
    )
    models = contestants(options)
    ids = torch.randint(4096, (2, 8), generator=torch.Generator().manual_seed(0))
    outputs = []
    for name in ("mixture", "grouped"):
        torch.manual_seed(5)
        for parameter_name, parameter in models[name].named_parameters():
            if "lora_" in parameter_name:
                parameter.data.normal_(std=0.3)
        outputs.append(models[name](input_ids=ids).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    assert not torch.allclose(outputs[0], models["lora"](input_ids=ids).logits, atol=1e-2)
