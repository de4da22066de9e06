"""`fallback` for norms of channels: by the statistics of groups of planes, or by given ones, running or merged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from .fallback import (
    PLAIN,
    _common_dtype,
    _is_ours_alone,
    _laid_out_as,
    _looked_into,
    _one_type,
    _takes_function,
    apply_of,
    at_first,
    but_channels,
    goes_on_from,
    intercepted,
    left_a_transform,
    of_type,
)
from .validation import HALF

Tensor = torch.Tensor


def plan_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Callable[..., Tensor]:
    """torch's group_norm of tensors like these, as a function of them, in x's type and layout whatever the parameters'
    types are; y is a new tensor.

    With as many groups as channels it is instance norm. torch's own instance_norm is left alone: its third derivatives
    are wrong, as is its dx where a batch of one meets a channels_last dy, and it is slower.
    """
    if x.numel() == 0:  # where torch's backward leaves dweight and dbias unwritten
        channels = x.shape[1]
        return lambda x, weight, bias: stored_norm(x, x.new_zeros(channels), x.new_ones(channels), weight, bias, eps)
    if weight is None and bias is not None:  # without a weight torch's backward fails
        by_ones = plan_group_norm(x, torch.ones_like(bias), bias, groups, eps)
        return lambda x, weight, bias: by_ones(x, torch.ones_like(bias), bias)
    if not _takes_parameters(x, weight, bias):
        dtype = _common_dtype(x, weight, bias)
        of_one_type = at_first(lambda x, weight, bias: plan_group_norm(x, weight, bias, groups, eps))
        return lambda x, weight, bias: of_one_type(
            x.to(dtype), *[None if parameter is None else parameter.to(dtype) for parameter in (weight, bias)]
        ).to(x.dtype)
    plain = not _looked_into() and {*map(type, (x, weight, bias))} <= PLAIN and not intercepted()
    norm = torch.group_norm if plain else F.group_norm  # who intercepts functions wants F's
    of_channels = groups == x.shape[1]
    centres = of_channels and x.dtype not in HALF
    if plain and x.is_contiguous():
        return lambda x, weight, bias: norm(_without_means(x) if centres else x, groups, weight, bias, eps)

    def by_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = x.contiguous()  # as torch's CUDA kernel does
        return _laid_out_as(x, norm(_without_means(rows) if centres else rows, groups, weight, bias, eps))

    def by_squares_if_exact(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = _group_norm_by_squares(x, groups, weight, bias, eps)
        return by_rows(x, weight, bias) if y is None else y

    # Not of single channels: torch's instance_norm is another pass, and sums their gradients more exactly.
    may_be_squares = not of_channels and _values_are_here(x, weight, bias) and _has_few_positions_channels_last(x)
    return by_squares_if_exact if may_be_squares else by_rows


def _takes_parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch's group_norm takes them beside x: of x's type, or float32 ones beside half x on a CPU."""
    beside_half = x.dtype in HALF and x.device.type == "cpu" and _one_type(torch.float32, weight, bias)
    return beside_half or _one_type(x.dtype, weight, bias)


def _without_means(x: Tensor) -> Tensor:
    """Any constant may be taken from a plane. Without its mean torch's group_norm is as exact as its instance_norm;
    with a large one it is not. Half precision would round the difference, and is exact enough."""
    return x - x.detach().mean(tuple(range(2, x.dim())), keepdim=True)


# torch's pass over channels_last on a CPU adds a channel's positions one to another, in x's type or float32, and takes
# the variance as E[x^2] - E[x]^2. Of so many positions y is off by 1e-6 at most in float32 (of 512 x 512 by 3e-5), and
# a mean of so many deviations costs 5 times that.
_FEW_POSITIONS, _FEW_DEVIATIONS = 64 * 64, 2


def _group_norm_by_squares(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """torch's own pass over channels_last on a CPU; None where a mean is too large for it, or a square for its type."""
    samples, channels = x.shape[:2]
    sizes = (samples, channels, x.numel() // (samples * channels), groups)
    # Below F.group_norm, which makes them contiguous, torch goes by no strides of theirs.
    weight, bias = (None if parameter is None else parameter.contiguous() for parameter in (weight, bias))
    norm = _GroupNormBySquares.apply if _takes_function(x, weight, bias) else torch.native_group_norm
    y, mean, rstd = norm(x, weight, bias, *sizes, eps)
    is_exact = ((mean * rstd).abs() <= _FEW_DEVIATIONS) & (rstd > 0)
    return y if is_exact.all().item() else None


class _GroupNormBySquares(torch.autograd.Function):
    """torch.native_group_norm, whose backward finds dx whether or not somebody wants it: asked for the other two alone,
    torch's ends the process (seen in 2.13, channels_last on a CPU)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes_and_eps: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes_and_eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.sizes_and_eps = sizes_and_eps
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        *sizes, eps = ctx.sizes_and_eps
        needs_x, needs_weight, needs_bias, *others = ctx.needs_input_grad
        if goes_on_from(dy):
            found = _gradients_of_groups(dy, x, weight, sizes[-1], eps)
        else:
            given = (_laid_out_as(x, dy), x, mean, rstd, weight, *sizes)
            found = torch.ops.aten.native_group_norm_backward(*given, (True, needs_weight, needs_bias))
        needs = (needs_x, needs_weight, needs_bias)
        return *[each if needed else None for each, needed in zip(found, needs, strict=True)], *[None] * len(others)


def _gradients_of_groups(
    dy: Tensor, x: Tensor, weight: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) in elementary operations; any derivative of them is right."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dz, rows = dy.to(dtype), x.to(dtype).reshape(x.shape[0], groups, -1)
    x_hat, rstd = _x_hat(rows, [-1], eps)
    dx_hat = (dz if weight is None else dz * _by_channel(weight, dz, dtype)).reshape(rows.shape)
    dx = _through_norm(dx_hat, x_hat, rstd, [-1]).reshape(x.shape)
    batch = but_channels(dy)
    return dx, (dz * x_hat.reshape(x.shape)).sum(batch), dz.sum(batch)


def _x_hat(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """x normalized over these dims in elementary operations, and rstd as it broadcasts to x."""
    deviation = x - x.mean(dims, keepdim=True)
    rstd = torch.rsqrt(deviation.square().mean(dims, keepdim=True) + eps)
    return deviation * rstd, rstd


def _through_norm(dx_hat: Tensor, x_hat: Tensor, rstd: Tensor, dims: list[int]) -> Tensor:
    """dx from dx_hat, the gradient of x_hat."""
    along = (dx_hat * x_hat).mean(dims, keepdim=True)
    return (dx_hat - dx_hat.mean(dims, keepdim=True) - x_hat * along) * rstd


def _has_few_positions_channels_last(x: Tensor) -> bool:
    """Whether channels lie beside each other, then positions, then samples, by the strides of dims of one element too,
    which x.is_contiguous(memory_format) does not ask for and torch's kernel goes by."""
    _, channels, *positions = x.shape
    if len(positions) not in (2, 3) or channels == 1 or not 1 < math.prod(positions) <= _FEW_POSITIONS:
        return False
    strides, stride = [1], channels
    for size in reversed(positions):
        strides.append(stride)
        stride *= size
    return x.stride() == (stride, 1, *strides[:0:-1])


def _by_channel(parameter: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter [C] as it broadcasts to x [N, C, *]."""
    return parameter.to(dtype).view(-1, *(1,) * (x.dim() - 2))


def by_statistics(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x - mean) * rstd * weight + bias by channel, in elementary operations, of x's type."""
    dtype = rstd.dtype
    scale = rstd if weight is None else rstd * weight.to(dtype)
    # The mean is taken off first: folded into a shift, as torch has it, a large one cancels.
    y, scale = x.to(dtype) - _by_channel(mean, x, dtype), _by_channel(scale, x, dtype)
    shift = None if bias is None else _by_channel(bias, x, dtype)
    if _is_ours_alone(y, scale, shift):
        y = y.mul_(scale)
        y = y if shift is None else y.add_(shift)
    else:
        y = y * scale
        y = y if shift is None else y + shift
    return y.to(x.dtype)


class _ByStatistics(torch.autograd.Function):
    """`stored_norm`, which keeps x for backward, as torch does, and not the difference from the mean."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        torchs: bool,
    ) -> Tensor:
        needs_x = weight is not None and ctx.needs_input_grad[3]
        # Copies, as torch's: running statistics may have moved on when backward comes.
        ctx.save_for_backward(x if needs_x else None, mean.clone() if needs_x else None, var.clone(), weight)
        ctx.eps, ctx.torchs, ctx.types = eps, torchs, (x.dtype, None if bias is None else bias.dtype)
        return _by_given(x, mean, var, weight, bias, eps, torchs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight = ctx.saved_tensors
        needs_x, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if ctx.torchs and x is not None and type(dy) in PLAIN and not goes_on_from(dy):
            # Contiguous: beside x in [N, C] or channels_last torch's CPU kernel goes by no strides of a weight.
            given = (_laid_out_as(x, dy), x, weight.contiguous(), mean, var, None, None, False, ctx.eps)
            needs = (needs_x, needs_weight, needs_bias)
            found = torch.ops.aten.native_batch_norm_backward(*given, needs)
            dx, dweight, dbias = (each if needed else None for each, needed in zip(found, needs, strict=True))
            return dx, None, None, dweight, dbias, None, None
        x_dtype, bias_dtype = ctx.types
        dtype, batch = var.dtype, but_channels(dy)
        dz, rstd = dy.to(dtype), torch.rsqrt(var + ctx.eps)
        dx = dweight = dbias = None
        if needs_x:
            scale = rstd if weight is None else rstd * weight.to(dtype)
            dx = (dz * _by_channel(scale, dz, dtype)).to(x_dtype)
        if x is not None:
            x_hat = by_statistics(x.to(dtype), mean, rstd, None, None)
            dweight = (dz * x_hat).sum(batch).to(weight.dtype)
        if needs_bias:
            dbias = dz.sum(batch).to(bias_dtype)
        return dx, None, None, dweight, dbias, None, None


_apply = apply_of(_ByStatistics)


def stored_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalizes each channel of x by statistics that are given, which get no gradient; y has x's type and layout."""
    tensors = (x, running_mean, running_var, weight, bias)
    return plan_stored_norm(*tensors, eps)(*tensors)


def plan_stored_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Callable[..., Tensor]:
    """`stored_norm` of tensors like these, as a function of them, and of a momentum that moves nothing."""
    dtype = torch.promote_types(_common_dtype(x, running_mean, running_var, weight, bias), torch.float32)
    operands = (x, weight, bias)
    left = left_a_transform(x, running_mean, running_var, weight, bias)
    in_function = not left and _takes_function(*operands) and {*map(type, operands)} <= PLAIN
    may_be_torchs = not left and _torch_takes(x, running_mean, running_var, weight, bias)
    learn = running_mean.requires_grad or running_var.requires_grad
    normalize = _apply if in_function else _by_given
    lie = running_mean.dtype, running_mean.shape, running_mean.stride(), running_var.stride()

    if may_be_torchs and x.is_contiguous() and not (in_function or intercepted()):

        def directly(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, *_: Any) -> Tensor:
            if _mean_is_small(mean, var, eps, lie):
                return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
            return _by_given(x, mean, var, weight, bias, eps, False)

        return directly

    def by_torch_if_exact(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, *_: Any) -> Tensor:
        return normalize(x, mean, var, weight, bias, eps, _mean_is_small(mean, var, eps, lie))

    def run(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, *_: Any) -> Tensor:
        if learn:
            mean, var = mean.detach(), var.detach()
        return normalize(x, of_type(mean, dtype), of_type(var, dtype), weight, bias, eps, False)

    return by_torch_if_exact if may_be_torchs else run


def _by_given(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, torchs: bool
) -> Tensor:
    if torchs:
        return _laid_out_as(x, torchs_batch_norm(x, mean, var, weight, bias, False, 0.0, eps))
    return by_statistics(x, mean, torch.rsqrt(var + eps), weight, bias)


def torchs_batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """F.batch_norm of tensors that nobody traces, without its checks; who intercepts functions wants F's."""
    if intercepted():
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    cudnn = not x.is_cpu and torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn)


# torch folds the mean into a shift: of a mean of so many deviations three bits are lost, as where y itself is as large.
MOST_DEVIATIONS = 8


def _values_are_here(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a value can be asked for at next to no cost: on a CPU, of plain tensors, which nobody traces, transforms
    or dispatches in a mode of his own."""
    if not x.is_cpu or _looked_into() or torch._C._len_torch_dispatch_stack():
        return False
    return {type(x), *map(type, others)} <= PLAIN


class _KnownMean(NamedTuple):
    """Whether a running mean was small, beside which variance: in these versions, and with this eps."""

    storages: tuple[StorageWeakRef, ...]  # which nobody gets again while somebody refers to them
    key: tuple[int, int, float]
    small: bool


_known_means: dict[tuple[Any, ...], _KnownMean] = {}  # by the places in memory of a mean and a variance
MOST_KNOWN = 1024


def _torch_takes(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch's own pass by statistics may stand for the three of `by_statistics`, where no mean is large beside
    its deviation: on a CPU that nobody traces or transforms, in one type, of statistics that are given alone."""
    given = (mean, var, weight, bias)
    if not _values_are_here(x, *given) or x.dtype in HALF or not _one_type(x.dtype, *given) or x.numel() == 0:
        return False
    # Those that learn torch's pass would give gradients; those made in inference mode have no version.
    return not (mean.requires_grad or var.requires_grad or mean.is_inference() or var.is_inference())


def _mean_is_small(mean: Tensor, var: Tensor, eps: float, lie: tuple[Any, ...]) -> bool:
    """Looked at once in each version of the two: it takes as long as a small norm. lie: how they do, and their type.

    Where they are moved and no version tells (through .data or NumPy, by torch's own batch norm), torch's pass may be
    taken for a mean that has become large; it is then as exact as torch.
    """
    storages = mean.untyped_storage(), var.untyped_storage()
    place = storages[0]._cdata, mean.storage_offset(), storages[1]._cdata, var.storage_offset(), *lie
    key = mean._version, var._version, eps
    known = _known_means.get(place)
    if known is not None and known.key == key:
        return known.small
    small = not (mean.square() > MOST_DEVIATIONS**2 * (var + eps)).any().item()
    if len(_known_means) >= MOST_KNOWN:
        _forget_means()
    _known_means[place] = _KnownMean(tuple(map(StorageWeakRef, storages)), key, small)
    return small


def _forget_means() -> None:
    """Those that are gone, or all where that leaves many."""
    for place, known in list(_known_means.items()):
        if any(storage.expired() for storage in known.storages):
            _known_means.pop(place, None)
    if len(_known_means) > MOST_KNOWN // 2:
        _known_means.clear()


@torch.no_grad()
def track_planes(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    """Moves running statistics towards those of x's planes, averaged over the batch; the variance is unbiased."""
    if x.numel() == 0:
        return
    dtype = torch.promote_types(x.dtype, torch.float32)
    var, mean = torch.var_mean(x.detach().to(dtype), tuple(range(2, x.dim())), correction=1)
    for running, found in ((running_mean, mean), (running_var, var)):
        wide = torch.promote_types(running.dtype, dtype)
        running.copy_(running.to(wide).lerp(found.mean(0).to(wide), momentum))
