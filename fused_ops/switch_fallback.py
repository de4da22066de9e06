"""`fallback` for switchable norm: plane moments, of which the statistics of instance, layer and batch norm follow.

A plane (n, c) is one channel of one sample. Everything but x itself is of one number a plane, shape [N, C, 1, ...] or,
without positions, [N, C]; what a kind of statistics shares has 1 in place of N or C.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from . import batch_fallback
from .channel_fallback import _by_channel, stored_norm
from .fallback import (
    PLAIN,
    _common_dtype,
    _is_ours_alone,
    _laid_out_as,
    _takes_function,
    but_channels,
    transformed,
)

Tensor = torch.Tensor


class _Planes(NamedTuple):
    """The mean of each plane is shift + mean, its biased variance var. The shift is a constant to any derivative."""

    shift: Tensor
    mean: Tensor
    var: Tensor


class _Mixture(NamedTuple):
    """Of every kind of statistics, in order: its shares, how far a plane's mean lies above its mean, its variance.

    x - shift - offset is x minus the mixed mean; rstd is of the mixed variance.
    """

    mean_shares: tuple[Tensor, ...]
    var_shares: tuple[Tensor, ...]
    distances: list[Tensor]
    variances: list[Tensor]
    offset: Tensor
    rstd: Tensor


class _Call(NamedTuple):
    """What a call is besides its tensors that learn; `stored` is the mean and variance of the batch where given."""

    stored: tuple[Tensor, ...]
    eps: float
    dtype: torch.dtype


def switch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor,
    var_weight: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Switchable norm in x's type and layout, whatever the other types are; y is a new tensor.

    In training the running statistics, if given, move in place: see `batch_fallback.plan_put_back`.
    """
    operands = (x, weight, bias, mean_weight, var_weight)
    if x.numel() == 0:  # nothing to take statistics of, nothing to be mixed, and running ones stay as they are
        channels = x.shape[1]
        y = stored_norm(x, x.new_zeros(channels), x.new_ones(channels), weight, bias, eps)
        return y + (mean_weight.sum() + var_weight.sum()).to(y.dtype)
    running = () if running_mean is None or running_var is None else (running_mean, running_var)
    dtype = torch.promote_types(_common_dtype(*operands, *running), torch.float32)
    call = _Call(() if training else running, eps, dtype)
    moving = running if training else ()
    if _takes_function(*operands) and {*map(type, operands)} <= PLAIN:
        return _SwitchNorm.apply(*operands, call, moving, momentum)
    y, planes, mixture = _normalize(*operands, call)
    _track(x, planes, mixture, moving, momentum)
    return y


class _SwitchNorm(torch.autograd.Function):
    """`_normalize`, which keeps x and three numbers a plane for backward in place of every step's tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean_weight: Tensor,
        var_weight: Tensor,
        call: _Call,
        moving: tuple[Tensor, ...],
        momentum: float,
    ) -> Tensor:
        y, planes, mixture = _normalize(x, weight, bias, mean_weight, var_weight, call)
        _track(x, planes, mixture, moving, momentum)
        ctx.eps, ctx.dtype, ctx.planes = call.eps, call.dtype, x.dim() > 2
        needs_x, needs_weight, _, *needs_shares = ctx.needs_input_grad[:5]
        if needs_x or needs_weight or any(needs_shares):
            # Without positions a plane's moments are x itself, and are made again. Running statistics may have moved
            # on when backward comes.
            kept = (*(planes if ctx.planes else ()), *map(torch.clone, call.stored))
            ctx.save_for_backward(x, weight, mean_weight, var_weight, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not saved:  # the bias alone learns
            dbias = dy.to(ctx.dtype).sum(but_channels(dy))
            return None, None, dbias, *(None,) * 5
        needs = tuple(ctx.needs_input_grad[:5])
        x, weight, mean_weight, var_weight, *kept = saved
        planes = _Planes(*kept[:3]) if ctx.planes else None
        call = _Call(tuple(kept[3:] if ctx.planes else kept), ctx.eps, ctx.dtype)
        if torch.is_grad_enabled():  # what backward is differentiated by must be seen to come from x
            planes = None
        return *_gradients(dy, x, weight, mean_weight, var_weight, planes, call, needs), None, None, None


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean_weight: Tensor, var_weight: Tensor, call: _Call
) -> tuple[Tensor, _Planes, _Mixture]:
    """(y, and what it was normalized by), in elementary operations; any derivative of y is right."""
    z, planes = _moments(x.to(call.dtype))
    mixture = _mix(planes, mean_weight, var_weight, call)
    scale = mixture.rstd if weight is None else mixture.rstd * _by_channel(weight, x, call.dtype)
    above = None if bias is None else _by_channel(bias, x, call.dtype)
    if _is_ours_alone(z, mixture.offset, scale, above):
        y = z.sub_(mixture.offset).mul_(scale)
        y = y if above is None else y.add_(above)
    else:
        y = (z - mixture.offset) * scale
        y = y if above is None else y + above
    return _laid_out_as(x, y.to(x.dtype)), planes, mixture


def _moments(x: Tensor) -> tuple[Tensor, _Planes]:
    """(x - shift, the moments of x's planes).

    A mean as it is rounded to one number is taken off first, and what it is off by is the mean of the rest: where
    means are large and deviations small, all that follows has the digits of a deviation.
    """
    positions = _positions(x)
    if not positions:
        shift = x.detach()
        return x - shift, _Planes(shift, x - shift, torch.zeros_like(x))
    shift = x.detach().mean(positions, keepdim=True)
    z = x - shift
    var, mean = torch.var_mean(z, positions, correction=0, keepdim=True)
    return z, _Planes(shift, mean, var)


def _mix(planes: _Planes, mean_weight: Tensor, var_weight: Tensor, call: _Call) -> _Mixture:
    shift, mean, var = planes
    layer = _from_mean(shift, 1) + _from_mean(mean, 1)
    layer_var = (var + layer.square()).mean(1, keepdim=True)
    if call.stored:
        batch_mean, batch_var = (_by_channel(tensor.detach(), shift, call.dtype) for tensor in call.stored)
        batch = (shift - batch_mean) + mean
    else:
        batch = _from_mean(shift, 0) + _from_mean(mean, 0)
        batch_var = (var + batch.square()).mean(0, keepdim=True)

    mean_shares, var_shares = (tensor.to(call.dtype).softmax(0).unbind() for tensor in (mean_weight, var_weight))
    kinds = slice(-len(mean_shares), None)  # without positions, an instance is no kind of its own
    distances = [mean.new_zeros(()), layer, batch][kinds]
    variances = [var, layer_var, batch_var][kinds]
    # Shares add up to 1, so that a plane's own mean counts whole.
    offset = mean - _weighted(mean_shares[-2:], distances[-2:])
    rstd = torch.rsqrt(_weighted(var_shares, variances) + call.eps)
    return _Mixture(mean_shares, var_shares, distances, variances, offset, rstd)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean_weight: Tensor,
    var_weight: Tensor,
    planes: _Planes | None,
    call: _Call,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias, dmean_weight, dvar_weight), each where needed, in elementary operations.

    Any derivative of them is right where no `planes` are given. Each deviation x - mean and each variance hands its
    gradient on to x: through a mean goes the mean of the gradient over the same elements, and what sums over a plane
    is all that the others need to know of it.
    """
    needs_x, needs_weight, needs_bias, needs_mean_weight, needs_var_weight = needs
    wide, dz, positions = x.to(call.dtype), dy.to(call.dtype), _positions(x)
    z, planes = _moments(wide) if planes is None else (wide - planes.shift, planes)
    mixture = _mix(planes, mean_weight, var_weight, call)
    mean_shares, var_shares, distances, variances, offset, rstd = mixture
    deviation = z - offset

    of_bias = _plane_sums(dz, positions)
    of_weight = _plane_sums(dz * deviation, positions) * rstd
    scale = rstd if weight is None else rstd * _by_channel(weight, x, call.dtype)
    d_deviation = scale * of_bias
    d_var = -0.5 * scale * rstd * of_weight

    dx = dmean_weight = dvar_weight = None
    if needs_mean_weight:
        # Of x - mean less the part that all kinds have in common, and that shares which add up to 1 do not move.
        dmean_weight = _softmax_backward(mean_shares, [(d_deviation * distance).sum() for distance in distances])
    if needs_var_weight:
        dvar_weight = _softmax_backward(var_shares, [(d_var * variance).sum() for variance in variances])
    if needs_x:
        own = math.prod(x.shape[2:])  # positions of a plane
        through_means = _weighted(mean_shares, _shared(d_deviation / own, call, len(mean_shares)))
        through_vars = [
            share * 2 * shared
            for share, shared in zip(var_shares, _shared(d_var / own, call, len(var_shares)), strict=True)
        ]
        mixed_distance = planes.mean - offset
        constant = _weighted(through_vars, [distance - mixed_distance for distance in distances]) - through_means
        dx = dz * scale + (deviation * sum(through_vars) + constant)
    return (
        dx,
        of_weight.sum((0, *positions)) if needs_weight else None,
        of_bias.sum((0, *positions)) if needs_bias else None,
        dmean_weight,
        dvar_weight,
    )


def _shared(gradient: Tensor, call: _Call, kinds: int) -> list[Tensor]:
    """The mean of a gradient over the planes that share statistics of each kind; stored ones hand nothing on."""
    batch = torch.zeros_like(gradient[:1]) if call.stored else gradient.mean(0, keepdim=True)
    return [gradient, gradient.mean(1, keepdim=True), batch][-kinds:]


@torch.no_grad()
def _track(x: Tensor, planes: _Planes, mixture: _Mixture, moving: tuple[Tensor, ...], momentum: float) -> None:
    """Moves running statistics towards the mean and the unbiased variance of each channel."""
    if not moving:
        return
    if transformed():  # refuses a copy_ into what lies outside of it, but lets torch's own update pass
        running_mean, running_var = moving
        tensors = (x.detach(), running_mean, running_var, None, None)
        batch_fallback.plan_batch_norm(*tensors, training=True, eps=1.0)(*tensors, momentum)
        return
    count = x.shape[0] * math.prod(x.shape[2:])
    # An infinite shift is the mean, and leaves NaN.
    mean = planes.shift.mean(0) + planes.mean.mean(0).nan_to_num(nan=0.0)
    var = mixture.variances[-1] * (count / (count - 1))
    for running, found in zip(moving, (mean, var), strict=True):
        wide = torch.promote_types(running.dtype, found.dtype)
        running.copy_(running.to(wide).lerp(found.flatten().to(wide), momentum))


def _positions(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def _plane_sums(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    return x.sum(positions, keepdim=True) if positions else x


def _from_mean(x: Tensor, dim: int) -> Tensor:
    """x minus its mean along a dim, as exact as its deviations: the mean is rounded, and the rest has one again."""
    deviation = x - x.mean(dim, keepdim=True)
    return deviation - deviation.mean(dim, keepdim=True)


def _weighted(shares: Any, values: Any) -> Any:
    return sum(share * value for share, value in zip(shares, values, strict=True))


def _softmax_backward(shares: tuple[Tensor, ...], d_shares: list[Tensor]) -> Tensor:
    common = _weighted(shares, d_shares)
    return torch.stack([share * (d_share - common) for share, d_share in zip(shares, d_shares, strict=True)])
