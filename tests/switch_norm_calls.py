"""Calls of switchable norm as functions of their tensors, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_ops import functional as F
from tests.calls import as_tuple, scalar
from tests.channel_norm_calls import adds_first
from tests.norm_cases import normal, torch_activate

Tensor = torch.Tensor
Leaves = dict[str, Tensor]
Run = Callable[..., tuple[Tensor, ...]]

FUNCTIONS = ("switch_norm", "add_switch_norm")
every_function = pytest.mark.parametrize("function", FUNCTIONS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def tensors(*shape: int, dtype: torch.dtype = torch.float64, affine: bool = True) -> Leaves:
    """Everything that may learn, as new leaves."""
    kinds = 2 if len(shape) == 2 else 3
    sizes = {"x": shape, "residual": shape, "weight": shape[1:2], "bias": shape[1:2]}
    sizes |= {"mean_weight": (kinds,), "var_weight": (kinds,)}
    return {
        name: normal(*size, dtype=dtype, seed=seed).requires_grad_()
        for seed, (name, size) in enumerate(sizes.items())
        if affine or name not in ("weight", "bias")
    }


def statistics(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A running_mean and a running_var that are no fixed point."""
    return normal(channels, dtype=dtype, seed=7), normal(channels, dtype=dtype, seed=8).square() + 0.5


def call(
    function: str,
    training: bool = True,
    activation: Any = None,
    running: tuple[Any, ...] | None = None,
    module: Any = F,
    **keywords: Any,
) -> Run:
    """The function of its tensors by name, always returning a tuple; `module` may be the reference."""

    def run(x: Any, **others: Any) -> tuple[Any, ...]:
        given = {"residual": None, "weight": None, "bias": None} | others
        given["running_mean"], given["running_var"] = running or statistics(x.shape[1])
        return as_tuple(getattr(module, function)(x, training=training, activation=activation, **given, **keywords))

    return run


def composed(
    function: str, training: bool = True, activation: Any = None, running: tuple[Tensor, ...] | None = None
) -> Run:
    """What a user of torch writes, with torch's own means and variances."""

    def run(x: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
        residual = others.get("residual")
        total = residual + x if adds_first(function) else x
        dtype = torch.promote_types(total.dtype, torch.float32)
        z, positions = total.to(dtype), tuple(range(2, x.dim()))
        by_channel = functools.partial(Tensor.view, size=(-1, *(1,) * len(positions)))
        spans = [positions, (1, *positions), (0, *positions)][0 if positions else 1 :]
        means = [z.mean(span, keepdim=True) for span in spans]
        variances = [z.var(span, correction=0, keepdim=True) for span in spans]
        if not training:
            means[-1], variances[-1] = (by_channel(t.to(dtype)) for t in running or statistics(x.shape[1]))
        mean_shares, var_shares = (others[name].to(dtype).softmax(0) for name in ("mean_weight", "var_weight"))
        mean = sum(share * each for share, each in zip(mean_shares, means, strict=True))
        var = sum(share * each for share, each in zip(var_shares, variances, strict=True))
        y = (z - mean) / (var + 1e-5).sqrt()
        y = y * by_channel(others["weight"].to(dtype)) if "weight" in others else y
        y = y + by_channel(others["bias"].to(dtype)) if "bias" in others else y
        if residual is not None and not adds_first(function):
            y = y + residual
        y = torch_activate(y, activation).to(x.dtype)
        return (y, total) if adds_first(function) else (y,)

    return run


def gradients(outputs: tuple[Tensor, ...], leaves: Leaves, **keywords: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar(outputs), list(leaves.values()), **keywords)
