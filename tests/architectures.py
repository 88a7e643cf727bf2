"""Small models of several architectures, and what their features must be: float64 autograd of one example alone.

No line of `worker` takes part in the numbers: the model in double precision, one example, one backward pass, the
formulas written out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.bruteforce import adam_step
from worker.batches import IGNORED, Encoded
from worker.directions import Moments

VOCABULARY = 96
BROKEN_TOKEN = VOCABULARY - 1  # in no row but the ones that ask for it
PAD = 10**6  # outside every vocabulary: padding must not be looked up

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "mistral": SHAPE | {"sliding_window": 8},
    "qwen2": SHAPE,
    "qwen3": SHAPE | {"tie_word_embeddings": True},
    "gemma2": SHAPE | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.2,
        "attn_pdrop": 0.2,  # on if anything left the model in training mode
    },
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "init_std": 0.2,
        "dropout": 0.2,  # a number of the layer's own, not a module
    },
    "mixtral": SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": SHAPE
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = "mixtral with LoRA on its experts"
ADAPTERS: dict[str, dict[str, Any]] = {
    **{name: {"target_modules": LINEAR} for name in ARCHITECTURES},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "opt": {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]},
    EXPERTS: {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "lora_dropout": 0.0},
}
"""LoRA on attention and MLP; Mixtral's experts are parameters of one module, which only `EXPERTS` reaches."""


def rows(lengths: Sequence[int] = (9, 23, 4, 31, 12, 2, 17), *, seed: int = 3) -> list[Encoded]:
    """Random tokens; the first third of each row is a prompt, and a hole in the middle another turn of the user."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(1, BROKEN_TOKEN, (length,), generator=generator).tolist()
        hole = range(length // 2, length // 2 + length // 6)
        labels = [IGNORED if t < max(1, length // 3) or t in hole else token for t, token in enumerate(ids)]
        made.append(Encoded(tuple(ids), tuple(labels)))
    return made


def base_model(architecture: str, **overrides: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **(ARCHITECTURES[architecture] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def adapt(model: PreTrainedModel, **settings: Any) -> PeftModel:
    """Put a LoRA on the model whose A and B are both random: at LoRA's usual start, B = 0, A has no gradient."""
    settings = {"target_modules": ATTENTION, "r": 3, "lora_alpha": 6, "lora_dropout": 0.3} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    assert isinstance(adapted, PeftModel)
    return adapted


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model: torch.nn.Module, row: Encoded) -> torch.Tensor:
    """The mean of −log softmax over the supervised tokens, each predicted from the one before."""
    logits, labels = _predictions(model, row)
    return (logits.logsumexp(1) - logits.gather(1, labels)[:, 0]).mean()


def log_odds_of(model: torch.nn.Module, row: Encoded) -> torch.Tensor:
    """The mean of log(p / (1 − p)) over the supervised tokens, with 1 − p the sum of all other tokens' p."""
    logits, labels = _predictions(model, row)
    log_p = logits.log_softmax(1)
    others = log_p.exp().scatter(1, labels, 0).sum(1)
    return (log_p.gather(1, labels)[:, 0] - others.log()).mean()


def _predictions(model: torch.nn.Module, row: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits (tokens, vocabulary) that predict the supervised tokens, and these (tokens, 1)."""
    logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]
    labels = torch.tensor(row.labels[1:])
    learnt = torch.nonzero(labels != IGNORED).squeeze(1)
    return logits[learnt], labels[learnt].unsqueeze(1)


@dataclass(frozen=True)
class Reference:
    """What the features must be, from float64: `gradients` (n, p), flat in the order of named_parameters."""

    gradients: torch.Tensor
    losses: torch.Tensor
    hidden: dict[str, torch.Tensor]
    """(n, width) by kind, means over each row's tokens of the last hidden states that `transformers` gives out."""


def reference(
    model: PeftModel | PreTrainedModel,
    examples: Sequence[Encoded],
    *,
    objective: Callable[[torch.nn.Module, Encoded], torch.Tensor] = loss_of,
) -> Reference:
    """What the features of examples must be; `losses` are the objective's values, whose gradients are taken."""
    double = copy.deepcopy(model).double().eval()
    base = double.get_base_model() if isinstance(double, PeftModel) else double
    base.set_experts_implementation("eager")  # the fused one has no double precision
    gradients, losses, hidden, weighted = [], [], [], []
    for row in examples:
        loss = objective(double, row)
        parts = torch.autograd.grad(loss, list(trainable(double).values()), allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
        losses.append(loss.detach())
        with torch.no_grad():
            states = double(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[-1]
        hidden.append(states[0].mean(0))
        weighted.append(sum(place * state for place, state in enumerate(states[0], 1)) / sum(range(len(states[0]) + 1)))
    return Reference(
        torch.stack(gradients), torch.stack(losses), {"hidden": torch.stack(hidden), "rds": torch.stack(weighted)}
    )


def train(model: PeftModel | PreTrainedModel, *, steps: int = 12) -> Moments:
    """Take real AdamW steps and return its moments by name."""
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
    batches = rows([12, 20, 7, 28], seed=11)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batches[step % len(batches)]).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
    optimizer.zero_grad()
    state = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return Moments(
        exp_avg={name: values["exp_avg"] for name, values in state.items()},
        exp_avg_sq={name: values["exp_avg_sq"] for name, values in state.items()},
        step=steps,
    )


@cache
def trained(name: str, precision: torch.dtype = torch.float32) -> tuple[PeftModel, Moments, Reference]:
    """A model of `ADAPTERS` after twelve steps, its moments, and the reference of `rows()`; not to be changed.

    `precision` is the base model's; the adapter stays in float32, as PEFT keeps it.
    """
    if precision == torch.float32:
        model = adapt(base_model(name.partition(" ")[0]), **ADAPTERS[name])
        moments = train(model.eval())
    else:
        model, moments, _ = copy.deepcopy(trained(name))
        adapter = {parameter: parameter.data for parameter in trainable(model).values()}
        model.to(precision)
        for parameter, values in adapter.items():
            parameter.data = values
    return model, moments, reference(model, rows())


def flat(moments: Mapping[str, torch.Tensor]) -> NDArray[np.float64]:
    return torch.cat([moment.double().flatten() for moment in moments.values()]).numpy()


def direction(gradients: torch.Tensor, kind: str, adam: str, moments: Moments) -> torch.Tensor:
    """What a feature of this kind is before the projection, in float64."""
    if kind != "adam":
        return gradients.sign() if kind == "sign" else gradients
    first, second = flat(moments.exp_avg), flat(moments.exp_avg_sq)
    return torch.from_numpy(adam_step(gradients.numpy(), first, second, step=moments.step, form=adam))


def relative_error(got: NDArray[Any] | torch.Tensor, wanted: NDArray[Any] | torch.Tensor) -> float:
    """Largest over the rows of ‖got − wanted‖ / ‖wanted‖."""
    got, wanted = torch.as_tensor(got).double(), torch.as_tensor(wanted).double()
    return float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
