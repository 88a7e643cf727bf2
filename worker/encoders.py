"""Sentence embeddings: the last hidden states of an encoder, pooled to one row per text as its files say.

They are features like any other (worker/gradients.py): the same batches, reasons and stored arrays. A text is an
example's own, without a template's marks (`Example.text`). Unlike a causal model's, an encoder's tokens look at all
others: padding is masked, and changes a row by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedModel, PreTrainedTokenizerBase

from datastore.encoders import Encoder
from datastore.rows import Example
from worker.batches import Encoded, collate, plan
from worker.directions import Kind
from worker.features import FEATURE_NOT_FINITE, Features
from worker.layouts import Padded
from worker.models import DTYPES, ModelError, Precision, loading, refuse_pickled_weights
from worker.reading import Check, Rows

EMBEDDING = Kind("embedding")
NO_TEXT = "no text"


def load_encoder(
    model: str, *, revision: str | None = None, precision: Precision = "float32", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load an encoder (hub id or folder) without a head, frozen and in eval mode; of an encoder-decoder the encoder.

    Raises ModelError where the weights are not safetensors, or nothing can be loaded.
    """
    refuse_pickled_weights(Path(model))
    with loading(f"the encoder {model!r}"):
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        auto: Any = AutoModelForTextEncoding if getattr(config, "is_encoder_decoder", False) else AutoModel
        loaded: Any = auto.from_pretrained(
            model, revision=revision, trust_remote_code=False, use_safetensors=True, dtype=DTYPES[precision]
        )
    frozen: PreTrainedModel = loaded.to(torch.device(device)).requires_grad_(False).eval()
    return frozen


def encoder_of(plan: Mapping[str, Any]) -> Encoder | None:
    """The sentence encoder whose embeddings a job is asked for; None where it is asked for other kinds."""
    found = plan.get("encoder")
    return None if found is None else Encoder.of_plan(found)


def read_texts(
    examples: Iterable[Example],
    *,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    max_length: int,
    check: Check,
) -> Rows:
    """Tokenise the texts of a shard's rows; `check` is called before each, and its exception ends the work."""
    rows = Rows()
    for position, example in enumerate(examples):
        check()
        text = example.text
        if not text.strip():
            rows.reasons.append(NO_TEXT)
            continue
        text = (encoder.prompt + text).strip()
        ids = tokenizer(text.lower() if encoder.lower else text, truncation=True, max_length=max_length, verbose=False)[
            "input_ids"
        ]
        rows.encoded.append(Encoded(tuple(ids), tuple(ids)))
        rows.positions.append(position)
        rows.reasons.append(None)
    return rows


class EncoderEngine:
    """Computes the embeddings of texts; in place of a `GradientEngine` where the kind is `embedding`."""

    packing = False

    def __init__(self, model: PreTrainedModel, encoder: Encoder) -> None:
        self.model = model
        self.parameters: dict[str, Tensor] = {}
        self.device = next(model.parameters()).device
        self._encoder = encoder

    def features(
        self,
        rows: Sequence[Encoded],
        *,
        pad_id: int,
        token_budget: int,
        on_batch: Callable[[int], None] | None = None,
        before_batch: Callable[[Sequence[int]], None] = lambda _: None,
    ) -> dict[Kind, Features]:
        """Compute the embeddings of `rows`, in batches of at most `token_budget` tokens with their padding.

        `before_batch` gets the indices of the rows that are about to go through the model, and `on_batch` the number
        of rows done so far after every batch; an exception of theirs ends the work.
        """
        found = np.zeros((len(rows), self._encoder.dim), np.float32)
        done = 0
        for batch in plan([len(row.input_ids) for row in rows], token_budget=token_budget):
            before_batch(batch)
            found[batch] = self._compute([rows[index] for index in batch], pad_id=pad_id).cpu().numpy()
            done += len(batch)
            if on_batch is not None:
                on_batch(done)
        finite: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(found), axis=1)
        found[~finite] = 0
        norms = np.linalg.norm(found.astype(np.float64), axis=1).astype(np.float32)
        features = Features(
            by_dim={self._encoder.dim: found},
            norms=norms,
            reasons=[None if each else FEATURE_NOT_FINITE for each in finite.tolist()],
            losses=np.zeros(len(rows), np.float32),
            tokens=np.array([len(row.input_ids) for row in rows], np.int32),
            raw_norms=norms,
        )
        return {EMBEDDING: features}

    @torch.no_grad()
    def _compute(self, rows: Sequence[Encoded], *, pad_id: int) -> Tensor:
        batch = collate(rows, pad_id=pad_id)
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if states.shape[2] != self._encoder.width:
            raise ModelError(
                f"the model's config.json promises hidden states of {self._encoder.width:,} numbers, and there are "
                f"{states.shape[2]:,}"
            )
        pooled = torch.cat([pool(states, mask, how) for how in self._encoder.poolings], dim=1)
        return torch.nn.functional.normalize(pooled, dim=1) if self._encoder.normalise else pooled


def pool(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """Pool states (n, width, size) of texts padded on the right, mask (n, width) 1 for tokens: (n, size) float32."""
    lengths = mask.sum(1)
    layout = Padded(states.shape[:2], lengths)
    match how:
        case "cls":
            return states[:, 0].float()
        case "last":
            return states[torch.arange(len(states), device=states.device), lengths - 1].float()
        case "max":
            return states.float().masked_fill(mask.unsqueeze(2) == 0, -torch.inf).amax(1)
        case "mean":
            return layout.means(states)
        case "mean_sqrt_len":
            return layout.means(states) * lengths.unsqueeze(1).sqrt()
        case "position":
            return layout.means(states, "position")
    raise ModelError(f"the pooling {how!r} is not known to this worker: bring service and workers to the same version")
