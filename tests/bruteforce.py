"""LESS's scores the slow way, from the paper and the documents alone: no line of `worker` or `datastore` takes part.

One example at a time, float64 autograd over all trainable parameters, Adam's map by hand, projections as explicit
matrices made number by number from the generator that the docstring of worker/projection documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

Floats = NDArray[np.float64]
Shapes = dict[str, int]
"""Numbers of each trainable parameter, in the order of `named_parameters()`."""


@dataclass(frozen=True)
class Gradients:
    """Raw gradients (n, p) with the mean losses (n,), parameter after parameter as `sizes` says."""

    flat: Floats
    losses: Floats
    sizes: Shapes


def tokens_and_labels(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a row in the format `tulu`, and labels: a token counts where one of its characters is learnt from.

    Turns are `<|role|>\\n…\\n`, an assistant's end with eos, contents stripped; prompt and completion are joined by a
    space; learnt from are the assistant's content (or the completion) and its eos.
    """
    eos = tokenizer.eos_token
    parts: list[tuple[str, bool]] = []
    for turn in row.get("messages", ()):
        learnt = turn["role"] == "assistant"
        ending = eos if learnt else ""
        parts += [(f"<|{turn['role']}|>\n", False), (turn["content"].strip() + ending, learnt), ("\n", False)]
    if not parts:
        parts = [(row["prompt"], False), (f" {row['completion']}{eos}", True)]
    text, learnt_from = "".join(part for part, _ in parts), []
    for part, learnt in parts:
        learnt_from += [learnt] * len(part)
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    labels = [
        token if any(learnt_from[start:end]) else -100
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def hidden_states(
    model: Path, adapter: Path, rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Floats]:
    """Means over each row's tokens of the last hidden states that `transformers` gives out, by kind (n, width)."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base, str(adapter)).double().eval()
    plain, weighted = [], []
    for row in rows:
        ids = torch.tensor([tokens_and_labels(row, tokenizer)[0]])
        with torch.no_grad():
            states = loaded(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].numpy()
        plain.append(states.mean(0))
        weighted.append(np.average(states, axis=0, weights=np.arange(1, len(states) + 1)))
    return {"hidden": np.array(plain), "rds": np.array(weighted)}


def raw_gradients(
    model: Path,
    adapter: Path | None,
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Sequence[str] = (),
) -> Gradients:
    """The gradient of each row's mean loss by the adapter's parameters, or without an adapter by the model's own whose
    names have one of the texts `weights` in them; where there are none of either, only the losses.
    """
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    loaded = base if adapter is None else PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    loaded = loaded.double().eval()
    if adapter is None:
        for name, parameter in loaded.named_parameters():
            parameter.requires_grad_(any(text in name for text in weights))
    named = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    gradients, losses = [], []
    for row in rows:
        ids, labels = tokens_and_labels(row, tokenizer)
        with torch.set_grad_enabled(bool(named)):
            logits = loaded(input_ids=torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100)
        losses.append(float(loss.detach()))
        if named:
            parts = torch.autograd.grad(loss, list(named.values()))
            gradients.append(torch.cat([part.flatten() for part in parts]).numpy())
    sizes = {name: parameter.numel() for name, parameter in named.items()}
    return Gradients(np.array(gradients), np.array(losses), sizes)


def adam_direction(raw: Gradients, moments: Path, *, form: str) -> Floats:
    """Adam's direction at the moments of a file, form `less` or `exact`."""
    stored = load_file(moments)
    m, v = (
        np.concatenate([stored[f"{kind}.{name}"].ravel().astype(np.float64) for name in raw.sizes])
        for kind in ("exp_avg", "exp_avg_sq")
    )
    with safe_open(moments, framework="np") as file:
        return adam_step(raw.flat, m, v, step=int(file.metadata()["step"]), form=form)


def adam_step(g: Floats, m: Floats, v: Floats, *, step: int, form: str) -> Floats:
    """Adam's direction with m' = β₁m + (1 − β₁)g and v' = β₂v + (1 − β₂)g² (LESS, arXiv 2402.04333, section 2).

    `less` is m' / √(v' + ε), as LESS's published code has it; `exact` (m' / (1 − β₁ᵗ)) / (√(v' / (1 − β₂ᵗ)) + ε) at
    t = step + 1.
    """
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    if form == "less":
        return np.asarray(m / np.sqrt(v + 1e-8))
    t = step + 1
    return np.asarray((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))


# Projections --------------------------------------------------------------------------------------------------------


def words(seed: int, purpose: str, name: str, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Words of the documented stream: SplitMix64 keyed by SHA-256, here in numpy's unsigned integers."""
    digest = hashlib.sha256(f"gradstore-projection|1|{seed}|{purpose}|{name}".encode()).digest()
    with np.errstate(over="ignore"):
        z = np.uint64(int.from_bytes(digest[:8], "little")) + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def matrix(projection: str, dim: int, seed: int, sizes: Shapes) -> Floats:
    """The whole map as a matrix (p, dim)."""
    if projection == "reference":
        return _reference(sum(sizes.values()), dim, seed)
    make = {"blocks": _blocks, "sjlt": _sjlt, "fft": _fft, "rademacher": _rademacher}[projection]
    return np.concatenate([make(name, size, dim, seed) for name, size in sizes.items()])


def _signs(name: str, size: int, seed: int) -> Floats:
    """Coordinate c has the sign of bit c mod 64 of word ⌊c / 64⌋."""
    c = np.arange(size, dtype=np.uint64)
    bits = words(seed, "signs", name, c // np.uint64(64)) >> (c % np.uint64(64)) & np.uint64(1)
    return np.where(bits, 1.0, -1.0)


def _blocks(name: str, size: int, dim: int, seed: int) -> Floats:
    """Coordinate c goes to (c + offset of its run) mod dim, with its sign."""
    runs = words(seed, f"offsets/{dim}", name, np.arange(-(-size // dim), dtype=np.uint64))
    offsets = np.array([int(word) * dim >> 64 for word in runs])
    rows = np.arange(size)
    made = np.zeros((size, dim))
    made[rows, (rows + offsets[rows // dim]) % dim] = _signs(name, size, seed)
    return made


def _sjlt(name: str, size: int, dim: int, seed: int) -> Floats:
    """Coordinate c goes to ⌊word_c · dim / 2⁶⁴⌋, with its sign."""
    drawn = words(seed, "places", name, np.arange(size, dtype=np.uint64))
    made = np.zeros((size, dim))
    made[np.arange(size), [int(word) * dim >> 64 for word in drawn]] = _signs(name, size, seed)
    return made


def _fft(name: str, size: int, dim: int, seed: int) -> Floats:
    """The rows with the smallest words of a real orthonormal Fourier basis of n, over coordinates with their signs."""
    n = max(2, 1 << (max(size, dim) - 1).bit_length())
    rows = np.argsort(words(seed, f"rows/{n}", name, np.arange(n, dtype=np.uint64)))[:dim]
    angles = 2 * np.pi / n * np.outer(np.arange(size), (rows + 1) // 2)
    waves = np.where((rows % 2 == 1) | (rows == 0), np.cos(angles), -np.sin(angles))
    ends = (rows == 0) | (rows == n - 1)
    return np.asarray(_signs(name, size, seed)[:, None] * waves * np.sqrt(np.where(ends, 1, 2) / dim))


def _rademacher(name: str, size: int, dim: int, seed: int) -> Floats:
    """Row c has its column j from bit j mod 64 of word c · 2¹⁴ + ⌊j / 64⌋."""
    j = np.arange(dim, dtype=np.uint64)
    counters = np.arange(size, dtype=np.uint64)[:, None] * np.uint64(1 << 14) + j // np.uint64(64)
    bits = words(seed, "matrix", name, counters) >> (j % np.uint64(64)) & np.uint64(1)
    return np.asarray(np.where(bits, 1.0, -1.0) / np.sqrt(dim))


def _reference(size: int, dim: int, seed: int) -> Floats:
    """GradEx's: 2b − 1 of NumPy's legacy generator, all parameters together and in one call."""
    drawn = np.random.RandomState(seed).randint(2, size=(size, dim))
    return np.asarray((2.0 * drawn - 1) / np.sqrt(dim))


# Scores -------------------------------------------------------------------------------------------------------------


def influences(train: Sequence[Floats], target: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """S[z, v] = Σ_i w_i cos(z_i, v_i) over the checkpoints i, the weights over their sum: (n, m)."""
    parts = [weight * (_unit(z) @ _unit(v).T) for z, v, weight in zip(train, target, weights, strict=True)]
    return np.asarray(np.sum(parts, axis=0) / sum(weights))


def aggregated(table: Floats, subtasks: Sequence[str], how: str = "less") -> Floats:
    """One score per training row: the largest mean over a subtask's rows, or one number over all target rows."""
    if how == "avg":
        return np.asarray(table.mean(axis=1))
    if how in {"max", "min"}:
        return np.asarray(table.max(axis=1) if how == "max" else table.min(axis=1))
    labels = np.array(subtasks)
    return np.asarray(np.max([table[:, labels == name].mean(axis=1) for name in dict.fromkeys(subtasks)], axis=0))


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
