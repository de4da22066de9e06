"""How a batch norm runs: the kernels, or the composition in `batch_fallback`. Its arguments are validated."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import backend, batch_fallback
from ..activation import Activation
from .dispatch import _composed, _fused, _kernel

if backend.HAS_TRITON:
    from .. import autograd
    from ..kernels.problem import BatchNorm
    from ..kernels.views import lies_pooled_channels_last

    _layout_of = functools.lru_cache(maxsize=4096)(lies_pooled_channels_last)

Tensor = torch.Tensor


def _batch_norm(
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    add_first: bool,
    activation: Activation | None,
    dropout_p: float = 0.0,
) -> Any:
    """y, or (y, total) where the residual is added first, in x's layout. In training running statistics move."""
    run = _kernel(x, residual, weight, bias, running_mean, running_var) if x.numel() else None
    if run is not None:
        layout = _layout_of if run is autograd.run else lies_pooled_channels_last  # a tracer looks through a cache
        fused = _fused(activation, dropout_p, x)
        norm = BatchNorm(layout(tuple(x.shape), x.stride()), training, momentum, eps, add_first, *fused)
        return run(x, residual, weight, bias, norm, running_mean, running_var)

    def composed(mean: Tensor | None, var: Tensor | None) -> Any:
        def normalize(x: Tensor) -> Tensor:
            return batch_fallback.batch_norm(x, mean, var, weight, bias, training, momentum, eps)

        return _composed(x, residual, add_first, activation, normalize, dropout_p)

    return batch_fallback.put_back_on_failure(running_mean, running_var, training, composed)
