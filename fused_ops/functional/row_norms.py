"""Layer and RMS normalization: the statistics of a row, one contiguous span."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import known, validation
from ..activation import ActivationLike, resolve
from .row_dispatch import _plan_add_row_norm, _plan_row_norm

Tensor = torch.Tensor
NormalizedShape = int | Sequence[int]


def layer_norm(
    input: Tensor,
    normalized_shape: NormalizedShape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
) -> Tensor:
    """Layer normalization, then the residual is added, then the activation: one pass over memory.

    .. math:: y = \\mathrm{activation}\\left(\\frac{x - \\mathrm{E}[x]}{\\sqrt{\\mathrm{Var}[x] + \\epsilon}}
              \\cdot \\mathrm{weight} + \\mathrm{bias} + \\mathrm{residual}\\right)

    The mean and the biased variance are taken over the last dims, which must be `normalized_shape`.

    Args:
        input: x, shape ``(*rows, *normalized_shape)``, float16, bfloat16, float32 or float64, any strides.
        weight, bias: shape `normalized_shape`; their type may differ from x's.
        residual: x's shape, type and device.
        activation: None, a name (see `fused_ops.Activation`), a torch.nn activation module, or an `Activation`.

    Returns:
        y, with x's shape and type. Statistics and all arithmetic are float32 (float64 for float64); y is rounded once.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): a shape, device or type that does not fit.
        ValueError: an unknown activation.

    Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.

    Example:
        >>> x, r = torch.randn(8, 16), torch.randn(8, 16)
        >>> layer_norm(x, (16,), residual=r, activation="gelu").shape
        torch.Size([8, 16])
    """
    function = "layer_norm"
    sizes = validation.sizes(function, normalized_shape)
    options = (sizes, float(eps), True, resolve(activation))
    tensors = (input, residual, weight, bias)
    return known.find(function, _plan_row_norm, options, tensors, inner=len(sizes))(*tensors)


def rms_norm(
    input: Tensor,
    normalized_shape: NormalizedShape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
) -> Tensor:
    """Root mean square normalization, then the residual is added, then the activation: one pass over memory.

    .. math:: y = \\mathrm{activation}\\left(\\frac{x}{\\sqrt{\\mathrm{E}[x^2] + \\epsilon}} \\cdot \\mathrm{weight}
              + \\mathrm{residual}\\right)

    As `layer_norm`, without the mean and the bias; ``eps=None`` is what the installed torch takes for it.

    Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Example:
        >>> rms_norm(torch.randn(8, 16), (16,), torch.ones(16), activation="silu").shape
        torch.Size([8, 16])
    """
    function = "rms_norm"
    sizes, own_eps = validation.sizes(function, normalized_shape), None if eps is None else float(eps)
    options = (sizes, own_eps, False, resolve(activation))
    tensors = (input, residual, weight, None)
    return known.find(function, _plan_row_norm, options, tensors, inner=len(sizes))(*tensors)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: NormalizedShape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and normalizes the sum, the step between two sublayers of a pre-norm Transformer.

    .. math:: \\mathrm{total} = \\mathrm{residual} + \\mathrm{dropout}(x), \\quad
              y = \\mathrm{activation}(\\mathrm{LayerNorm}(\\mathrm{total}))

    Args:
        residual: x's shape and device, and its type, or float32 with half or bfloat16 x; total has the residual's type,
            y has x's. The rest as in `layer_norm`.
        dropout_p: the probability with which an element of x is dropped, 0 unless `training`; what is kept is
            multiplied by 1 / (1 - p). See `residual_add`.

    Returns:
        (y, total). Backward takes the gradients of both and, without dropout, writes one tensor for dx and dresidual.

    Example:
        >>> y, total = add_layer_norm(torch.randn(8, 16), torch.randn(8, 16), (16,))
    """
    function = "add_layer_norm"
    p = validation.dropout(function, dropout_p, training)
    sizes = validation.sizes(function, normalized_shape)
    options = (sizes, float(eps), True, resolve(activation), p)
    tensors = (input, residual, weight, bias)
    return known.find(function, _plan_add_row_norm, options, tensors, inner=len(sizes))(*tensors)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: NormalizedShape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` with `rms_norm`: total = residual + dropout(x), y = activation(RMSNorm(total)).

    Example:
        >>> y, total = add_rms_norm(torch.randn(8, 16), torch.randn(8, 16), (16,), torch.ones(16))
    """
    function = "add_rms_norm"
    p = validation.dropout(function, dropout_p, training)
    sizes, own_eps = validation.sizes(function, normalized_shape), None if eps is None else float(eps)
    options = (sizes, own_eps, False, resolve(activation), p)
    tensors = (input, residual, weight, None)
    return known.find(function, _plan_add_row_norm, options, tensors, inner=len(sizes))(*tensors)
