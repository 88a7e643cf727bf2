"""Where the tokens of a row go: experts with their weights, sub-routers, and the load of each layer.

A row is traced by one forward pass over all its tokens, without padding or neighbours. Unless a gate is over the whole
batch (`gate_scope=batch`) the choices are those that were made when the row was written, token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from gradstore.types import LayerLoad, Trace, TracedModule
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore.mixture_files import layer_number
from worker.mixtures.balance import load, recording
from worker.mixtures.routers import RouterOfRouters, choose

DIGITS = 4


@dataclass
class Loads:
    """What fell on the experts of each layer, summed over rows: f and P of worker/mixtures/balance.py."""

    sums: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, layer: int, choices: Tensor, probabilities: Tensor, *, tokens: int) -> None:
        """Add a module's f (N,) and P (N,) of a row of so many tokens."""
        self.sums.setdefault(layer, []).append((choices * tokens, probabilities * tokens))

    def layers(self) -> list[LayerLoad]:
        """The load of each layer, over all its modules and all rows."""
        found = []
        for layer, parts in sorted(self.sums.items()):
            f, p = (torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True))
            f, p = f / f.sum(), p / p.sum()
            found.append(LayerLoad(layer=layer, load=_rounded(f), balance=float(len(f) * (f * p).sum())))
        return found


@torch.no_grad()
def trace(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, last: int, loads: Loads
) -> Trace:
    """Trace the `last` tokens of a row, and add all of them to `loads`."""
    first = max(len(tokens) - last, 0)
    ids = torch.tensor([list(tokens)], device=model.device)
    with recording(model) as record, _sub_routers(model) as gates:
        model(input_ids=ids, use_cache=False)
    modules = []
    for path, (routed,) in record.routed.items():
        layer = layer_number(path)
        assert layer is not None  # noqa: S101 - for mypy: a mixture is put on modules of layers only
        loads.add(layer, *load(routed), tokens=len(tokens))
        chosen, weights = choose(routed.logits[0, first:], routed.chosen.shape[-1])
        gate = gates.get(path)
        modules.append(
            TracedModule(
                module=path,
                layer=layer,
                experts=chosen.tolist(),
                weights=[_rounded(row) for row in weights.gather(-1, chosen)],
                sub_routers=None if gate is None else [_rounded(row) for row in gate[0, first:]],
            )
        )
    return Trace(first=first, tokens=[tokenizer.decode([token]) for token in tokens[first:]], modules=modules)


@contextmanager
def _sub_routers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The weights (1, tokens, J) of the sub-routers of a pass, by the path of their module."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> torch.utils.hooks.RemovableHandle:
        module = model.get_submodule(path)
        assert isinstance(module, RouterOfRouters)  # noqa: S101 - for mypy

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[path.partition(".lora_router.")[0]] = module.weights(inputs[0])

        return module.register_forward_pre_hook(hook)

    handles = [keep(path) for path, module in model.named_modules() if isinstance(module, RouterOfRouters)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _rounded(numbers: Tensor) -> list[float]:
    return [round(number, DIGITS) for number in numbers.tolist()]
