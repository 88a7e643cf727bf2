"""Training a mixture: the load-balance loss beside the cross-entropy, and a log that says both by themselves."""

from __future__ import annotations

from typing import Any

import torch
from gradstore.types import MixtureSettings
from torch import Tensor, nn
from transformers import Trainer

from worker.mixtures.balance import recording


class BalancedTrainer(Trainer):
    """A Trainer of a mixture; it must log every step.

    A step's loss is the mean cross-entropy of all its supervised tokens and, times the coefficient, the mean over its
    forward passes of their load-balance losses, however many passes the step is made of.
    """

    mixture: MixtureSettings
    """To be set before the training."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._parts: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one forward pass, scaled as the Trainer asks: to be added up, or to be divided by the passes."""
        mask = inputs["attention_mask"] if self.mixture.ignore_padding else None
        with recording(model) as record:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.set_grad_enabled(self.mixture.balance > 0):
            balance = record.balance(mask)
        passes = self.current_gradient_accumulation_steps
        # with the number of the step's tokens the cross-entropy is a sum's part; without, the Trainer divides the loss
        summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        entropy = loss.detach() if summed else loss.detach() / passes
        self._parts.append(torch.stack([entropy.float(), balance.detach().float() / passes]))
        if self.mixture.balance:
            loss = loss + self.mixture.balance * (balance / passes if summed else balance)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a step's cross-entropy as `loss`, and its load-balance loss without the coefficient as `balance`."""
        if self._parts:
            entropy, balance = torch.stack(self._parts).sum(dim=0).tolist()
            logs |= {"loss": entropy, "balance": balance}
            self._parts.clear()
        super().log(logs, start_time)
