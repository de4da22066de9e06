"""torch.autograd for the residual stream: what is saved, which gradients are asked for, and second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import backend, fallback
from .activation import Activation
from .drops import drop_factor, placeholder
from .kernels.problem import ResidualAdd, compute_dtype, slope_takes_two_values
from .kernels.residual import (
    SumGradients,
    WantedOfSum,
    plan_forward,
    residual_add_backward,
    strides_of_sum,
    unpack_bits,
)

Tensor = torch.Tensor


class Needs(NamedTuple):
    """Which of the tensor arguments require a gradient."""

    x: bool
    residual: bool
    scale: bool


class Saving(NamedTuple):
    """What forward keeps for backward beside the seed."""

    x: bool
    residual: bool
    scale: bool
    bits: bool


def what_to_save(problem: ResidualAdd, needs: Needs) -> Saving:
    """Keeps only what a gradient that is asked for depends on: nothing at all for a bare sum."""
    needs_slope = problem.activation is not None and any(needs)
    bits = needs_slope and slope_takes_two_values(problem.activation)
    computes_z = needs_slope and not bits
    return Saving(computes_z or needs.scale, computes_z, computes_z or needs.scale or needs.x, bits)


class Saved(NamedTuple):
    """What backward finds again."""

    x: Tensor | None
    residual: Tensor | None
    scale: Tensor | None
    bits: Tensor | None
    seed: Tensor | None


class SumFacts(NamedTuple):
    """What backward has to know of the result, of x and of the scale, if there is one, besides."""

    strides: Sequence[int]
    x_dtype: torch.dtype
    scale_shape: Sequence[int] | None


def facts_of(y_strides: Sequence[int], x: Tensor, scale: Tensor | None) -> SumFacts:
    return SumFacts(y_strides, x.dtype, None if scale is None else scale.shape)


class Plan:
    """How sums of tensors of these shapes, that lie and learn in one way, run by kernels under autograd."""

    __slots__ = ("facts", "forward", "hands_on", "problem", "saving")

    def __init__(
        self,
        x: Tensor,
        residual: Tensor,
        scale: Tensor | None,
        seed: Tensor | None,
        problem: ResidualAdd,
        needs: Needs,
    ) -> None:
        self.problem, self.saving = problem, what_to_save(problem, needs)
        self.forward = plan_forward(x, residual, scale, seed, problem, self.saving.bits)
        self.facts = facts_of(strides_of_sum(x), x, scale)
        # Backward has but to hand the gradient on.
        self.hands_on = scale is None and seed is None and problem.activation is None and x.dtype == residual.dtype


class ResidualAddFunction(torch.autograd.Function):
    """The residual stream under autograd, straight to the launchers."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, residual: Tensor, scale: Tensor | None, seed: Tensor | None) -> Tensor:
        y, bits = plan.forward(x, residual, scale, seed)
        ctx.plan = plan
        if not plan.hands_on:
            keeps_x, keeps_residual, keeps_scale, _ = plan.saving
            # In the order of Saved.
            ctx.save_for_backward(
                x if keeps_x else None, residual if keeps_residual else None, scale if keeps_scale else None, bits, seed
            )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, (_, *needed, _) = ctx.plan, ctx.needs_input_grad
        if plan.hands_on:
            return None, dy if needed[0] else None, dy if needed[1] else None, None, None
        run: Any = residual_add_backward
        if backend.traced(dy):  # as a backward may be whose forward was not
            from . import residual_ops

            run = residual_ops.backward
        saved = Saved(*ctx.saved_tensors)
        return None, *gradients(saved, dy, plan.problem, plan.facts, Needs(*needed), run), None


def gradients(
    saved: Saved, dy: Tensor, problem: ResidualAdd, facts: SumFacts, needs: Needs, backward: Any
) -> SumGradients:
    """Those that are needed, by `backward` or, for who differentiates again, by composition."""
    if torch.is_grad_enabled() or fallback.transformed() or _batched(dy):
        return _composed(saved, dy, problem, facts, needs, torch.is_grad_enabled())
    return _launched(saved, dy, problem, facts, needs, backward)


def _batched(dy: Tensor) -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dy)


def _scale_or_like(saved: Saved, dy: Tensor, facts: SumFacts) -> Tensor | None:
    """The scale; where its values were not kept, on which no gradient depends then, a tensor of its shape, by which
    kernels know how bits lie."""
    if saved.scale is None and facts.scale_shape is not None:
        return dy.new_empty(facts.scale_shape)
    return saved.scale


def _launched(
    saved: Saved, dy: Tensor, problem: ResidualAdd, facts: SumFacts, needs: Needs, backward: Any
) -> SumGradients:
    """By kernel, but for what is dy itself."""
    one_factor = facts.scale_shape is None and saved.seed is None
    dz_is_dy = problem.activation is None
    one_gradient = one_factor and facts.x_dtype == dy.dtype
    wanted = WantedOfSum(
        dx=needs.x and not (one_factor and dz_is_dy),
        # Where dx is the same, one tensor will do.
        dresidual=needs.residual and not dz_is_dy and not (one_gradient and needs.x),
        dscale=needs.scale,
    )
    found = SumGradients(None, None, None)
    if any(wanted):
        given = saved._replace(scale=_scale_or_like(saved, dy, facts))
        found = backward(dy, *given, problem, wanted, facts.strides, facts.x_dtype)
    if needs.x and not wanted.dx:
        found = found._replace(dx=dy.to(facts.x_dtype))
    if needs.residual and not wanted.dresidual:
        found = found._replace(dresidual=dy if dz_is_dy else found.dx)
    return found


@torch.enable_grad()
def _composed(
    saved: Saved, dy: Tensor, problem: ResidualAdd, facts: SumFacts, needs: Needs, create_graph: bool
) -> SumGradients:
    """By torch's own operations, so that with create_graph they can be differentiated again."""
    dtype = compute_dtype(facts.x_dtype)
    multiply = _Multiplier(saved, dy, problem, dtype)
    x = None if saved.x is None else saved.x.to(dtype)
    dz = dy.to(dtype)
    if saved.bits is not None:
        passes = unpack_bits(saved.bits, dy, facts.strides, _scale_or_like(saved, dy, facts), saved.seed)
        dz = torch.where(passes, dz, dz * problem.alpha if problem.alpha else 0.0)
    elif problem.activation is not None:
        assert x is not None and saved.residual is not None
        z = saved.residual.to(dtype) + multiply.by_all(x)
        z = z if z.requires_grad else z.detach().requires_grad_()
        y = fallback.activate(z, Activation.from_scalars(problem.activation, problem.alpha, problem.beta))
        (dz,) = torch.autograd.grad(y, z, dz, create_graph=create_graph)
    dscale = None
    if needs.scale:
        assert x is not None and saved.scale is not None
        dscale = (dz * multiply.by_factor(x)).sum_to_size(saved.scale.shape).to(saved.scale.dtype)
    return SumGradients(
        multiply.by_all(dz).to(facts.x_dtype) if needs.x else None, dz.to(dy.dtype) if needs.residual else None, dscale
    )


class _Multiplier:
    """What a call multiplies x by: what its seed drops, which is drawn again once somebody asks, and its scale."""

    def __init__(self, saved: Saved, dy: Tensor, problem: ResidualAdd, dtype: torch.dtype) -> None:
        self.scale = None if saved.scale is None else saved.scale.to(dtype)
        self.seed, self.drawn = saved.seed, (dy.shape, problem.dropout_p, problem.drop_path_p, dtype)

    @functools.cached_property
    def factor(self) -> Tensor | None:
        return None if self.seed is None else drop_factor(self.seed, *self.drawn)

    def by_factor(self, values: Tensor) -> Tensor:
        return values if self.factor is None else values * self.factor

    def by_all(self, values: Tensor) -> Tensor:
        values = self.by_factor(values)
        return values if self.scale is None else values * self.scale


_apply = fallback.apply_of(ResidualAddFunction)


def plan(x: Tensor, residual: Tensor, scale: Tensor | None, problem: ResidualAdd) -> Callable[..., Tensor]:
    """How sums of tensors of these shapes, that lie and learn as these do, run: y as a function of the three and the
    seed; through autograd only where something requires it."""
    seed = placeholder(x.device) if problem.dropout_p > 0.0 or problem.drop_path_p > 0.0 else None
    if torch.is_grad_enabled():
        needs = Needs(*[tensor is not None and tensor.requires_grad for tensor in (x, residual, scale)])
        if any(needs):
            return functools.partial(_apply, Plan(x, residual, scale, seed, problem, needs))
    forward = plan_forward(x, residual, scale, seed, problem, False)
    return lambda *tensors: forward(*tensors).y
