"""Batch norm by the statistics of all processes of a group, as torch.nn.SyncBatchNorm; on a CPU as well.

Every process calls it at the same place of the same model, with whatever batch it has, an empty one too. Then each
takes part in one all-gather a forward, and in one all-reduce a backward: where y has a gradient, and x, weight or bias
(of `add_sync_batch_norm` the residual, too) requires one. Whether any of them does has to be the same in all processes.
Which of them may differ: of x one process may want the gradient, and another not, if the weight requires one in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import backend, batch_fallback, functional, validation
from .activation import Activation, ActivationLike, resolve
from .channel_fallback import _by_channel, by_statistics
from .collectives import Moments, computed_in, gather_statistics, reduce_means, values_of_channel
from .fallback import _laid_out_as, but_channels
from .functional.dispatch import _fused, _kernels, _plan_composed

if backend.HAS_TRITON:
    from . import drops, planned, sync_autograd
    from .kernels.problem import BatchNorm
    from .kernels.views import lies_pooled_channels_last

Tensor = torch.Tensor


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    group: Any,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
) -> Tensor:
    """`functional.batch_norm` by the statistics of all processes of `group`; itself where that is None.

    dweight and dbias are those of this process; their sum is that of one process over the whole batch.

    Raises:
        ArgumentError: as there; in training, one value a channel in all processes together. What one process alone
            refuses leaves the others waiting for it.
    """
    if group is None:
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, activation=activation,
        )  # fmt: skip
    function = "sync_batch_norm"
    count = _validated(function, input, running_mean, running_var)
    validation.operands(function, input, (count,), weight, bias, residual)
    momentum, eps = validation.number(function, "momentum", momentum), validation.epsilon(function, eps, True)
    found = resolve(activation)
    return _synchronized(input, residual, running_mean, running_var, weight, bias, momentum, eps, False, found, group)


def add_sync_batch_norm(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    group: Any,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`functional.add_batch_norm` by the statistics of all processes of `group`; itself where that is None."""
    if group is None:
        return functional.add_batch_norm(
            input, residual, running_mean, running_var, weight, bias, training, momentum, eps,
            activation=activation, dropout_p=dropout_p,
        )  # fmt: skip
    function = "add_sync_batch_norm"
    count = _validated(function, input, running_mean, running_var)
    validation.operands(function, input, (count,), weight, bias, residual, added_first=True)
    p = validation.dropout(function, dropout_p, training)
    momentum, eps = validation.number(function, "momentum", momentum), validation.epsilon(function, eps, True)
    found = resolve(activation)
    return _synchronized(input, residual, running_mean, running_var, weight, bias, momentum, eps, True, found, group, p)


def _validated(function: str, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> int:
    """The number of channels of x, of which there is at least one."""
    count = validation.channels(function, x)
    if count == 0:
        raise validation.ArgumentError(
            f"{function}: the number of channels must be non-zero, but the input has shape {tuple(x.shape)}"
        )
    validation.running_statistics(function, x, running_mean, running_var, "training", True)
    return count


@torch.compiler.disable  # a collective between two halves of a kernel's work is nothing that it could fuse
def _synchronized(
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    add_first: bool,
    activation: Activation | None,
    group: Any,
    dropout_p: float = 0.0,
) -> Any:
    """y, or (y, total) where the residual is added first, in x's layout. Running statistics move."""
    plan = _kernels(x, residual, weight, bias, running_mean, running_var) if x.numel() else None
    if plan is not None and plan is planned.plan:
        channels_last = lies_pooled_channels_last(x.shape, x.stride())
        norm = BatchNorm(channels_last, True, momentum, eps, add_first, *_fused(activation, dropout_p))
        norm = norm._replace(seed=drops.draw_seed(x.device) if dropout_p > 0.0 else None)
        return sync_autograd.run(x, residual, weight, bias, norm, group, (running_mean, running_var))

    def normalize(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any) -> Tensor:
        return _SyncBatchNorm.apply(x, weight, bias, momentum, eps, group, mean, var)

    composed = _plan_composed(normalize, add_first, activation, dropout_p)
    if running_mean is not None:
        composed = batch_fallback.plan_put_back(composed)
    return composed(x, residual, running_mean, running_var, weight, bias)


class _SyncBatchNorm(torch.autograd.Function):
    """Batch norm over processes in torch's operations; it keeps what torch's batch_norm keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        group: Any,
        running_mean: Tensor | None,
        running_var: Tensor | None,
    ) -> Tensor:
        moments = _moments(x) if x.numel() else Moments.of_nothing(x)
        found = gather_statistics(moments, values_of_channel(x), eps, group)
        found.attract(running_mean, running_var, momentum)
        ctx.save_for_backward(x, weight, found.mean, found.rstd)
        ctx.group = group
        return _laid_out_as(x, by_statistics(x, found.mean, found.rstd, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *rest = ctx.needs_input_grad
        dtype, batch = rstd.dtype, but_channels(x)
        dz, x_hat = dy.to(dtype), by_statistics(x.to(dtype), mean, rstd, None, None)
        g = dz if weight is None else dz * _by_channel(weight, x, dtype)
        means = (g.mean(batch), (g * x_hat).mean(batch)) if x.numel() else None
        mean_g, mean_g_x_hat = reduce_means(means, values_of_channel(x), mean, ctx.group)
        dx = dweight = dbias = None
        if needs_x:
            correction = x_hat * _by_channel(mean_g_x_hat, x, dtype) + _by_channel(mean_g, x, dtype)
            dx = ((g - correction) * _by_channel(rstd, x, dtype)).to(x.dtype)
        if needs_weight:
            dweight = (dz * x_hat).sum(batch)
        if needs_bias:
            dbias = dz.sum(batch)
        return dx, dweight, dbias, *(None for _ in rest)


def _moments(x: Tensor) -> Moments:
    batch = but_channels(x)
    wide = x.detach().to(computed_in(x))
    origin = wide.mean(batch)
    deviation = wide - _by_channel(origin, x, wide.dtype)
    mean = deviation.mean(batch)
    return Moments(origin, mean, (deviation - _by_channel(mean, x, wide.dtype)).square().sum(batch))
