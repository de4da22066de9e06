"""How a switchable norm runs: the kernels, or the composition in `switch_fallback`. Each is decided for tensors that
lie, and learn, in one way.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import backend, batch_fallback, known, switch_fallback, validation
from ..activation import Activation
from .dispatch import _fused, _kernels, _plan_composed

if backend.HAS_TRITON:
    from .. import drops, planned, switch_autograd
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
    eps: float,
    add_first: bool,
    activation: Activation | None,
    dropout_p: float,
) -> known.Call:
    """y, or (y, total) where the residual is added first, in x's layout, once the arguments are checked, as a function
    of the eight tensors and the momentum. In training running statistics move."""
    count = validation.batch(function, x, running_mean, running_var, training)
    validation.operands(function, x, (count,), weight, bias, residual, added_first=add_first)
    validation.mixture(function, x, mean_weight, var_weight)
    tensors = (x, residual, weight, bias, mean_weight, var_weight, running_mean, running_var)
    plan = _kernels(*tensors) if x.numel() else None
    if plan is not None and plan is planned.plan:  # a tracer gets torch's operations
        channels_last = lies_channels_last(x.shape, x.stride(), x.shape[1])
        norm = SwitchNorm(channels_last, training, 0.0, eps, add_first, *_fused(activation, dropout_p))

        def by_kernels(x: Tensor, residual: Any, mean: Any, var: Any, *parameters_and_momentum: Any) -> Any:
            *parameters, momentum = parameters_and_momentum
            seed = drops.draw_seed(x.device) if dropout_p > 0.0 else None
            of_call = norm._replace(momentum=momentum, seed=seed)
            return switch_autograd.run((x, residual, *parameters), of_call, mean, var)

        return by_kernels

    def normalize(x: Tensor, *statistics_and_parameters: Any) -> Tensor:
        *others, momentum = statistics_and_parameters
        return switch_fallback.switch_norm(x, *others, training, momentum, eps)  # type: ignore[call-arg]

    composed = _plan_composed(normalize, add_first, activation, dropout_p)
    return batch_fallback.plan_put_back(composed) if training and running_mean is not None else composed
