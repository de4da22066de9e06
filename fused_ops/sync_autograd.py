"""torch.autograd for batch norm over processes on kernels: `autograd` by halves, a collective between them."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .autograd import Needs, Saved, as_needed, gradients, wanted_of_kernels, what_to_save, without_seed
from .collectives import Moments, gather_statistics, reduce_means, values_of_channel
from .kernels.channel_norm.batch_backward import batch_norm_backward
from .kernels.channel_norm.sync import SyncBackward, SyncForward
from .kernels.problem import BatchNorm, Forward

Tensor = torch.Tensor
Running = tuple[Tensor | None, Tensor | None]


class SyncNormFunction(torch.autograd.Function):
    """Batch norm of x with elements by the statistics of a group: y, or (y, total) where the residual is added first.

    Backward reduces wherever something that the norm itself is made of requires a gradient (`reduces`), x or not: the
    parameters are the same in all processes, and of x another process may want the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: BatchNorm,
        group: Any,
        running: Running,
    ) -> Any:
        needs = Needs(*ctx.needs_input_grad[:4])
        ctx.reduces = needs.x or needs.weight or needs.bias or (norm.add_first and needs.residual)
        kept = what_to_save(norm, needs._replace(x=ctx.reduces), residual is not None)
        y, total, mean, rstd, bits = _forward(x, residual, weight, bias, norm, group, running, kept.bits)
        normalized = x if total is None else total
        statistics = (mean, rstd) if kept.statistics else (None, None)
        kept_x, kept_residual = normalized if kept.x else None, residual if kept.residual else None
        ctx.save_for_backward(*Saved(kept_x, kept_residual, weight, bias, *statistics, bits, norm.seed))
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.group = without_seed(norm), group
        ctx.x_dtype = x.dtype
        if total is None:
            return y
        if not (needs.x or needs.residual):
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        saved, needs = Saved(*ctx.saved_tensors), Needs(*ctx.needs_input_grad[:4])
        norm = saved.of_call(ctx.norm)
        rest = (None,) * (len(ctx.needs_input_grad) - 4)
        if dy is None or not ctx.reduces:
            return *gradients(saved, dy, dtotal, norm, ctx.x_dtype, needs, batch_norm_backward), *rest
        x, residual, weight, bias, mean, rstd, bits, _ = saved
        assert x is not None and mean is not None and rstd is not None
        wanted = wanted_of_kernels(saved, dy, norm, needs)
        halves = SyncBackward(dy, dtotal, x, residual, bits, weight, bias, mean, rstd, norm, wanted)
        means = reduce_means(halves.means(), values_of_channel(x), mean, ctx.group)
        return *as_needed(halves.finish(*means), dy, saved, norm, ctx.x_dtype, needs), *rest


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNorm,
    group: Any,
    running: Running,
    save_bits: bool,
) -> Forward:
    halves = SyncForward(x, residual, weight, bias, norm, save_bits)
    found = gather_statistics(Moments(*halves.moments()), values_of_channel(x), norm.eps, group)
    out = halves.finish(found.mean, found.rstd)
    found.attract(*running, norm.momentum)
    return out


def run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNorm,
    group: Any,
    running: Running,
) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, total) where the residual is added first; through autograd only where something requires it. The
    running statistics move last."""
    operands = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands):
        return SyncNormFunction.apply(*operands, norm, group, running)
    out = _forward(*operands, norm, group, running, save_bits=False)
    return out.y if out.total is None else (out.y, out.total)
