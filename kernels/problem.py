"""What a norm computes, and what its launchers return: the vocabulary that both families and directions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .activations import ACTIVATIONS
from .views import Tensors

Tensor = torch.Tensor


class RowNorm(NamedTuple):
    """One row norm over rows of `span` elements: y = activation(norm(x) * weight + bias + residual), or, with
    add_first, total = dropout(x) + residual and y = activation(norm(total) * weight + bias). alpha and beta parametrize
    the activation. Without a seed, an int64 on x's device, nothing is dropped (see `dropout`)."""

    span: int
    eps: float
    subtract_mean: bool
    add_first: bool = False
    activation: str | None = None
    alpha: float = 0.0
    beta: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None


class GroupNorm(NamedTuple):
    """One norm of x [samples, channels, *positions] over `groups` groups of neighbouring channels of each sample; as
    many groups as channels make it an instance norm. The formulas are `RowNorm`'s, weight and bias go by channel.

    channels_last: the layout of all that is written, and of what is read without a copy: whether it is the channels of
    a position that are neighbours in memory, or the positions of a channel."""

    groups: int
    channels_last: bool
    eps: float
    add_first: bool = False
    activation: str | None = None
    alpha: float = 0.0
    beta: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None


class BatchNorm(NamedTuple):
    """One norm of x [samples, channels, *positions] over all samples and positions of each channel, or, not training,
    by running statistics, which else move by `momentum` towards those of the call. The formulas are `RowNorm`'s,
    weight and bias go by channel, channels_last is `GroupNorm`'s."""

    channels_last: bool
    training: bool
    momentum: float
    eps: float
    add_first: bool = False
    activation: str | None = None
    alpha: float = 0.0
    beta: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None


class SwitchNorm(NamedTuple):
    """Statistics of each channel of each sample, of each sample, and of each channel over the batch, mixed by learned
    weights. The fields are `BatchNorm`'s, of which running statistics stand for the last of the three."""

    channels_last: bool
    training: bool
    momentum: float
    eps: float
    add_first: bool = False
    activation: str | None = None
    alpha: float = 0.0
    beta: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None


Norm = RowNorm | GroupNorm | BatchNorm


class ResidualAdd(NamedTuple):
    """activation(residual + drop_path(scale * dropout(x))), the scale by channel of x. alpha and beta parametrize the
    activation; what is dropped follows from a seed (see `dropout`)."""

    dropout_p: float = 0.0
    drop_path_p: float = 0.0
    activation: str | None = None
    alpha: float = 0.0
    beta: float = 0.0


class Forward(NamedTuple):
    """Outputs of a forward, None where not asked for. mean and rstd are [rows], [samples * groups], or batch norm's
    [channels]; bits are those of each run of neighbouring elements, a row, a plane, a position's channels or (see
    `views.pooled_planes`) a sample, in ceil(length / 8) bytes."""

    y: Tensor
    total: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    bits: Tensor | None


class Mixture(NamedTuple):
    """The weights of switchable norm's statistics, [3] or, where a plane is one value, [2] each."""

    mean_weight: Tensor
    var_weight: Tensor

    @property
    def kinds(self) -> int:
        """How many statistics are mixed."""
        return self.mean_weight.numel()


class Kinds(NamedTuple):
    """The means and biased variances that are mixed, each [samples * channels + samples + channels]: of every plane, of
    every sample, of every channel."""

    means: Tensor
    variances: Tensor


class Wanted(NamedTuple):
    """Which gradients a backward is to compute and allocate."""

    dx: bool
    dresidual: bool
    dweight: bool
    dbias: bool


class Gradients(NamedTuple):
    """Outputs of a backward; None where not wanted."""

    dx: Tensor | None
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of all arithmetic, and of mean, rstd and partial sums, for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slope_takes_two_values(activation: str | None) -> bool:
    """Whether a bit of each element tells the activation's slope there."""
    return ACTIVATIONS[activation].passes is not None


def plan_needed(
    norm: Norm | SwitchNorm, wanted: Wanted, bits: Tensor | None, reads_x: bool = True
) -> Callable[[Tensors], Tensors]:
    """What backward kernels read of dy, dtotal, x, residual, bits, weight, bias, mean, rstd and the seed: None in the
    place of others."""
    computes_z = norm.activation is not None and bits is None
    reads_total = wanted.dx or (norm.add_first and wanted.dresidual)

    def needed(tensors: Tensors) -> Tensors:
        dy, dtotal, x, residual, bits, weight, bias, mean, rstd, seed = tensors
        dtotal = dtotal if reads_total else None
        x = x if reads_x else None
        residual, bias = (residual, bias) if computes_z else (None, None)
        return dy, dtotal, x, residual, bits, weight, bias, mean, rstd, seed

    return needed


def without_elements(
    allocate_gradients: Callable[..., tuple[Tensor | None, Tensor | None]], norm: Norm, wanted: Wanted
) -> Callable[..., Gradients]:
    """The backward of calls that have none."""
    norm = norm._replace(seed=None)
    return lambda seed, dy, dtotal, x, residual, bits, weight, bias, *_: Gradients(
        *allocate_gradients(dy, x, norm, wanted), *_parameter_zeros(weight, bias, wanted)
    )


def _parameter_zeros(weight: Tensor | None, bias: Tensor | None, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dbias) of a call without elements."""
    dweight = weight.new_zeros(weight.numel()) if weight is not None and wanted.dweight else None
    dbias = bias.new_zeros(bias.numel()) if bias is not None and wanted.dbias else None
    return dweight, dbias
