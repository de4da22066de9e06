"""How a row norm runs: the kernels, eagerly or as an op, or the composition in `fallback`. Each is decided for tensors
that lie, and learn, in one way.
"""

from __future__ import annotations

import torch

from .. import backend, fallback, known, validation
from ..activation import Activation
from .dispatch import _autocasts, _fused, _kernels, _plan_autocast, _plan_composed, _plan_kernels

if backend.HAS_TRITON:
    from ..kernels.problem import RowNorm

Tensor = torch.Tensor
Shape = tuple[int, ...]


def _plan_row_norm(
    function: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Shape,
    eps: float | None,
    subtract_mean: bool,
    activation: Activation | None,
) -> known.Call:
    """y of a call, once its arguments are checked, as a function of its four tensors."""
    span = validation.row_span(function, x, shape)
    validation.operands(function, x, shape, weight, bias, residual)
    return _plan(x, residual, weight, bias, shape, span, _of_torch(eps, x), subtract_mean, activation)


def _plan_add_row_norm(
    function: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Shape,
    eps: float | None,
    subtract_mean: bool,
    activation: Activation | None,
    dropout_p: float,
) -> known.Call:
    """(y, total), as `_plan_row_norm`."""
    span = validation.row_span(function, x, shape)
    validation.operands(function, x, shape, weight, bias, residual, added_first=True)
    own_eps = _of_torch(eps, x)
    if _autocasts(x):
        options = (shape, span, own_eps, subtract_mean, activation)
        return _plan_autocast(
            lambda x, residual, weight, bias: _plan(x, residual, weight, bias, *options), True, dropout_p
        )
    plan = _kernels(x, residual, weight, bias)
    if plan is None:
        normalize = fallback.at_first(  # the total may be of another type
            lambda total, weight, bias: fallback.plan_layer_norm(total, weight, bias, shape, own_eps, subtract_mean)
        )
        return _plan_composed(normalize, True, activation, dropout_p)
    norm = RowNorm(span, own_eps, subtract_mean, True, *_fused(activation, dropout_p))
    return _plan_kernels(plan, x, residual, weight, bias, norm)


def _plan_weight_standardize(function: str, weight: Tensor, eps: float) -> known.Call:
    """The standardized weight, as `_plan_row_norm`."""
    validation.filters(function, weight)
    order = [*range(weight.dim())]
    if not weight.is_contiguous():  # filters are rows in whatever order their elements lie in memory
        order = [0, *sorted(order[1:], key=weight.stride, reverse=True)]
    back = [order.index(dim) for dim in range(weight.dim())]
    moved = order != sorted(order)

    def rows_of(weight: Tensor) -> Tensor:
        return (weight.permute(order) if moved else weight).flatten(1)

    rows = rows_of(weight)
    norm = _plan(rows, None, None, None, rows.shape[1:], rows.shape[1], eps, True, None)
    shape = [weight.shape[dim] for dim in order]

    def run(weight: Tensor) -> Tensor:
        y = norm(rows_of(weight), None, None, None).view(shape)
        return y.permute(back) if moved else y

    return run


def _of_torch(eps: float | None, x: Tensor) -> float:
    return fallback.DEFAULT_RMS_EPS[x.dtype] if eps is None else eps


def _plan(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Shape,
    span: int,
    eps: float,
    subtract_mean: bool,
    activation: Activation | None,
) -> known.Call:
    if _autocasts(x):

        def in_float32(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> known.Call:
            return _plan(x, residual, weight, bias, shape, span, eps, subtract_mean, activation)

        return _plan_autocast(in_float32, False, 0.0)
    plan = _kernels(x, residual, weight, bias)
    if plan is None:
        normalize = fallback.plan_layer_norm(x, weight, bias, shape, eps, subtract_mean)
        return _plan_composed(normalize, False, activation, 0.0)
    norm = RowNorm(span, eps, subtract_mean, False, *_fused(activation))
    return _plan_kernels(plan, x, residual, weight, bias, norm)
