"""A base model made on the spot: a small Llama that has seen all skills, and masters none.

It knows the words and the format, as a pretrained model does, so that a gradient says something about a skill.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from datastore.rows import Example, Message
from examples.demo.skills import LETTERS, SKILLS, example
from worker.batches import Encoded, collate, encode

STEPS = 260
BATCH = 48  # examples a step
LEARNING_RATE = 3e-3
END, UNKNOWN = "</s>", "<unk>"


def build(folder: Path, *, seed: int) -> None:
    """Make the tokenizer and the model, and save them as a folder that transformers loads."""
    torch.manual_seed(seed)
    logging.disable_progress_bar()  # of writing one small file
    tokenizer = _tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    _pretrain(model, tokenizer, random.Random(f"pretraining {seed}"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = [END, UNKNOWN, "<|user|>", "<|assistant|>", ":", *LETTERS]
    words += [word for names, _ in SKILLS.values() for word in names]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, unk_token=UNKNOWN, pad_token=END)


def _pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    model.train()
    for _ in range(STEPS):
        batch = collate([_encoded(tokenizer, rng) for _ in range(BATCH)], pad_id=tokenizer.pad_token_id)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def _encoded(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Encoded:
    question, answer = example(rng.choice(list(SKILLS)), rng)
    row = Example(id=None, origin="", messages=(Message("user", question), Message("assistant", answer)))
    return encode(row, tokenizer=tokenizer, template="tulu", max_length=128)


def use_one_thread() -> None:
    """Products this small are slower on several threads."""
    torch.set_num_threads(1)
