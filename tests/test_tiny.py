"""The tiny tokenizer and model behave as real ones do."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_tiny_model, tiny_tokenizer


def test_the_tiny_tokenizer_gives_any_text_back_unchanged() -> None:
    tokenizer = tiny_tokenizer()
    text = "Ünïcödé 🙂\n  two  spaces, العربية\t<|user|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_saved_tiny_model_loads_and_its_seed_fixes_its_weights(tmp_path: Path) -> None:
    same = [AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / name)) for name in ("a", "b")]
    other = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "c", seed=1))
    ids = AutoTokenizer.from_pretrained(tmp_path / "a")("Add 2 and 3.", return_tensors="pt")["input_ids"]
    first, again, different = (model(ids).logits for model in (*same, other))
    assert torch.equal(first, again)
    assert not torch.allclose(first, different)
