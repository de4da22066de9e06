"""The functions: torch.nn.functional's norms, with the residual add and the activation beside them in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import backend, fallback, validation
from .activation import Activation, ActivationLike, resolve

if backend.HAS_TRITON:
    from . import autograd, ops
    from .kernels.row_norm import RowNorm

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
    shape, span = validation.row_span(function, input, normalized_shape)
    _check_operands(function, input, shape, weight, bias, residual)
    return _row_norm(input, residual, weight, bias, shape, span, float(eps), True, resolve(activation))


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
    shape, span = validation.row_span(function, input, normalized_shape)
    _check_operands(function, input, shape, weight, None, residual)
    return _row_norm(input, residual, weight, None, shape, span, _rms_eps(eps, input), False, resolve(activation))


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

    .. math:: \\mathrm{total} = \\mathrm{residual} + x, \\quad
              y = \\mathrm{activation}(\\mathrm{LayerNorm}(\\mathrm{total}))

    Args:
        residual: x's shape and device, and its type, or float32 with half or bfloat16 x; total has the residual's type,
            y has x's. The rest as in `layer_norm`.
        dropout_p: not built yet; NotImplementedError unless 0.

    Returns:
        (y, total). Backward takes the gradients of both and writes one tensor for dx and dresidual.

    Example:
        >>> y, total = add_layer_norm(torch.randn(8, 16), torch.randn(8, 16), (16,))
    """
    function = "add_layer_norm"
    shape, span = validation.row_span(function, input, normalized_shape)
    _check_operands(function, input, shape, weight, bias, residual, added_first=True)
    validation.dropout(function, dropout_p)
    return _add_row_norm(input, residual, weight, bias, shape, span, float(eps), True, resolve(activation))


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
    """`add_layer_norm` with `rms_norm`: total = residual + x, y = activation(RMSNorm(total)); returns (y, total).

    Example:
        >>> y, total = add_rms_norm(torch.randn(8, 16), torch.randn(8, 16), (16,), torch.ones(16))
    """
    function = "add_rms_norm"
    shape, span = validation.row_span(function, input, normalized_shape)
    _check_operands(function, input, shape, weight, None, residual, added_first=True)
    validation.dropout(function, dropout_p)
    return _add_row_norm(input, residual, weight, None, shape, span, _rms_eps(eps, input), False, resolve(activation))


# --- how a call runs -----------------------------------------------------------------------------------------------


def _check_operands(
    function: str,
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    added_first: bool = False,
) -> None:
    validation.parameter(function, "weight", weight, shape, x)
    validation.parameter(function, "bias", bias, shape, x)
    if added_first and residual is None:
        raise validation.ArgumentError(f"{function}: residual must be a tensor, but is None")
    validation.residual(function, residual, x, may_be_float32=added_first)


def _rms_eps(eps: float | None, x: Tensor) -> float:
    return fallback.DEFAULT_RMS_EPS[x.dtype] if eps is None else float(eps)


def _autocasts(x: Tensor) -> bool:
    """Whether torch's autocast would run this norm in float32: on a GPU it does, on a CPU it leaves norms alone."""
    return x.is_cuda and x.dtype in validation.HALF and torch.is_autocast_enabled("cuda")


# What a tracer puts in a tensor's place.
_TRACEABLE = fallback.PLAIN | {torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor}


def _kernel(x: Tensor, *others: Tensor | None):  # type: ignore[no-untyped-def]
    """What runs the kernels for this call: eagerly, as an op, or None for the torch composition."""
    if not backend.chooses_triton(x):
        return None
    # A transform, traced or not, cannot look into an op or a Function, nor a kernel into what has left a transform.
    if fallback.transformed() or fallback.left_a_transform(x, *others):
        return None
    kinds = {type(x), *map(type, others)}
    if not kinds <= fallback.PLAIN and not kinds <= _TRACEABLE:
        return None  # a tensor subclass of somebody's own knows torch's functions, not ours
    return ops.row_norm if backend.traced(x) else autograd.row_norm


def _row_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    span: int,
    eps: float,
    subtract_mean: bool,
    activation: Activation | None,
) -> Tensor:
    if _autocasts(x):
        x, residual = x.float(), None if residual is None else residual.float()
    run = _kernel(x, residual, weight, bias)
    if run is not None:
        return run(x, residual, weight, bias, _kernel_norm(span, eps, subtract_mean, False, activation))
    y = fallback.layer_norm(x, shape, weight, bias, eps, subtract_mean)
    return y if residual is None and activation is None else fallback.finish(y, residual, activation)


def _add_row_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    span: int,
    eps: float,
    subtract_mean: bool,
    activation: Activation | None,
) -> tuple[Tensor, Tensor]:
    if _autocasts(x):
        # torch adds in the tensors' own type and normalizes in float32, so y and total are of two types.
        total = residual + x
        return _row_norm(total.float(), None, weight, bias, shape, span, eps, subtract_mean, activation), total
    run = _kernel(x, residual, weight, bias)
    if run is not None:
        return run(x, residual, weight, bias, _kernel_norm(span, eps, subtract_mean, True, activation))
    total = residual + x
    y = fallback.layer_norm(total, shape, weight, bias, eps, subtract_mean)
    return fallback.finish(y.to(x.dtype), None, activation), total


def _kernel_norm(span: int, eps: float, subtract_mean: bool, add_first: bool, activation: Activation | None) -> RowNorm:
    if activation is None:
        return RowNorm(span, eps, subtract_mean, add_first)
    return RowNorm(span, eps, subtract_mean, add_first, activation.name, *activation.scalars)
