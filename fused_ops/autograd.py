"""What autograd asks of a norm: what is saved, which gradients are wanted, and second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import is_grad_enabled

from . import channel_fallback, fallback
from .activation import Activation
from .drops import drop_factor
from .kernels.problem import (
    BatchNorm,
    Gradients,
    Norm,
    RowNorm,
    SwitchNorm,
    Wanted,
    compute_dtype,
    slope_takes_two_values,
)
from .kernels.views import pooled_planes

Tensor = torch.Tensor
Backward = Callable[..., Gradients]
AnyNorm = TypeVar("AnyNorm", bound=Norm | SwitchNorm)


class Needs(NamedTuple):
    """Which of the tensor arguments require a gradient."""

    x: bool
    residual: bool
    weight: bool
    bias: bool


class Saving(NamedTuple):
    """What forward keeps for backward beside parameters, all of it decided before the launch.

    x: the tensor that was normalized; statistics: its mean and rstd; bits: the mask of a two-valued slope; residual:
    where z has to be computed again with it.
    """

    x: bool
    statistics: bool
    bits: bool
    residual: bool


def what_to_save(norm: Norm | SwitchNorm, needs: Needs, has_residual: bool) -> Saving:
    """Keeps only what a gradient that is asked for depends on."""
    added_after = has_residual and not norm.add_first
    needs_slope = norm.activation is not None and any(needs)
    bits = needs_slope and added_after and slope_takes_two_values(norm.activation)
    recomputes_z = needs_slope and not bits
    needs_dx = needs.x or (needs.residual and norm.add_first)
    # Of a total that is frozen, its type: the residual's gradient has it.
    needs_x = needs.weight or recomputes_z or (needs_dx and (norm.add_first or not is_frozen(norm)))
    return Saving(needs_x, needs_x or needs_dx, bits, recomputes_z and added_after)


def is_frozen(norm: Norm | SwitchNorm) -> bool:
    """Whether mean and rstd are no functions of x, so that dx does not depend on it."""
    return isinstance(norm, BatchNorm) and not norm.training


class Saved(NamedTuple):
    """What backward finds again; x is what was normalized."""

    x: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    bits: Tensor | None
    seed: Tensor | None = None

    def of_call(self, norm: AnyNorm) -> AnyNorm:
        """The norm, whose seed is kept as every tensor is: what runs a forward again may draw another."""
        return norm if self.seed is None else norm._replace(seed=self.seed)  # type: ignore[return-value]


def without_seed(norm: AnyNorm) -> AnyNorm:
    """What a context keeps of a norm, and what is looked up by it: the numbers in it."""
    return norm if norm.seed is None else norm._replace(seed=None)  # type: ignore[return-value]


def gradients(
    saved: Saved,
    dy: Tensor | None,
    dtotal: Tensor | None,
    norm: Norm,
    x_dtype: torch.dtype,
    needs: Needs,
    backward: Backward,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias), each where needed, by `backward` or by the composition (see `composes`)."""
    if dy is None:
        return of_total_alone(dtotal, norm, x_dtype, needs)
    if composes(saved, dy, dtotal):
        found = _composed(saved, dy, dtotal, norm, torch.is_grad_enabled())
    else:
        found = _launched(saved, dy, dtotal, norm, needs, backward)
    return as_needed(found, dy, saved, norm, x_dtype, needs)


def of_total_alone(
    dtotal: Tensor | None, norm: Norm | SwitchNorm, x_dtype: torch.dtype, needs: Needs
) -> tuple[Tensor | None, Tensor | None, None, None]:
    """`gradients` where only the total was used, which is dropout(x) + residual."""
    return (
        dropped(dtotal, norm).to(x_dtype) if dtotal is not None and needs.x else None,
        dtotal if needs.residual else None,
        None,
        None,
    )


def dropped(gradient: Tensor, norm: Norm | SwitchNorm) -> Tensor:
    """The gradient of x from that of the total."""
    if norm.seed is None:
        return gradient
    dtype = compute_dtype(gradient.dtype)
    return gradient.to(dtype) * drop_factor(norm.seed, gradient.shape, norm.dropout_p, 0.0, dtype)


def as_needed(
    found: Gradients, dy: Tensor, saved: Saved, norm: Norm | SwitchNorm, x_dtype: torch.dtype, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias), each where needed and in its own type and shape."""
    dx, dresidual, dweight, dbias = found
    if needs.residual and dresidual is None:
        dresidual = dx if norm.add_first else dy
    if dx is not None and dx.dtype != x_dtype:
        dx = dx.to(x_dtype)
    return (
        dx if needs.x else None,
        dresidual if needs.residual else None,
        _shaped(dweight, saved.weight) if needs.weight else None,
        _shaped(dbias, saved.bias) if needs.bias else None,
    )


def _shaped(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The gradient [span] in the parameter's shape. A view costs microseconds, so only where it changes something."""
    if gradient is None or parameter is None or parameter.dim() == 1:
        return gradient
    return gradient.view(parameter.shape)


def composes(saved: Saved, dy: Tensor, dtotal: Tensor | None) -> bool:
    """Whether torch's composition has to find the gradients: they are to be differentiated again (create_graph), they
    come in batches (vmap, is_grads_batched), or forward was traced for inference and kept no statistics."""
    if is_grad_enabled() or fallback.transformed() or (saved.x is not None and saved.rstd is None):
        return True
    if torch.compiler.is_compiling():  # a compiler cannot ask, and has no batches
        return False
    return is_batched(dy) or is_batched(dtotal)


def is_batched(gradient: Tensor | None) -> bool:
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def _launched(
    saved: Saved, dy: Tensor, dtotal: Tensor | None, norm: Norm, needs: Needs, backward: Backward
) -> Gradients:
    """By kernel."""
    wanted = wanted_of_kernels(saved, dy, norm, needs)
    if not any(wanted):
        return Gradients(None, None, None, None)
    x, residual, weight, bias, mean, rstd, bits, _ = saved
    return backward(dy, dtotal, x, residual, bits, weight, bias, mean, rstd, norm, wanted)


def wanted_of_kernels(saved: Saved, dy: Tensor, norm: Norm | SwitchNorm, needs: Needs) -> Wanted:
    """Without an activation dresidual is dy; where the residual was added first it is dx, if of one type and nothing
    was dropped."""
    if norm.add_first and norm.seed is not None:
        return Wanted(needs.x, needs.residual, needs.weight, needs.bias)
    if norm.add_first:
        one_type = saved.x is None or saved.x.dtype == dy.dtype
        return Wanted(
            needs.x or (one_type and needs.residual), needs.residual and not one_type, needs.weight, needs.bias
        )
    return Wanted(needs.x, needs.residual and norm.activation is not None, needs.weight, needs.bias)


@torch.enable_grad()
def _composed(saved: Saved, dy: Tensor, dtotal: Tensor | None, norm: Norm, create_graph: bool) -> Gradients:
    """By torch's own differentiable composition, so that with create_graph they can be differentiated again."""
    # Views of their own, so that a tensor passed in two places gets a gradient for each.
    x, residual = (None if tensor is None else tensor.view_as(tensor) for tensor in (saved.x, saved.residual))
    weight, bias = (None if tensor is None else tensor.reshape(-1) for tensor in (saved.weight, saved.bias))
    dz = dy
    if saved.bits is not None:
        dz = through_mask(saved.bits, norm, dy)
    dx = dresidual = dweight = dbias = None
    if x is None:
        dbias = _summed_to_parameter(dz, norm) if bias is not None else None
        if saved.rstd is not None:  # frozen, so that dx does not depend on x
            dx = channel_fallback.by_statistics(
                dz.to(saved.rstd.dtype), torch.zeros_like(saved.rstd), saved.rstd, weight, None
            )
    else:
        z = _differentiable_norm(x, weight, bias, saved, norm)
        if residual is not None:
            z = z + residual
        if saved.bits is None and norm.activation is not None:
            z = fallback.activate(z, Activation.from_scalars(norm.activation, norm.alpha, norm.beta))
        inputs = [tensor for tensor in (x, residual, weight, bias) if tensor is not None and tensor.requires_grad]
        found = dict(
            zip(map(id, inputs), torch.autograd.grad(z, inputs, dz.to(z.dtype), create_graph=create_graph), strict=True)
        )
        dx, dresidual, dweight, dbias = (found.get(id(tensor)) for tensor in (x, residual, weight, bias))
    return Gradients(*composed_ends(dx, dresidual, dz, dtotal, saved, norm), dweight, dbias)


def composed_ends(
    dx: Tensor | None,
    dresidual: Tensor | None,
    dz: Tensor,
    dtotal: Tensor | None,
    saved: Saved,
    norm: Norm | SwitchNorm,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dresidual) of a composition, given the gradients of what was normalized and of a residual added after."""
    if dx is not None and dtotal is not None:
        dx = dx + dtotal.to(dx.dtype)
    if saved.bits is not None:
        dresidual = dz
    if dx is not None and norm.seed is not None:
        dx, dresidual = dropped(dx, norm), dx
    return dx, dresidual


def _differentiable_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, saved: Saved, norm: Norm) -> Tensor:
    if isinstance(norm, RowNorm):
        rows = x.reshape(-1, norm.span) if x.numel() else x.reshape(0, norm.span)
        return fallback.differentiable_norm(rows, weight, bias, norm.eps, norm.subtract_mean).view(x.shape)
    if is_frozen(norm):
        assert saved.mean is not None and saved.rstd is not None
        return channel_fallback.by_statistics(x.to(saved.rstd.dtype), saved.mean, saved.rstd, weight, bias)
    if isinstance(norm, BatchNorm):
        of_channels = x.transpose(0, 1)
        y = fallback.differentiable_norm(of_channels.flatten(1), None, None, norm.eps, True)
        y = y.view(of_channels.shape).transpose(0, 1)
    else:
        grouped = x.reshape(x.shape[0], norm.groups, -1) if x.numel() else x.reshape(0, norm.groups, 1)
        y = fallback.differentiable_norm(grouped, None, None, norm.eps, True).view(x.shape)
    weight, bias = (None if t is None else t.to(y.dtype).view(-1, *(1,) * (x.dim() - 2)) for t in (weight, bias))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _summed_to_parameter(dz: Tensor, norm: Norm) -> Tensor:
    if isinstance(norm, RowNorm):
        return dz.reshape(dz.numel() // max(1, norm.span), norm.span).sum(0)
    return dz.sum(fallback.but_channels(dz))


def through_mask(bits: Tensor, norm: Norm | SwitchNorm, dy: Tensor) -> Tensor:
    """dy times the slope that a bit of each element tells."""
    return torch.where(_unpack(bits, norm, dy.shape), dy, dy * norm.alpha if norm.alpha else 0.0)


def _unpack(bits: Tensor, norm: Norm | SwitchNorm, shape: Sequence[int]) -> Tensor:
    """The mask of a tensor of this shape as booleans, from the bytes of each of its runs, lowest bit first."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flags = ((bits.unsqueeze(-1) >> places) & 1).flatten(1).bool()
    if isinstance(norm, RowNorm):
        return flags[:, : norm.span].reshape(shape)
    samples, channels, *positions = shape
    if isinstance(norm, BatchNorm) and not norm.channels_last:
        return flags[:, : pooled_planes(shape, False).runs[1]].reshape(shape)
    if norm.channels_last:
        return flags[:, :channels].reshape(samples, *positions, channels).movedim(-1, 1)
    return flags[:, : math.prod(positions)].reshape(shape)
