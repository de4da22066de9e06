"""Scikit-learn's handwritten digits, and the order in which they are shown: real data, without a download."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Labelled = tuple[Tensor, Tensor]
"""Images [N, 8, 8] between -1 and 1, and which digit each shows."""

TEST_IMAGES = 360


def digits(device: torch.device) -> tuple[Labelled, Labelled]:
    """(1437 to train on, 360 to test on), always the same ones."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device) / 8 - 1
    labels = torch.tensor(data.target, device=device)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    images, labels = images[shuffled], labels[shuffled]
    return (images[TEST_IMAGES:], labels[TEST_IMAGES:]), (images[:TEST_IMAGES], labels[:TEST_IMAGES])


def batches(count: int, steps: int, seed: int, size: int) -> Iterator[Tensor]:
    """Indices of each step's images: epochs in a shuffled order, the remainder of each left out."""
    generator = torch.Generator().manual_seed(seed)
    while steps > 0:
        for batch in torch.randperm(count, generator=generator).split(size)[: min(steps, count // size)]:
            yield batch
            steps -= 1
