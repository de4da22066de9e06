"""How a switchable norm runs: the kernels, or the composition in `switch_fallback`. Each is decided for tensors that
lie, and learn, in one way.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import backend, batch_fallback, known, switch_fallback, validation
from ..activation import Activation
from .dispatch import _fused, _kernel, _plan_composed

if backend.HAS_TRITON:
    from .. import planned, switch_autograd
    from ..kernels.problem import SwitchNorm
    from ..kernels.views import lies_channels_last

Tensor = torch.Tensor


def _plan_switch_norm(
    function: str,
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor,
    var_weight: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    add_first: bool,
    activation: Activation | None,
    dropout_p: float,
) -> known.Call:
    """y, or (y, total) where the residual is added first, in x's layout, once the arguments are checked, as a function
    of the eight tensors. In training running statistics move."""
    count = validation.batch(function, x, running_mean, running_var, training)
    validation.operands(function, x, (count,), weight, bias, residual, added_first=add_first)
    validation.mixture(function, x, mean_weight, var_weight)
    run = _kernel(x, residual, weight, bias, mean_weight, var_weight, running_mean, running_var) if x.numel() else None
    if run is not None and run is planned.run:  # a tracer gets torch's operations
        channels_last = lies_channels_last(x.shape, x.stride(), x.shape[1])

        def by_kernels(x: Tensor, residual: Any, mean: Any, var: Any, *parameters: Any) -> Any:
            fused = _fused(activation, dropout_p, x)
            norm = SwitchNorm(channels_last, training, momentum, eps, add_first, *fused)
            return switch_autograd.run((x, residual, *parameters), norm, mean, var)

        return by_kernels

    def normalize(x: Tensor, *statistics_and_parameters: Any) -> Tensor:
        options: Any = (training, momentum, eps)
        return switch_fallback.switch_norm(x, *statistics_and_parameters, *options)

    composed = _plan_composed(normalize, add_first, activation, dropout_p)
    return batch_fallback.plan_put_back(composed) if training and running_mean is not None else composed
