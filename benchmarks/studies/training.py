"""Training for studies: plain stochastic gradient descent on a classifier, in epochs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from ..digits import Labelled


class Epoch(NamedTuple):
    """Means over the batches of an epoch, each as the model was when it came."""

    loss: float
    error: float


class InParts(nn.Module):
    """Gives the model its input a part at a time while it trains, so that each part has statistics of its own."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__()
        self.model, self.samples = model, samples

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.model(x)
        return torch.cat([self.model(part) for part in x.split(self.samples)])


def fit(
    model: nn.Module,
    data: Labelled,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch: int,
    seed: int,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    penalty: Callable[[], Tensor] | None = None,
    clip: float | None = None,
) -> list[Epoch]:
    """Trains in an order that the seed decides; the remainder of an epoch that fills no batch is left out.

    schedule: moved after each batch. penalty: added to the loss, not to what is reported. clip: the largest norm of all
    gradients together.
    """
    inputs, labels = data
    generator = torch.Generator().manual_seed(seed)
    history = []
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator).split(batch)[: len(labels) // batch]
        losses, wrong = [], []
        for chosen in (indices.to(labels.device) for indices in order):
            logits = model(inputs[chosen])
            loss = TF.cross_entropy(logits, labels[chosen])
            losses.append(loss.detach())
            wrong.append((logits.argmax(1) != labels[chosen]).float().mean())
            optimizer.zero_grad()
            (loss if penalty is None else loss + penalty()).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
        history.append(Epoch(torch.stack(losses).mean().item(), torch.stack(wrong).mean().item()))
    return history


@torch.no_grad()
def error(model: nn.Module, data: Labelled) -> float:
    """The share of the inputs that an evaluated model gets wrong."""
    inputs, labels = data
    model.eval()
    wrong = (model(inputs).argmax(1) != labels).float().mean().item()
    model.train()
    return wrong
