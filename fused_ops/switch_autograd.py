"""torch.autograd for switchable norm on kernels: `autograd` with the two weights of a mixture beside its operands."""

from __future__ import annotations

from typing import Any

import torch

from . import backend, fallback, switch_fallback
from .activation import Activation
from .autograd import (
    Needs,
    Saved,
    as_needed,
    composed_ends,
    composes,
    of_total_alone,
    through_mask,
    wanted_of_kernels,
    what_to_save,
    without_seed,
)
from .kernels.channel_norm.switch_backward import MixtureGradients, switch_norm_backward
from .kernels.channel_norm.switch_forward import switch_norm_forward
from .kernels.problem import Gradients, Kinds, Mixture, SwitchNorm

Tensor = torch.Tensor
# x, residual, weight, bias, and the weights of the mixture for means and for variances.
Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]


class SwitchNormFunction(torch.autograd.Function):
    """Switchable norm straight to the launchers: y, or (y, total) where the residual is added first."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean_weight: Tensor,
        var_weight: Tensor,
        norm: SwitchNorm,
        *running: Tensor | None,
    ) -> Any:
        needs = ctx.needs_input_grad
        mixes = needs[4] or needs[5]
        keeps_x, statistics, bits, keeps_residual = what_to_save(
            norm, Needs(needs[0] or mixes, *needs[1:4]), residual is not None
        )
        (y, total, mean, rstd, mask), kinds = switch_norm_forward(
            x, residual, weight, bias, Mixture(mean_weight, var_weight), norm, *running,
            save_statistics=statistics, save_bits=bits,
        )  # fmt: skip
        normalized = None if not keeps_x else x if total is None else total
        mixed = (mean_weight, var_weight, *(kinds if keeps_x and kinds is not None else (None, None)))
        # In the order of Saved, then of the mixture.
        residual = residual if keeps_residual else None
        ctx.save_for_backward(*Saved(normalized, residual, weight, bias, mean, rstd, mask, norm.seed), *mixed)
        ctx.set_materialize_grads(False)
        ctx.norm = without_seed(norm)
        ctx.x_dtype = x.dtype
        if total is None:
            return y
        if not (needs[0] or needs[1]):
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        needs, mixes = Needs(*ctx.needs_input_grad[:4]), tuple(ctx.needs_input_grad[4:6])
        *tensors, mean_weight, var_weight, means, variances = ctx.saved_tensors
        saved, mixture = Saved(*tensors), Mixture(mean_weight, var_weight)
        norm = saved.of_call(ctx.norm)
        rest = (None,) * (len(ctx.needs_input_grad) - 6)
        if dy is None:
            return *of_total_alone(dtotal, norm, ctx.x_dtype, needs), None, None, *rest
        if means is None or backend.traced(dy) or composes(saved, dy, dtotal):
            create_graph = torch.is_grad_enabled()
            found, of_mixture = _composed(saved, mixture, Kinds(means, variances), dy, dtotal, norm, create_graph)
        else:
            wanted = wanted_of_kernels(saved, dy, norm, needs)
            assert saved.x is not None and saved.mean is not None and saved.rstd is not None
            found, of_mixture = switch_norm_backward(
                dy, dtotal, saved.x, saved.residual, saved.bits, saved.weight, saved.bias, saved.mean, saved.rstd,
                mixture, Kinds(means, variances), norm, wanted, mixes,
            )  # fmt: skip
        needed = as_needed(found, dy, saved, norm, ctx.x_dtype, needs)
        return *needed, *(g if need else None for g, need in zip(of_mixture, mixes, strict=True)), *rest


@torch.enable_grad()
def _composed(
    saved: Saved,
    mixture: Mixture,
    kinds: Kinds,
    dy: Tensor,
    dtotal: Tensor | None,
    norm: SwitchNorm,
    create_graph: bool,
) -> tuple[Gradients, MixtureGradients]:
    """By torch's own operations, so that with create_graph they can be differentiated again."""
    # Views of their own, so that a tensor passed in two places gets a gradient for each.
    mean_weight, var_weight = (tensor.view_as(tensor) for tensor in mixture)
    operands = (saved.x, saved.residual, saved.weight, saved.bias)
    x, residual, weight, bias = (None if tensor is None else tensor.view_as(tensor) for tensor in operands)
    dz = dy if saved.bits is None else through_mask(saved.bits, norm, dy)
    if x is None:  # nothing that is asked for depends on it
        dbias = None if bias is None else dz.sum(fallback.but_channels(dz))
        return Gradients(None, None if saved.bits is None else dz, None, dbias), MixtureGradients(None, None)
    mean = None if norm.training else kinds.means[-x.shape[1] :]
    var = None if norm.training else kinds.variances[-x.shape[1] :]
    z = switch_fallback.switch_norm(x, mean, var, weight, bias, mean_weight, var_weight, norm.training, 0.0, norm.eps)
    if residual is not None:
        z = z + residual
    if saved.bits is None and norm.activation is not None:
        z = fallback.activate(z, Activation.from_scalars(norm.activation, norm.alpha, norm.beta))
    views = (x, residual, weight, bias, mean_weight, var_weight)
    inputs = [tensor for tensor in views if tensor is not None and tensor.requires_grad]
    gradients = torch.autograd.grad(z, inputs, dz.to(z.dtype), create_graph=create_graph, allow_unused=True)
    found = dict(zip(map(id, inputs), gradients, strict=True))
    dx, dresidual, dweight, dbias, *of_mixture = (found.get(id(tensor)) for tensor in views)
    dx, dresidual = composed_ends(dx, dresidual, dz, dtotal, saved, norm)
    return Gradients(dx, dresidual, dweight, dbias), MixtureGradients(*of_mixture)


def run(operands: Operands, norm: SwitchNorm, *running: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, total) where the residual is added first; through autograd only where something requires it."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands):
        return SwitchNormFunction.apply(*operands, norm, *running)
    x, residual, weight, bias, *mixture = operands
    out, _ = switch_norm_forward(x, residual, weight, bias, Mixture(*mixture), norm, *running)
    return out.y if out.total is None else (out.y, out.total)
