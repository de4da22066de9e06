"""How a switchable norm runs: the kernels, or the composition in `switch_fallback`. Its arguments are validated."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import backend, batch_fallback, switch_fallback
from ..activation import Activation
from .dispatch import _composed, _fused, _kernel

if backend.HAS_TRITON:
    from .. import planned, switch_autograd
    from ..kernels.problem import SwitchNorm
    from ..kernels.views import lies_channels_last

    _layout_of = functools.lru_cache(maxsize=4096)(lies_channels_last)

Tensor = torch.Tensor


def _switch_norm(
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
    dropout_p: float = 0.0,
) -> Any:
    """y, or (y, total) where the residual is added first, in x's layout. In training running statistics move."""
    run = _kernel(x, residual, weight, bias, mean_weight, var_weight, running_mean, running_var) if x.numel() else None
    if run is not None and run is planned.run:  # a tracer gets torch's operations
        fused = _fused(activation, dropout_p, x)
        channels_last = _layout_of(tuple(x.shape), x.stride(), x.shape[1])
        norm = SwitchNorm(channels_last, training, momentum, eps, add_first, *fused)
        operands = (x, residual, weight, bias, mean_weight, var_weight)
        return switch_autograd.run(*operands, norm, running_mean, running_var)

    def composed(mean: Tensor | None, var: Tensor | None) -> Any:
        def normalize(x: Tensor) -> Tensor:
            return switch_fallback.switch_norm(
                x, mean, var, weight, bias, mean_weight, var_weight, training, momentum, eps
            )

        return _composed(x, residual, add_first, activation, normalize, dropout_p)

    return batch_fallback.put_back_on_failure(running_mean, running_var, training, composed)
