"""What a mixture would take, asked of a service: by REST, by the client and by the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradstore import GradientStore, Invalid, cli
from transformers import LlamaConfig

from tests.serving import Service, problem_of, serving

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32,
)  # fmt: skip
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOR = 113_607_104  # what is trained in MoR's code with 2468 experts, two of them chosen, of rank 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A configuration without weights, in a folder of the server."""
    folder = tmp_path / "models" / "llama"
    LLAMA_2_7B.save_pretrained(folder)
    return folder


@pytest.fixture
def service(tmp_path: Path, model: Path) -> Iterator[Service]:
    """A service that may read the folder."""
    with serving(tmp_path / "store", allowed_roots=[model.parent]) as service:
        yield service


def test_a_mixture_is_counted_from_the_configuration_alone(service: Service, model: Path) -> None:
    with GradientStore(service.url) as store:
        found = store.allocations.preview(
            str(model), experts="2468", top_k=2, rank=8, modules=MODULES, router={"kind": "mor"}
        )
    assert found.parameters.trainable == MOR
    assert [layer.experts for layer in found.layers] == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert found.memory.training == 3 * 4 * MOR


def test_it_is_asked_by_command(
    service: Service, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_URL", service.url)
    words = [
        "allocations",
        "preview",
        str(model),
        "--experts",
        "2468",
        "--top-k",
        "2",
        "--rank",
        "8",
        "--router",
        "mor",
    ]
    words += [word for module in MODULES for word in ("--module", module)]
    with pytest.raises(SystemExit) as ended:
        cli.app(words, prog_name="gradstore")
    printed = capsys.readouterr()
    assert ended.value.code in (0, None)
    assert f"{MOR:,} parameters are trained" in printed.err
    assert [line.split() for line in printed.out.splitlines()[1:]] == [
        ["0-7", "2", "2", "8"], ["8-15", "4", "2", "8"], ["16-23", "6", "2", "8"], ["24-31", "8", "2", "8"],
    ]  # fmt: skip
    listed = ",".join(["3"] * 32)
    with pytest.raises(SystemExit):
        cli.app(["allocations", "preview", str(model), "--experts", listed, "--json"], prog_name="gradstore")
    assert {layer["experts"] for layer in json.loads(capsys.readouterr().out)["layers"]} == {3}


def test_what_does_not_fit_is_refused_with_its_reason(service: Service, model: Path) -> None:
    with GradientStore(service.url) as store:
        with pytest.raises(Invalid, match="experts lists 2 numbers, and the model has 32 layers"):
            store.allocations.preview(str(model), experts=[2, 4])
        with pytest.raises(Invalid, match="cannot be cut into so many"):
            store.allocations.preview(str(model), experts="246")
        with pytest.raises(Invalid, match="no linear layer of this model is called 'c_attn'"):
            store.allocations.preview(str(model), modules=["c_attn"])
        with pytest.raises(Invalid, match="nothing inside the allowed folders"):
            store.allocations.preview("/nowhere")


def test_a_damaged_configuration_is_refused(service: Service, model: Path) -> None:
    (model / "config.json").write_text("{")
    answer = service.http.post("/allocations/preview", json={"model": str(model)})
    assert "config.json" in problem_of(answer, 422).detail
