"""A small language model trained on the spot on a pool's own text: tokenizer first, then next-token prediction."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
WIDTH, LAYERS, HEADS = 192, 4, 6
STEPS, BATCH, LENGTH = 400, 16, 128  # batch in sequences, length in tokens
LEARNING_RATE = 3e-3


def build(
    folder: Path, texts: Sequence[str], *, seed: int, steps: int = STEPS, width: int = WIDTH, layers: int = LAYERS
) -> None:
    """Train on `texts` and save a folder that transformers loads."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(texts)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    _train(model, tokenizer, texts, random.Random(seed), steps=steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text of any language can be written, and comes back unchanged."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    rng: random.Random,
    *,
    steps: int,
) -> None:
    """Next-token prediction on random windows of the texts, one after the other in a random order."""
    ids: list[int] = []
    for text in rng.sample(list(texts), len(texts)):
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    stream = torch.tensor(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in (bar := trange(steps, desc="base model", unit="step")):
        starts = [rng.randrange(len(stream) - LENGTH) for _ in range(BATCH)]
        windows = torch.stack([stream[start : start + LENGTH] for start in starts])
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
