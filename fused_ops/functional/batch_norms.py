"""Batch normalization: the statistics of each channel over the whole batch, or running ones."""

from __future__ import annotations

import torch

from .. import known, validation
from ..activation import ActivationLike, resolve
from .batch_dispatch import _plan_batch_norm

Tensor = torch.Tensor


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
) -> Tensor:
    """Batch normalization, then the residual is added, then the activation.

    .. math:: y = \\mathrm{activation}\\left(\\frac{x - \\mathrm{E}[x]}{\\sqrt{\\mathrm{Var}[x] + \\epsilon}}
              \\cdot \\mathrm{weight} + \\mathrm{bias} + \\mathrm{residual}\\right)

    In training the mean and the biased variance are those of each channel over the whole batch, and `running_mean` and
    `running_var`, if given, move by `momentum` towards the mean and the unbiased variance. Otherwise these two take
    their place.

    Args:
        input: x, shape ``(N, C, *)``, float16, bfloat16, float32 or float64, any strides.
        running_mean, running_var: shape ``(C,)``, both or neither; both without training.
        weight, bias: shape ``(C,)``; their type, and that of the running statistics, may differ from x's.
        residual: x's shape, type and device.
        activation: None, a name (see `fused_ops.Activation`), a torch.nn activation module, or an `Activation`.

    Returns:
        y, with x's shape, type and layout: channels_last in, channels_last out. Under autocast as well.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): a shape, device or type that does not fit, one value a channel
            that would be its own mean, running statistics that are needed and not given, an eps of torch's errors.
        ValueError: an unknown activation.

    Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    arXiv:1502.03167.

    Example:
        >>> x, shortcut = torch.randn(2, 8, 16, 16), torch.randn(2, 8, 16, 16)
        >>> mean, var = torch.zeros(8), torch.ones(8)
        >>> batch_norm(x, mean, var, training=True, residual=shortcut, activation="relu").shape
        torch.Size([2, 8, 16, 16])
    """
    function = "batch_norm"
    training = bool(training)
    momentum, eps = validation.number(function, "momentum", momentum), validation.epsilon(function, eps, training)
    options = (training, eps, False, resolve(activation), 0.0)
    tensors = (input, residual, running_mean, running_var, weight, bias)
    return known.find(function, _plan_batch_norm, options, tensors)(*tensors, momentum)


def add_batch_norm(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and normalizes the sum, the first step of a pre-activation block.

    .. math:: \\mathrm{total} = \\mathrm{residual} + \\mathrm{dropout}(x), \\quad
              y = \\mathrm{activation}(\\mathrm{BatchNorm}(\\mathrm{total}))

    The running statistics are those of the total.

    Args:
        residual: x's shape and device, and its type, or float32 with half or bfloat16 x; total has the residual's type,
            y has x's. The rest as in `batch_norm`.
        dropout_p: as in `add_layer_norm`; `training` is the dropout's as well.

    Returns:
        (y, total), both in x's layout.

    Example:
        >>> mean, var = torch.zeros(8), torch.ones(8)
        >>> y, total = add_batch_norm(torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), mean, var, training=True)
    """
    function = "add_batch_norm"
    training = bool(training)
    p = validation.dropout(function, dropout_p, training)
    momentum, eps = validation.number(function, "momentum", momentum), validation.epsilon(function, eps, training)
    options = (training, eps, True, resolve(activation), p)
    tensors = (input, residual, running_mean, running_var, weight, bias)
    return known.find(function, _plan_batch_norm, options, tensors)(*tensors, momentum)
