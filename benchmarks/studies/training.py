"""Training of classifiers for studies, and what is asked of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from ..digits import Labelled, batches


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
    updates = len(labels) // batch
    order = batches(len(labels), epochs * updates, seed, batch)
    history = []
    model.train()
    for _ in range(epochs):
        losses, wrong = [], []
        for chosen in (indices.to(labels.device) for indices in itertools.islice(order, updates)):
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


def descend(
    model: nn.Module, data: Labelled, *, epochs: int, batch: int, seed: int, learning_rate: float, weight_decay: float
) -> list[Epoch]:
    """`fit` by stochastic gradient descent with a momentum of 0.9, the learning rate falling to 0 along a cosine."""
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(data[1]) // batch))
    return fit(model, data, optimizer, epochs=epochs, batch=batch, seed=seed, schedule=schedule)


@torch.no_grad()
def error(model: nn.Module, data: Labelled, training: bool = False) -> float:
    """The share of the inputs that the model gets wrong: evaluated, or as it is in `training`, where a batch norm goes
    by these inputs themselves."""
    inputs, labels = data
    model.train(training)
    wrong = (model(inputs).argmax(1) != labels).float().mean().item()
    model.train()
    return wrong


def gradient_ratio(model: nn.Module, data: Labelled, layers: Sequence[nn.Module]) -> float:
    """The norm of the loss's gradient by the first of the layers' outputs over that by the last's."""
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, operands: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    handles = [layer.register_forward_hook(keep) for layer in (layers[0], layers[-1])]
    inputs, labels = data
    TF.cross_entropy(model(inputs), labels).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    first, last = (0.0 if output.grad is None else output.grad.norm().item() for output in outputs)
    return first / max(last, 1e-30)
