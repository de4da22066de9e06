"""How a call runs: the kernels, eagerly or as an op, or the composition in `fallback`. Its arguments are validated."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from .. import backend, channel_fallback, fallback, residual_fallback, validation
from ..activation import Activation

if backend.HAS_TRITON:
    from .. import autograd, drops, ops
    from ..kernels.problem import GroupNorm, RowNorm
    from ..kernels.views import lies_channels_last

    _layout_of = functools.lru_cache(maxsize=4096)(lies_channels_last)

Tensor = torch.Tensor


def _rms_eps(eps: float | None, x: Tensor) -> float:
    return fallback.DEFAULT_RMS_EPS[x.dtype] if eps is None else float(eps)


def _autocasts(x: Tensor) -> bool:
    """Whether torch's autocast would run this norm in float32: on a GPU it does, on a CPU it leaves norms alone."""
    return x.is_cuda and x.dtype in validation.HALF and torch.is_autocast_enabled("cuda")


# What a tracer puts in a tensor's place.
_TRACEABLE = fallback.PLAIN | {torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor}


def _kernel(x: Tensor, *others: Tensor | None):  # type: ignore[no-untyped-def]
    """What runs the kernels for this call: eagerly, as an op, or None for the torch composition."""
    if not backend.chooses_triton(x):
        return None
    # A transform, traced or not, cannot look into an op or a Function, nor a kernel into what has left a transform, and
    # to torch.jit.trace the sizes of a shape are tensors.
    if fallback.transformed() or fallback.recorded() or fallback.left_a_transform(x, *others):
        return None
    kinds = {type(x), *map(type, others)}
    if not kinds <= fallback.PLAIN and not kinds <= _TRACEABLE:
        return None  # a tensor subclass of somebody's own knows torch's functions, not ours
    return ops.run if backend.traced(x) else autograd.run


def _row_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    span: int,
    eps: float,
    subtract_mean: bool,
    activation: Activation | None,
) -> Tensor:
    if _autocasts(x):
        x, residual = x.float(), None if residual is None else residual.float()
    run = _kernel(x, residual, weight, bias)
    if run is not None:
        return run(x, residual, weight, bias, _kernel_norm(span, eps, subtract_mean, False, activation, 0.0, x))
    y = fallback.layer_norm(x, shape, weight, bias, eps, subtract_mean)
    return y if residual is None and activation is None else fallback.finish(y, residual, activation)


def _add_row_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    span: int,
    eps: float,
    subtract_mean: bool,
    activation: Activation | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    if _autocasts(x):
        # torch adds in the tensors' own type and normalizes in float32, so y and total are of two types.
        total = residual + residual_fallback.dropout(x, residual, dropout_p)
        return _row_norm(total.float(), None, weight, bias, shape, span, eps, subtract_mean, activation), total
    run = _kernel(x, residual, weight, bias)
    if run is not None:
        return run(x, residual, weight, bias, _kernel_norm(span, eps, subtract_mean, True, activation, dropout_p, x))
    total = residual + residual_fallback.dropout(x, residual, dropout_p)
    y = fallback.layer_norm(total, shape, weight, bias, eps, subtract_mean)
    return fallback.finish(y.to(x.dtype), None, activation), total


def _kernel_norm(
    span: int,
    eps: float,
    subtract_mean: bool,
    add_first: bool,
    activation: Activation | None,
    dropout_p: float,
    x: Tensor,
) -> RowNorm:
    return RowNorm(span, eps, subtract_mean, add_first, *_fused(activation, dropout_p, x))


def _fused(activation: Activation | None, dropout_p: float, x: Tensor) -> tuple[Any, ...]:
    """The last fields of a norm that kernels compute, as far as they differ from what they are by default: the
    activation with its parameters, the rate and the seed of dropout."""
    if dropout_p == 0.0:
        return () if activation is None else (activation.name, *activation.scalars)
    name, scalars = (None, (0.0, 0.0)) if activation is None else (activation.name, activation.scalars)
    return name, *scalars, dropout_p, drops.draw_seed(x.device)


# --- planes: statistics of each, of groups of them, or running ones -------------------------------------------------


def _channel_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    add_first: bool,
    activation: Activation | None,
    dropout_p: float = 0.0,
) -> Any:
    """y, or (y, total) where the residual is added first, in x's layout; instance norm has a group for each channel."""
    run = _kernel(x, residual, weight, bias)
    if run is not None:
        if groups == 1 and math.prod(x.shape[2:]) == 1 and (x.dim() == 2 or x.stride(-1) == 1):  # rows
            norm = _kernel_norm(x.shape[1], eps, True, add_first, activation, dropout_p, x)
            return run(x, residual, weight, bias, norm)
        layout = _layout_of if run is autograd.run else lies_channels_last  # a tracer looks through a cache, and warns
        channels_last = layout(tuple(x.shape), x.stride(), groups)
        fused = _fused(activation, dropout_p, x)
        return run(x, residual, weight, bias, GroupNorm(groups, channels_last, eps, add_first, *fused))
    return _composed(
        x,
        residual,
        add_first,
        activation,
        lambda x: channel_fallback.group_norm(x, groups, weight, bias, eps),
        dropout_p,
    )


def _instance_norm(
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    add_first: bool,
    activation: Activation | None,
    dropout_p: float = 0.0,
) -> Any:
    """`_channel_norm` of single channels, or by running statistics, which else follow what was normalized."""
    if running_mean is None or running_var is None:
        return _channel_norm(x, residual, weight, bias, x.shape[1] or 1, eps, add_first, activation, dropout_p)
    if not use_input_stats:  # no reduction, and no kernel
        return _composed(
            x,
            residual,
            add_first,
            activation,
            lambda x: channel_fallback.stored_norm(x, running_mean, running_var, weight, bias, eps),
            dropout_p,
        )
    out = _channel_norm(x, residual, weight, bias, x.shape[1] or 1, eps, add_first, activation, dropout_p)
    channel_fallback.track_planes(out[1] if add_first else x, running_mean, running_var, momentum)
    return out


def _composed(
    x: Tensor,
    residual: Any,
    add_first: bool,
    activation: Activation | None,
    norm: Callable[[Tensor], Tensor],
    dropout_p: float = 0.0,
) -> Any:
    """The composition around a norm that keeps its argument's layout."""
    if add_first:
        # x in front, so that the total has its layout
        total = residual_fallback.dropout(x, residual, dropout_p) + residual
        return fallback.finish(norm(total).to(x.dtype), None, activation), total
    y = norm(x)
    return y if residual is None and activation is None else fallback.finish(y, residual, activation)
