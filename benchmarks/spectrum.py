"""Features of real rows, and any number of rows like them.

Real ones come from the project's own engine, over a small model that is made here: a Llama of 96 × 3 with a byte-level
BPE of 1,024 words, trained on the file itself, first all its weights and then LoRA of rank 16 on q, k, v and o, whose
Adam moments the pool's features have. The pool's are `adam` in the form `less`, the questions' `sgd`, both of `blocks`
to one dim: what a datastore of LESS holds. 650 rows take 40 seconds of one core.

Many rows are resampled from these few, with the spectrum that these have. Unit rows are split into their mean, their
coordinates in the first `RANK` principal directions, and what is left. A new row is the mean, plus the coordinates of a
real row drawn at random, moved by up to a half towards one of its eight nearest neighbours, plus a random direction as
long as what was left of the real row. A question is a real row that no new one is made from.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from datastore.rows import Example
from datastore.shapes import example
from worker.batches import Encoded, Unsupervised, collate, encode
from worker.directions import Kind, Moments
from worker.gradients import GradientEngine

Floats = NDArray[np.float32]

WORDS = 1024
MAX_LENGTH = 96  # tokens
PRETRAINING, WARM_UP = 60, 12  # steps
BATCH = 8
TOKEN_BUDGET = 1024
RANK = 256
NEIGHBOURS = 8


@dataclass(frozen=True)
class RealFeatures:
    """Unit features of real rows."""

    pool: Floats
    """(n, dim) as a pool has them: of kind `adam`."""
    queries: Floats
    """(m, dim) of other rows, as a question has them: of kind `sgd`."""


def real_features(file: Path, *, rows: int, queries: int, dim: int, seed: int = 0) -> RealFeatures:
    """Train the small model on the first rows of a JSONL file, and compute the features of `rows` of them for a pool,
    and of the `queries` after these as questions.
    """
    torch.manual_seed(seed)
    examples = [example(json.loads(line), file=file.name)[0] for line in file.read_text().splitlines()]
    tokenizer = _tokenizer(file)
    encoded = list(itertools.islice(_encoded(examples, tokenizer), rows + queries))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=MAX_LENGTH,
        )
    )  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    _train(model, encoded[:rows], steps=PRETRAINING, learning_rate=2e-3, order=order)
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name of before
        adapted: Any = get_peft_model(model.requires_grad_(False), lora)
    moments = _train(adapted, encoded[:rows], steps=WARM_UP, learning_rate=1e-3, order=order)
    engine = GradientEngine(adapted, kinds=[Kind("adam"), Kind("sgd")], moments=moments, dims=[dim], seed=seed)
    found = engine.features(encoded, pad_id=int(tokenizer.pad_token_id), token_budget=TOKEN_BUDGET)
    pool, asked = (found[Kind(name)].by_dim[dim] for name in ("adam", "sgd"))
    return RealFeatures(pool=_unit(pool[:rows]), queries=_unit(asked[rows:]))


class Resampled:
    """Rows like the real ones, as many as wanted: row n depends on the seed and n alone."""

    def __init__(self, pool: Floats, *, rank: int = RANK, seed: int = 0) -> None:
        self._mean = pool.mean(axis=0)
        centred = pool - self._mean
        _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
        self.spectrum = np.square(sizes) / np.square(sizes).sum()
        """Share of the variance in each principal direction of the real rows."""
        self._axes = np.ascontiguousarray(axes[:rank])
        self._coordinates = centred @ self._axes.T
        left = centred - self._coordinates @ self._axes
        self._residuals = np.linalg.norm(left, axis=1)
        products = self._coordinates @ self._coordinates.T
        squares = np.diag(products)
        distances = squares[:, None] + squares - 2 * products
        self._near = np.argsort(distances, axis=1)[:, 1 : 1 + NEIGHBOURS]
        self._seed = seed

    def block(self, start: int, stop: int) -> Floats:
        """Rows `start:stop` (n, dim), about as long as unit rows."""
        coordinates, residuals = self.coordinates(start, stop)
        rng = np.random.default_rng([self._seed, start, 1])
        found: Floats = rng.standard_normal((stop - start, len(self._mean)), np.float32)
        found *= (residuals / np.sqrt(len(self._mean)))[:, None]
        found += coordinates @ self._axes
        found += self._mean
        return found

    def coordinates(self, start: int, stop: int) -> tuple[Floats, Floats]:
        """Of rows `start:stop`: principal coordinates less the mean's (n, rank), and the length of the rest (n,)."""
        rng = np.random.default_rng([self._seed, start])
        rows = rng.integers(len(self._coordinates), size=stop - start)
        near = self._near[rows, rng.integers(self._near.shape[1], size=stop - start)]
        share = rng.uniform(0, 0.5, (stop - start, 1)).astype(np.float32)
        mixed = self._coordinates[rows] * (1 - share) + self._coordinates[near] * share
        return mixed.astype(np.float32), self._residuals[rows]

    def lengths(self, coordinates: Floats, residuals: Floats) -> Floats:
        """Lengths of rows with these coordinates (n,)."""
        inside = 2 * coordinates @ (self._axes @ self._mean) + np.square(coordinates).sum(axis=1)
        found: Floats = np.sqrt(self._mean @ self._mean + inside + np.square(residuals)).astype(np.float32)
        return found

    def centred(self, coordinates: Floats, lengths: Floats) -> Floats:
        """Principal coordinates of the unit rows, less the mean's (n, rank)."""
        mean = self._axes @ self._mean
        found: Floats = ((coordinates + mean) / lengths[:, None] - mean).astype(np.float32)
        return found

    def question(self, rows: Floats) -> tuple[Floats, Floats, Floats]:
        """Of questions (m, dim): their principal coordinates (m, rank), their product with the mean (m,), and what the
        product with a random direction outside of the principal ones has as its standard deviation (m,)."""
        inside = rows @ self._axes.T
        outside = np.linalg.norm(rows - inside @ self._axes, axis=1) / np.sqrt(rows.shape[1])
        return inside, rows @ self._mean, outside.astype(np.float32)


def _encoded(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> Iterator[Encoded]:
    """The rows that have something to learn from within `MAX_LENGTH`."""
    for each in examples:
        with contextlib.suppress(Unsupervised):
            yield encode(each, tokenizer=tokenizer, template="tulu", max_length=MAX_LENGTH)


def _tokenizer(file: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(file.read_text().splitlines(), trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    made: Any = PreTrainedTokenizerFast  # transformers leaves it untyped
    fast: PreTrainedTokenizerFast = made(tokenizer_object=tokenizer, **names)
    return fast


def _train(model: Any, rows: Sequence[Encoded], *, steps: int, learning_rate: float, order: torch.Generator) -> Moments:
    """Train what is trainable, and return Adam's moments."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=learning_rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        chosen = [rows[row] for row in torch.randint(len(rows), (BATCH,), generator=order).tolist()]
        batch = collate(chosen, pad_id=2)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: optimizer.state[parameter] for name, parameter in named.items()}
    return Moments(
        exp_avg={name: values["exp_avg"] for name, values in state.items()},
        exp_avg_sq={name: values["exp_avg_sq"] for name, values in state.items()},
        step=steps,
    )


def _unit(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = (rows / np.where(lengths > 0, lengths, 1))[lengths[:, 0] > 0]
    return found
