"""How a batch norm runs: the kernels, or the composition in `batch_fallback`. Each is decided for tensors that lie, and
learn, in one way.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import backend, batch_fallback, fallback, known, validation
from ..activation import Activation
from .dispatch import _fused, _kernels, _plan_composed, _plan_kernels

if backend.HAS_TRITON:
    from ..kernels.problem import BatchNorm
    from ..kernels.views import lies_pooled_channels_last

Tensor = torch.Tensor


def _plan_batch_norm(
    function: str,
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    add_first: bool,
    activation: Activation | None,
    dropout_p: float,
) -> known.Call:
    """y, or (y, total) where the residual is added first, in x's layout, once the arguments are checked, as a function
    of the six tensors and the momentum. In training running statistics move."""
    count = validation.batch(function, x, running_mean, running_var, training)
    validation.operands(function, x, (count,), weight, bias, residual, added_first=add_first)
    plan = _kernels(x, residual, weight, bias, running_mean, running_var) if x.numel() else None
    if plan is not None:
        channels_last = lies_pooled_channels_last(x.shape, x.stride())
        norm = BatchNorm(channels_last, training, 0.0, eps, add_first, *_fused(activation, dropout_p))
        kernels = _plan_kernels(plan, x, residual, weight, bias, norm, running_mean, running_var)
        return lambda x, residual, mean, var, weight, bias, momentum: kernels(
            x, residual, weight, bias, mean, var, momentum
        )

    def plan_norm(*tensors: Any) -> known.Call:
        return batch_fallback.plan_batch_norm(*tensors[:5], training=training, eps=eps)

    tensors = (x, running_mean, running_var, weight, bias)
    normalize = fallback.at_first(plan_norm) if add_first else plan_norm(*tensors)  # the total may be of another type
    composed = _plan_composed(normalize, add_first, activation, dropout_p)
    return batch_fallback.plan_put_back(composed) if training and running_mean is not None else composed
