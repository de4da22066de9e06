"""How a norm of planes runs: the kernels, eagerly or as an op, or the composition in `channel_fallback`. Each is
decided for tensors that lie, and learn, in one way.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import backend, batch_fallback, channel_fallback, fallback, known, validation
from ..activation import Activation
from .dispatch import _autocasts, _fused, _kernels, _plan_autocast, _plan_composed, _plan_kernels

if backend.HAS_TRITON:
    from ..kernels.problem import GroupNorm, RowNorm
    from ..kernels.views import lies_channels_last

Tensor = torch.Tensor


def _plan_group_norm(
    function: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    add_first: bool,
    activation: Activation | None,
    dropout_p: float,
) -> known.Call:
    """y, or (y, total) where the residual is added first, once the arguments are checked, as a function of the four
    tensors."""
    validation.groups(function, x, groups)
    validation.operands(function, x, (x.shape[1],), weight, bias, residual, added_first=add_first)
    if _autocasts(x):
        options = (groups, eps, False, activation, 0.0)
        return _plan_autocast(
            lambda x, residual, weight, bias: _plan(x, residual, weight, bias, *options), add_first, dropout_p
        )
    return _plan(x, residual, weight, bias, groups, eps, add_first, activation, dropout_p)


def _plan_instance_norm(
    function: str,
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    eps: float,
    add_first: bool,
    activation: Activation | None,
    dropout_p: float,
) -> known.Call:
    """`_plan_group_norm` of single channels, as a function of the six tensors and the momentum; or by running
    statistics, which else follow what was normalized."""
    count = validation.planes(function, x, running_mean, running_var, use_input_stats)
    validation.operands(function, x, (count,), weight, bias, residual, added_first=add_first)
    if running_mean is not None and not use_input_stats:  # no reduction, and no kernel
        normalize = fallback.at_first(  # the total may be of another type
            lambda *tensors: batch_fallback.plan_batch_norm(*tensors[:5], training=False, eps=eps)
        )
        return _plan_composed(normalize, add_first, activation, dropout_p)

    call = _plan(x, residual, weight, bias, x.shape[1] or 1, eps, add_first, activation, dropout_p)

    def by_own_statistics(
        x: Tensor, residual: Any, mean: Any, var: Any, weight: Any, bias: Any, momentum: float
    ) -> Any:
        out = call(x, residual, weight, bias)
        if mean is not None:
            channel_fallback.track_planes(out[1] if add_first else x, mean, var, momentum)
        return out

    return by_own_statistics


def _plan(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    add_first: bool,
    activation: Activation | None,
    dropout_p: float,
) -> known.Call:
    """In x's layout; instance norm has a group for each channel."""
    plan = _kernels(x, residual, weight, bias)
    if plan is not None:
        norm: GroupNorm | RowNorm
        if groups == 1 and math.prod(x.shape[2:]) == 1 and (x.dim() == 2 or x.stride(-1) == 1):  # rows
            norm = RowNorm(x.shape[1], eps, True, add_first, *_fused(activation, dropout_p))
        else:
            channels_last = lies_channels_last(x.shape, x.stride(), groups)
            norm = GroupNorm(groups, channels_last, eps, add_first, *_fused(activation, dropout_p))
        return _plan_kernels(plan, x, residual, weight, bias, norm)

    def plan_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> known.Call:
        return channel_fallback.plan_group_norm(x, weight, bias, groups, eps)

    # The total may be of another type than x.
    normalize = fallback.at_first(plan_norm) if add_first else plan_norm(x, weight, bias)
    return _plan_composed(normalize, add_first, activation, dropout_p)
