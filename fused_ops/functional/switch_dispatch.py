"""How a switchable norm runs: the composition in `switch_fallback`. Its arguments are validated."""

from __future__ import annotations

from typing import Any

import torch

from .. import batch_fallback, fallback, switch_fallback
from ..activation import Activation
from .dispatch import _composed

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
) -> Any:
    """y, or (y, total) where the residual is added first, in x's layout. In training running statistics move last."""
    running = tuple(tensor for tensor in (running_mean, running_var) if tensor is not None)
    run = _by_composition
    return run(
        x,
        residual,
        running,
        weight,
        bias,
        mean_weight,
        var_weight,
        training,
        momentum,
        eps,
        add_first,
        activation,
    )


def _by_composition(
    x: Tensor,
    residual: Tensor | None,
    running: tuple[Tensor, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor,
    var_weight: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    add_first: bool,
    activation: Activation | None,
) -> Any:
    # Copies move, and what is given follows once nothing can fail any more; a transform refuses that.
    moving = tuple(map(torch.clone, running)) if training and not fallback.transformed() else running
    mean, var = moving or (None, None)
    out = _composed(
        x,
        residual,
        add_first,
        activation,
        lambda x: switch_fallback.switch_norm(
            x, mean, var, weight, bias, mean_weight, var_weight, training, momentum, eps
        ),
    )
    batch_fallback.move(running, moving)
    return out
