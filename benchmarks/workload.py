"""What is measured on: a model of random weights with LoRA, rows of random tokens, Adam's moments of a short training.

Nothing is downloaded: shapes come from a configuration, weights from a seed. The tokens have something to tell apart
(eight topics, each with its own frequent words), so that the gradients of two rows are alike or not, as those of text
are. Every token but the first is learnt from: the hardest case for an engine that makes logits for those only.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from worker.batches import IGNORED, Encoded, collate, plan
from worker.directions import Moments
from worker.models import Attention

AdapterDtype = Literal["float32", "model"]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LONGEST = 2048  # tokens of a row whose length comes from a file or the log-normal
SPREAD = 0.8  # of the log-normal: the standard deviation of a length's logarithm
CHARACTERS_PER_TOKEN = 4.0  # of a row read for its length alone; `mean_tokens` scales what that gives
TOPICS = 8
TRAINING_STEPS = 8
TRAINING_ROWS = 8  # per step
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Preset:
    """The shape of a model and of the work on it."""

    architecture: dict[str, Any]
    """What `transformers.AutoConfig.for_model` takes. The two small ones have 4,096 words: with the 32,000 of Llama the
    output layer would be most of the model, and the layers that hold LoRA the smaller part."""
    rank: int
    dims: int
    examples: int
    shortest: int | None = None
    """With `longest`: lengths uniform between the two, in tokens; without: log-normal."""
    longest: int | None = None
    mean_tokens: float = 371.0
    """Of the log-normal lengths; LESS's mean over its pool, by this project's benchmark."""


def _llama(width: int, layers: int, **other: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": width * 43 // 16,  # 11008 at 4096, as in Llama-2-7B
        "vocab_size": 32_000,
    } | other


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        _llama(32, 2, num_attention_heads=4, vocab_size=256), rank=4, dims=512, examples=12, shortest=4, longest=24
    ),
    "256x6": Preset(_llama(256, 6, vocab_size=4096), rank=16, dims=8192, examples=256, shortest=32, longest=256),
    "512x8": Preset(_llama(512, 8, vocab_size=4096), rank=16, dims=8192, examples=256, shortest=32, longest=256),
    "qwen3-0.6b": Preset(
        {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
        rank=16,
        dims=8192,
        examples=512,
    ),
    "llama-3.2-1b": Preset(
        _llama(
            2048,
            16,
            num_key_value_heads=8,
            intermediate_size=8192,
            vocab_size=128_256,
            tie_word_embeddings=True,
        ),
        rank=16,
        dims=8192,
        examples=512,
    ),
    "llama-2-7b": Preset(_llama(4096, 32, num_attention_heads=32), rank=128, dims=8192, examples=512),
}


@dataclass(frozen=True)
class Workload:
    """What every contestant gets."""

    model: PeftModel
    rows: list[Encoded]
    moments: Moments
    dims: int
    device: torch.device

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in trainable(self.model).values())

    @property
    def mean_tokens(self) -> float:
        return sum(len(row.input_ids) for row in self.rows) / len(self.rows)

    def inputs(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Return token ids and labels (examples, tokens) of a batch, on the device."""
        batch = collate(rows, pad_id=0)
        return batch.input_ids.to(self.device), batch.labels.to(self.device)

    def batches(self, rows: Sequence[Encoded], token_budget: int) -> Iterator[list[int]]:
        yield from plan([len(row.input_ids) for row in rows], token_budget=token_budget)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_workload(
    preset: Preset,
    *,
    device: torch.device,
    lengths: Sequence[int],
    adapter: AdapterDtype = "float32",
    attention: Attention = "sdpa",
    seed: int = 0,
    train: bool = True,
) -> Workload:
    """Make the model on `device`, in bfloat16 on a GPU and else in float32, and a row for each length.

    `adapter` "float32" keeps LoRA's own weights in float32, as PEFT does by default; "model" gives them the model's
    type. With FlashAttention the engine packs its rows. Without `train` the moments are drawn and not those of a
    training: the same price, other numbers.
    """
    torch.manual_seed(seed)
    model = _make_model(preset, device=device, adapter=adapter, attention=attention)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(preset.architecture["vocab_size"])
    trained_on = [lengths[index % len(lengths)] for index in range(TRAINING_STEPS * TRAINING_ROWS)]
    rows = _make_rows([*lengths, *trained_on], vocabulary, generator)
    rows, training = rows[: len(lengths)], rows[len(lengths) :]
    untrained = Workload(model, rows, _draw_moments(model, seed), preset.dims, device)
    return replace(untrained, moments=trained(untrained, training)) if train else untrained


def draw_lengths(preset: Preset, *, examples: int, seed: int = 0) -> list[int]:
    """Draw the lengths of rows, in tokens."""
    generator = torch.Generator().manual_seed(seed + 1)
    if preset.shortest is not None and preset.longest is not None:
        drawn: list[int] = torch.randint(preset.shortest, preset.longest + 1, (examples,), generator=generator).tolist()
        return drawn
    logarithms = torch.randn(examples, generator=generator, dtype=torch.float64) * SPREAD
    return _scaled((logarithms + math.log(preset.mean_tokens)).exp().tolist(), mean=preset.mean_tokens)


def read_lengths(file: Path, *, examples: int, mean_tokens: float | None = None, seed: int = 0) -> list[int]:
    """Draw lengths of the rows in a JSONL file: their characters, in tokens of four, or scaled to a mean."""
    with file.open(encoding="utf-8") as lines:
        sizes = [_characters(json.loads(line)) / CHARACTERS_PER_TOKEN for line in lines if line.strip()]
    if not sizes:
        raise ValueError(f"{file} holds no row: give a JSONL file with an example on each line")
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = [sizes[i] for i in torch.randint(len(sizes), (examples,), generator=generator).tolist()]
    return _scaled(drawn, mean=mean_tokens)


def _characters(value: Any) -> int:
    """Count the characters of all texts in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = [part for key, part in value.items() if key not in {"id", "dataset", "role"}]
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _scaled(sizes: Sequence[float], *, mean: float | None) -> list[int]:
    """Round lengths to tokens between 2 and LONGEST, scaled so that their mean is the given one."""
    factor = 1.0
    for _ in range(20 if mean is not None else 0):  # cutting long ones off lowers the mean again
        cut = [min(max(size * factor, 2), LONGEST) for size in sizes]
        factor *= mean * len(cut) / sum(cut)  # type: ignore[operator]  # no loop without a mean
    return [round(min(max(size * factor, 2), LONGEST)) for size in sizes]


def _make_model(preset: Preset, *, device: torch.device, adapter: AdapterDtype, attention: Attention) -> PeftModel:
    config = AutoConfig.for_model(**preset.architecture, max_position_embeddings=LONGEST)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        made: Any = AutoModelForCausalLM  # transformers leaves it untyped
        base = made.from_config(config, dtype=dtype, attn_implementation=attention)
        lora = LoraConfig(
            r=preset.rank, lora_alpha=2 * preset.rank, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name of before
            model = get_peft_model(base.requires_grad_(False), lora, autocast_adapter_dtype=adapter == "float32")
    model.eval()
    return model


def _make_rows(lengths: Sequence[int], vocabulary: int, generator: torch.Generator) -> list[Encoded]:
    """Draw rows: words by Zipf's law, some of them the topic's and the others all rows', in shares drawn for each."""
    frequency = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    topics = [torch.randperm(vocabulary, generator=generator) for _ in range(TOPICS + 1)]
    rows = []
    for number, length in enumerate(lengths):
        ranks = torch.multinomial(frequency, length, replacement=True, generator=generator)
        own = torch.rand(length, generator=generator) < torch.rand((), generator=generator)
        ids = torch.where(own, topics[number % TOPICS][ranks], topics[TOPICS][ranks]).tolist()
        rows.append(Encoded(tuple(ids), (IGNORED, *ids[1:])))
    return rows


def trained(workload: Workload, rows: Sequence[Encoded]) -> Moments:
    """Train the adapter on the rows, a step on every `TRAINING_ROWS` of them, and return Adam's moments."""
    named = trainable(workload.model)
    optimizer = torch.optim.AdamW(named.values(), lr=LEARNING_RATE, weight_decay=0.0)
    for start in range(0, len(rows), TRAINING_ROWS):
        input_ids, labels = workload.inputs(rows[start : start + TRAINING_ROWS])
        workload.model(input_ids=input_ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: optimizer.state[parameter] for name, parameter in named.items()}
    return Moments(
        exp_avg={name: values["exp_avg"].float() for name, values in state.items()},
        exp_avg_sq={name: values["exp_avg_sq"].float() for name, values in state.items()},
        step=-(-len(rows) // TRAINING_ROWS),
    )


def _draw_moments(model: PeftModel, seed: int) -> Moments:
    """Draw the adapter, whose B would be zero, and moments of about a gradient's size."""
    named = trainable(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in named.values():
            parameter.normal_(std=0.02)
    return Moments(
        exp_avg={name: torch.randn_like(parameter, dtype=torch.float32) * 1e-4 for name, parameter in named.items()},
        exp_avg_sq={name: torch.rand_like(parameter, dtype=torch.float32) * 1e-6 for name, parameter in named.items()},
        step=TRAINING_STEPS,
    )
