"""Switchable normalization: a learned mixture of the statistics of instance, layer and batch norm."""

from __future__ import annotations

import torch

from .. import known, validation
from ..activation import ActivationLike, resolve
from .switch_dispatch import _plan_switch_norm

Tensor = torch.Tensor


def switch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor,
    var_weight: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
) -> Tensor:
    """Switchable normalization, then the residual is added, then the activation.

    .. math:: y = \\mathrm{activation}\\left(
              \\frac{x - \\sum_k w_k \\mu_k}{\\sqrt{\\sum_k w'_k \\sigma^2_k + \\epsilon}}
              \\cdot \\mathrm{weight} + \\mathrm{bias} + \\mathrm{residual}\\right), \\quad
              w = \\mathrm{softmax}(\\mathrm{mean\\_weight}), \\quad w' = \\mathrm{softmax}(\\mathrm{var\\_weight})

    The kinds k of a mean and a biased variance are, in this order, those of each channel of each sample (Instance), of
    each sample (Layer) and of each channel over the whole batch (Batch). On ``(N, C)`` input, where an instance is one
    value, they are Layer and Batch. In training `running_mean` and `running_var`, if given, move by `momentum` towards
    the mean and the unbiased variance of the batch, as batch norm's do. Otherwise these two are the batch's.

    Args:
        input: x, shape ``(N, C, *)``, float16, bfloat16, float32 or float64, any strides.
        running_mean, running_var: shape ``(C,)``, both or neither; both without training.
        weight, bias: shape ``(C,)``, or None.
        mean_weight, var_weight: shape ``(3,)``, or ``(2,)`` on ``(N, C)`` input. Their type, and that of weight, bias
            and the running statistics, may differ from x's.
        residual: x's shape, type and device.
        activation: None, a name (see `fused_ops.Activation`), a torch.nn activation module, or an `Activation`.

    Returns:
        y, with x's shape, type and layout: channels_last in, channels_last out. Under autocast as well.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): a shape, device or type that does not fit, one value a channel
            that would be its own mean, running statistics that are needed and not given, a negative eps.
        ValueError: an unknown activation.

    Luo, Ren, Peng, Zhang, Li, "Differentiable Learning-to-Normalize via Switchable Normalization", arXiv:1806.10779.

    Example:
        >>> x, mean, var = torch.randn(2, 8, 16, 16), torch.zeros(8), torch.ones(8)
        >>> shares = torch.ones(3)
        >>> switch_norm(x, mean, var, None, None, shares, shares, training=True, activation="relu").shape
        torch.Size([2, 8, 16, 16])
    """
    function = "switch_norm"
    # torch refuses an eps of 0 for a batch's variance alone, which a layer's is mixed into here.
    momentum, eps = validation.number(function, "momentum", momentum), validation.epsilon(function, eps, training=False)
    options = (bool(training), eps, False, resolve(activation), 0.0)
    tensors = (input, residual, running_mean, running_var, weight, bias, mean_weight, var_weight)
    return known.find(function, _plan_switch_norm, options, tensors)(*tensors, momentum)


def add_switch_norm(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor,
    var_weight: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and normalizes the sum, the first step of a pre-activation block.

    .. math:: \\mathrm{total} = \\mathrm{residual} + \\mathrm{dropout}(x), \\quad
              y = \\mathrm{activation}(\\mathrm{SwitchNorm}(\\mathrm{total}))

    The running statistics are those of the total.

    Args:
        residual: x's shape and device, and its type, or float32 with half or bfloat16 x; total has the residual's type,
            y has x's. The rest as in `switch_norm`.
        dropout_p: as in `add_layer_norm`; `training` is the dropout's as well.

    Returns:
        (y, total), both in x's layout.

    Example:
        >>> x, mean, var, shares = torch.randn(2, 8, 4, 4), torch.zeros(8), torch.ones(8), torch.ones(3)
        >>> y, total = add_switch_norm(x, x, mean, var, None, None, shares, shares, training=True)
    """
    function = "add_switch_norm"
    p = validation.dropout(function, dropout_p, training)
    momentum, eps = validation.number(function, "momentum", momentum), validation.epsilon(function, eps, training=False)
    options = (bool(training), eps, True, resolve(activation), p)
    tensors = (input, residual, running_mean, running_var, weight, bias, mean_weight, var_weight)
    return known.find(function, _plan_switch_norm, options, tensors)(*tensors, momentum)
