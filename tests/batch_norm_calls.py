"""Calls of batch norm as functions of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_ops import functional as F
from tests.calls import as_tuple
from tests.channel_norm_calls import adds_first
from tests.norm_cases import normal, torch_activate

Tensor = torch.Tensor

FUNCTIONS = ("batch_norm", "add_batch_norm")
every_function = pytest.mark.parametrize("function", FUNCTIONS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def statistics(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A running_mean and a running_var that are no fixed point."""
    return normal(channels, dtype=dtype, seed=7), normal(channels, dtype=dtype, seed=8).square() + 0.5


def call(
    function: str,
    training: bool = True,
    activation: Any = None,
    running: tuple[Tensor, ...] | None = None,
    **given: Any,
) -> Callable[..., tuple[Tensor, ...]]:
    """The function of x, residual, weight and bias, any of the last three None, that always returns a tuple."""

    def run(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        residual, weight, bias = (*others, None, None, None)[:3]
        mean, var = running or ((None, None) if training else statistics(x.shape[1]))
        keywords = {"residual": residual, "weight": weight, "bias": bias, "activation": activation, **given}
        keywords |= {"running_mean": mean, "running_var": var, "training": training}
        return as_tuple(getattr(F, function)(x, **keywords))

    return run


def composed(
    function: str, training: bool = True, activation: Any = None, running: tuple[Tensor, ...] | None = None
) -> Callable[..., tuple[Tensor, ...]]:
    """The same as `call`, in elementary operations, in the type that kernels compute in."""

    def run(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        residual, weight, bias = (*others, None, None, None)[:3]
        total = residual + x if adds_first(function) else x
        dtype = torch.promote_types(total.dtype, torch.float32)
        shape, batch = (-1, *(1,) * (x.dim() - 2)), [dim for dim in range(x.dim()) if dim != 1]
        z = total.to(dtype)
        if training:
            deviation = z - z.mean(batch, keepdim=True)
            var = deviation.square().mean(batch, keepdim=True)
        else:
            mean, var = (tensor.to(dtype).view(shape) for tensor in running or statistics(x.shape[1]))
            deviation = z - mean
        y = deviation * torch.rsqrt(var + 1e-5)
        y = y if weight is None else y * weight.to(dtype).view(shape)
        y = y if bias is None else y + bias.to(dtype).view(shape)
        if residual is not None and not adds_first(function):
            y = y + residual
        y = torch_activate(y, activation).to(x.dtype)
        return (y, total) if adds_first(function) else (y,)

    return run
