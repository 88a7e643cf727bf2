"""A real tokenizer and a real Llama, small enough for a test: seconds to make, milliseconds to run.

The tokenizer is a byte-level BPE trained on the spot, so any text can be tokenised and comes back unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = (
    "<|system|>\n<|user|>\nWhat is the capital of France?\n<|assistant|>\nThe capital of France is Paris.\n",
    "<|user|>\nAdd 2 and 3.\n<|assistant|>\nThe answer is 5.\n#### 5\n",
    "Question: how many apples are left?\nA. one\nB. two\nC. three\nD. four\nAnswer: B\n",
    "Let's think step by step. So the answer is (A).\n\nQ: Is this true?\nA: No\n",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer(
    texts: Iterable[str] = TEXTS, *, vocab_size: int = 384, bos: bool = True, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts` with the specials `<s>`, `</s>` and `<pad>`; with `bos`, `<s>` comes first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def tiny_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Make a two-layer Llama of float32 weights drawn with `seed`, in eval mode; `config` overrides its shape."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # large enough for answers to differ between rows
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
    model.eval()
    return model


def save_tiny_encoder(
    folder: Path, *, modules: Mapping[str, Mapping[str, Any]] | None = None, seed: int = 0, **config: Any
) -> Path:
    """Write a two-layer BERT of random weights and its tokenizer; with `modules` (`Pooling`, and `Normalize` after it)
    in the layout of sentence-transformers.
    """
    tokenizer = tiny_tokenizer(bos=True)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(BertConfig(**(settings | config))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if modules is not None:
        listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        for number, (name, content) in enumerate(modules.items(), 1):
            path = f"{number}_{name}"
            listed.append(
                {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
            )
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(content))
        (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def save_tiny_model(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """Write tokenizer and model to `folder` as `from_pretrained` reads them (safetensors), and return the folder."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer, seed=seed, **config).save_pretrained(folder)
    return folder
