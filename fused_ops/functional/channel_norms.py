"""Group and Instance normalization: the statistics of planes (n, c), each alone or the channels of a group together."""

from __future__ import annotations

import torch

from .. import known, validation
from ..activation import ActivationLike, resolve
from .channel_dispatch import _plan_group_norm, _plan_instance_norm

Tensor = torch.Tensor


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
) -> Tensor:
    """Group normalization, then the residual is added, then the activation.

    .. math:: y = \\mathrm{activation}\\left(\\frac{x - \\mathrm{E}[x]}{\\sqrt{\\mathrm{Var}[x] + \\epsilon}}
              \\cdot \\mathrm{weight} + \\mathrm{bias} + \\mathrm{residual}\\right)

    The mean and the biased variance are taken, in each sample, over C / num_groups neighbouring channels together.

    Args:
        input: x, shape ``(N, C, *)``, float16, bfloat16, float32 or float64, any strides.
        num_groups: a divisor of C.
        weight, bias: shape ``(C,)``; their type may differ from x's.
        residual: x's shape, type and device.
        activation: None, a name (see `fused_ops.Activation`), a torch.nn activation module, or an `Activation`.

    Returns:
        y, with x's shape, type and layout: channels_last in, channels_last out. Under CUDA autocast it is float32.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): a number of groups, a shape, device or type that does not fit.
        ValueError: an unknown activation.

    Wu, He, "Group Normalization", arXiv:1803.08494.

    Example:
        >>> x = torch.randn(2, 64, 16, 16).to(memory_format=torch.channels_last)
        >>> group_norm(x, 32, activation="silu").is_contiguous(memory_format=torch.channels_last)
        True
    """
    function = "group_norm"
    groups = validation.num_groups(function, num_groups)
    options = (groups, float(eps), False, resolve(activation), 0.0)
    tensors = (input, residual, weight, bias)
    return known.find(function, _plan_group_norm, options, tensors)(*tensors)


def add_group_norm(
    input: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and normalizes the sum, the first step of a pre-activation block.

    .. math:: \\mathrm{total} = \\mathrm{residual} + \\mathrm{dropout}(x), \\quad
              y = \\mathrm{activation}(\\mathrm{GroupNorm}(\\mathrm{total}))

    Args:
        residual: x's shape and device, and its type, or float32 with half or bfloat16 x; total has the residual's type,
            y has x's. The rest as in `group_norm`.
        dropout_p: as in `add_layer_norm`.

    Returns:
        (y, total), both in x's layout.

    Example:
        >>> y, total = add_group_norm(torch.randn(2, 64, 8, 8), torch.randn(2, 64, 8, 8), 32)
    """
    function = "add_group_norm"
    groups = validation.num_groups(function, num_groups)
    p = validation.dropout(function, dropout_p, training)
    options = (groups, float(eps), True, resolve(activation), p)
    tensors = (input, residual, weight, bias)
    return known.find(function, _plan_group_norm, options, tensors)(*tensors)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
) -> Tensor:
    """Instance normalization, then the residual is added, then the activation.

    .. math:: y = \\mathrm{activation}\\left(\\frac{x - \\mathrm{E}[x]}{\\sqrt{\\mathrm{Var}[x] + \\epsilon}}
              \\cdot \\mathrm{weight} + \\mathrm{bias} + \\mathrm{residual}\\right)

    The mean and the biased variance are those of each channel of each sample. Without use_input_stats they are
    `running_mean` and `running_var`, one number a channel. With it these, if given, move by `momentum` towards the mean
    and the unbiased variance of the call, averaged over the batch.

    Args:
        input: x, shape ``(N, C, *)``, float16, bfloat16, float32 or float64, any strides.
        running_mean, running_var, weight, bias: shape ``(C,)``; their type may differ from x's.
        residual: x's shape, type and device.
        activation: None, a name (see `fused_ops.Activation`), a torch.nn activation module, or an `Activation`.

    Returns:
        y, with x's shape, type and layout: channels_last in, channels_last out.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): a shape, device or type that does not fit, planes of one
            element that would be their own mean, running statistics that are needed and not given.
        ValueError: an unknown activation.

    Ulyanov, Vedaldi, Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization",
    arXiv:1607.08022.

    Example:
        >>> instance_norm(torch.randn(2, 8, 16, 16), activation="relu").shape
        torch.Size([2, 8, 16, 16])
    """
    function = "instance_norm"
    momentum = validation.number(function, "momentum", momentum)
    options = (bool(use_input_stats), float(eps), False, resolve(activation), 0.0)
    tensors = (input, residual, running_mean, running_var, weight, bias)
    return known.find(function, _plan_instance_norm, options, tensors)(*tensors, momentum)


def add_instance_norm(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """`add_group_norm` with `instance_norm`: total = residual + dropout(x), y = activation(InstanceNorm(total)).

    The running statistics are those of the total.

    Example:
        >>> y, total = add_instance_norm(torch.randn(2, 8, 16, 16), torch.randn(2, 8, 16, 16), activation="relu")
    """
    function = "add_instance_norm"
    p = validation.dropout(function, dropout_p, training)
    momentum = validation.number(function, "momentum", momentum)
    options = (bool(use_input_stats), float(eps), True, resolve(activation), p)
    tensors = (input, residual, running_mean, running_var, weight, bias)
    return known.find(function, _plan_instance_norm, options, tensors)(*tensors, momentum)
