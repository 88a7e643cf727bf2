"""What a mixture of LoRA experts costs beside one LoRA of as many active parameters, on one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.mixtures --width 1024 --layers 2 --rounds 7 --json out.json

A Llama of random weights, with N experts of rank r on q, k, v and o of which k are chosen, and a LoRA of the rank k·r.
Contestants take turns in an order drawn anew for each round, with the same rows: a forward pass without a graph, and a
step, which is the forward pass, its loss and the backward pass. A ratio is that of two times of one round; printed are
its median, smallest and largest. The clock is the process's CPU time, or the wall's after a synchronisation on a GPU.

`grouped` is the way not taken: tokens sorted by their experts, and the products of each expert's own tokens alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from gradstore.types import MixtureSettings, RouterSettings
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from worker.mixtures.balance import recording
from worker.mixtures.layer import MixtureLinear
from worker.mixtures.model import make_mixture
from worker.models import use_cpu_threads

TARGET = 1.3
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
WORDS = 4096


@dataclass
class Line:
    """A contestant's times, and their ratios to those of the plain LoRA in the same rounds."""

    name: str
    parameters: int
    forward_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    forward_ratios: list[float] = field(default_factory=list)
    step_ratios: list[float] = field(default_factory=list)


class Grouped(MixtureLinear):
    """The same layer, in which every expert multiplies its own tokens only."""

    def mix(self, adapter: str, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens, count = x.flatten(0, -2), self.shape.experts
        experts = chosen.flatten()
        order = experts.argsort(stable=True)
        ends = torch.bincount(experts, minlength=count).cumsum(0).to(torch.int32)
        rows = order // chosen.shape[-1]
        a = self.lora_A[adapter].get_parameter("weight").view(count, self.shape.rank, -1)
        b = self.lora_B[adapter].get_parameter("weight").view(-1, count, self.shape.rank)
        hidden = nn.functional.grouped_mm(tokens[rows], a.transpose(1, 2), offs=ends)
        hidden = hidden * weights.flatten(0, -2).gather(1, chosen.flatten(0, -2)).flatten()[order].unsqueeze(1)
        outputs = nn.functional.grouped_mm(hidden, b.permute(1, 2, 0).contiguous(), offs=ends)
        added = outputs.new_zeros(len(tokens), outputs.shape[1]).index_add(0, rows, outputs)
        return added.view(*x.shape[:-1], -1)


def base_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """The same random weights for each contestant."""
    torch.manual_seed(options.seed)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
            num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
            num_key_value_heads=options.width // 64,
        )
    )  # fmt: skip
    frozen: LlamaForCausalLM = model.requires_grad_(False).to(options.device, getattr(torch, options.dtype))
    return frozen


def contestants(options: argparse.Namespace) -> dict[str, nn.Module]:
    """The plain LoRA first."""

    def mixture(router: RouterSettings, *, balance: float = 0.0) -> nn.Module:
        settings = MixtureSettings(
            experts=options.experts, top_k=options.top_k, rank=options.rank, modules=MODULES, dropout=options.dropout,
            router=router, balance=balance,
        )  # fmt: skip
        return make_mixture(base_model(options), settings)

    lora = LoraConfig(
        r=options.top_k * options.rank, lora_alpha=16, lora_dropout=options.dropout, target_modules=MODULES
    )
    models: dict[str, nn.Module] = {
        "lora": get_peft_model(base_model(options), lora),
        "mixture": mixture(RouterSettings()),
        "mixture, balance loss": mixture(RouterSettings(), balance=0.001),
        "mixture, mor": mixture(RouterSettings(kind="mor")),
        "grouped": mixture(RouterSettings()),
    }
    for module in models["grouped"].modules():
        if isinstance(module, MixtureLinear):
            module.__class__ = Grouped
    return {name: model for name, model in models.items() if options.only in name or name == "lora"}


def forward(model: Any, ids: Tensor) -> None:
    """A forward pass without a graph."""
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)


def step(model: Any, ids: Tensor, *, balance: bool) -> None:
    """A forward and a backward pass, whose gradients are dropped."""
    model.train()
    if balance:
        with recording(model) as record:
            loss = model(input_ids=ids, labels=ids).loss
        loss = loss + 0.001 * record.balance()
    else:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], None], device: str) -> float:
    """How long it takes."""
    if device != "cpu":
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(options: argparse.Namespace) -> list[Line]:
    """Let all take turns."""
    models = contestants(options)
    lines = {
        name: Line(name, sum(p.numel() for p in model.parameters() if p.requires_grad))
        for name, model in models.items()
    }
    order = random.Random(options.seed)  # noqa: S311 - an order, no secret
    ids = torch.randint(WORDS, (options.rows, options.tokens), device=options.device)
    for round_ in range(options.rounds + 1):  # the first warms up
        for name in order.sample(list(models), len(models)):
            model, balance = models[name], "balance" in name
            of_forward = seconds(lambda model=model: forward(model, ids), options.device)  # type: ignore[misc]
            of_step = seconds(lambda model=model, balance=balance: step(model, ids, balance=balance), options.device)  # type: ignore[misc]
            if round_:
                lines[name].forward_seconds.append(of_forward)
                lines[name].step_seconds.append(of_step)
    plain = lines["lora"]
    for line in lines.values():
        line.forward_ratios = [a / b for a, b in zip(line.forward_seconds, plain.forward_seconds, strict=True)]
        line.step_ratios = [a / b for a, b in zip(line.step_seconds, plain.step_seconds, strict=True)]
    return list(lines.values())


def table(lines: list[Line]) -> str:
    """The lines as Markdown."""

    def shown(ratios: list[float]) -> str:
        return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"

    rows = ["| what | trained numbers | forward, ms | ÷ lora | step, ms | ÷ lora |", "|---|---|---|---|---|---|"]
    for line in lines:
        of_forward, of_step = (statistics.median(s) * 1e3 for s in (line.forward_seconds, line.step_seconds))
        rows.append(
            f"| {line.name} | {line.parameters:,} | {of_forward:,.0f} | {shown(line.forward_ratios)} | "
            f"{of_step:,.0f} | {shown(line.step_ratios)} |"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and return 1 where `--target-check` finds the mixture above its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="hidden size, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="of each row (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16, help="of an expert (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="contestants whose names have this text, beside the plain LoRA")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times here")
    parser.add_argument("--target-check", action="store_true", help=f"exit with 1 where a ratio is above {TARGET}")
    options = parser.parse_args(arguments)
    use_cpu_threads(options.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name of before
        lines = measure(options)
    print(table(lines))
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=2))
    ours = [line for line in lines if line.name == "mixture"]
    missed = any(statistics.median(r) > TARGET for line in ours for r in (line.forward_ratios, line.step_ratios))
    return int(options.target_check and missed)


if __name__ == "__main__":
    sys.exit(main())
