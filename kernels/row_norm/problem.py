"""What a row norm computes, and what its launchers return: the vocabulary that both directions share."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..activations import ACTIVATIONS

Tensor = torch.Tensor


class RowNorm(NamedTuple):
    """One row norm over rows of `span` elements: y = activation(norm(x) * weight + bias + residual), or, with
    add_first, total = x + residual and y = activation(norm(total) * weight + bias). alpha and beta parametrize the
    activation."""

    span: int
    eps: float
    subtract_mean: bool
    add_first: bool = False
    activation: str | None = None
    alpha: float = 0.0
    beta: float = 0.0

    @property
    def slope_takes_two_values(self) -> bool:
        return ACTIVATIONS[self.activation].passes is not None


class Forward(NamedTuple):
    """Outputs of `row_norm_forward`, None where not asked for; mean, rstd [rows], bits [rows, ceil(span / 8)]."""

    y: Tensor
    total: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    bits: Tensor | None


class Wanted(NamedTuple):
    """Which gradients `row_norm_backward` is to compute and allocate."""

    dx: bool
    dresidual: bool
    dweight: bool
    dbias: bool


class Gradients(NamedTuple):
    """Outputs of `row_norm_backward`; None where not wanted."""

    dx: Tensor | None
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of all arithmetic, and of mean, rstd and partial sums, for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
