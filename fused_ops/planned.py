"""A norm's calls as kernels run them, under autograd or without: planned once for tensors that lie in one way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import is_grad_enabled

from . import backend, fallback, known
from .autograd import (
    Needs,
    Saved,
    as_needed,
    composes,
    gradients,
    is_batched,
    wanted_of_kernels,
    what_to_save,
    without_seed,
)
from .drops import placeholder
from .kernels.families import family_of
from .kernels.problem import Gradients, Norm
from .recent import Decisions

Tensor = torch.Tensor

_what_to_save = functools.lru_cache(maxsize=4096)(what_to_save)  # a tracer would look through the cache, and warn


_Backward = Callable[[Saved, Tensor, Tensor | None], tuple[Tensor | None, ...]]

MOST_BACKWARDS = 64  # that a plan keeps


class Plan:
    """How calls on tensors that lie in one way run by kernels: forward as a function of them, backward as one for each
    way in which gradients come."""

    __slots__ = ("_backwards", "forward", "norm", "saving", "x_dtype")

    def __init__(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Norm,
        needs: Needs,
        *running: Tensor | None,
    ) -> None:
        self.norm, self.x_dtype = without_seed(norm), x.dtype
        self.saving = saving = _what_to_save(self.norm, needs, residual is not None)
        self.forward = family_of(norm).plan_forward(
            x, residual, weight, bias, norm, saving.statistics, saving.bits, *running
        )
        self._backwards = Decisions(MOST_BACKWARDS)

    def backward(
        self, saved: Saved, dy: Tensor | None, dtotal: Tensor | None, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each argument of `NormFunction`, where needed."""
        if dy is None or is_grad_enabled() or known.watched():
            return self._run_once(saved, dy, dtotal, needed)
        tensors = dy, dtotal, *saved
        near = needed, dy.shape, *map(type, tensors)
        run = self._backwards.recall(near, tensors)
        if run is None:
            if is_batched(dy) or is_batched(dtotal) or not {*near[2:]} <= fallback.PLAIN:
                return self._run_once(saved, dy, dtotal, needed)
            key = needed, known.gradient_signature(dy), known.gradient_signature(dtotal), *map(_unpacked, saved)
            run = self._backwards.decide(near, tensors, key, lambda: self._plan(saved, dy, dtotal, needed))
        return run(saved, dy, dtotal)

    def _run_once(
        self, saved: Saved, dy: Tensor | None, dtotal: Tensor | None, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """What is not kept: somebody looks into it or differentiates again, or a tensor is none of torch's own kind."""
        if dy is None or backend.traced(dy) or composes(saved, dy, dtotal):
            from . import ops  # a tracer may look at a backward whose forward it has not seen

            norm, needs = saved.of_call(self.norm), Needs(*needed[2:6])
            found = gradients(saved, dy, dtotal, norm, self.x_dtype, needs, ops.backward)
            return None, None, *found, *[None] * (len(needed) - 6)
        return self._plan(saved, dy, dtotal, needed)(saved, dy, dtotal)

    def _plan(self, saved: Saved, dy: Tensor, dtotal: Tensor | None, needed: tuple[bool, ...]) -> _Backward:
        """By kernel: a function of what was saved and both gradients."""
        norm, x_dtype, needs = self.norm, self.x_dtype, Needs(*needed[2:6])
        nothing_else = (None,) * (len(needed) - 6)  # of the running statistics and the momentum
        of_call = saved.of_call(norm)
        wanted = wanted_of_kernels(saved, dy, of_call, needs)
        launch = None
        if any(wanted):
            x, residual, weight, bias, mean, rstd, bits, _ = saved
            launch = family_of(norm).plan_backward(
                dy, dtotal, x, residual, bits, weight, bias, mean, rstd, of_call, wanted
            )

        def run(saved: Saved, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
            found = _NO_GRADIENTS
            if launch is not None:
                x, residual, weight, bias, mean, rstd, bits, seed = saved
                found = launch(seed, dy, dtotal, x, residual, bits, weight, bias, mean, rstd)
            return None, None, *as_needed(found, dy, saved, norm, x_dtype, needs), *nothing_else

        return run


def _unpacked(saved: Tensor | None) -> Any:
    """What may have changed of a saved tensor, which comes back from whoever packed it."""
    return None if saved is None else (type(saved), saved.dtype, saved.is_neg(), known.layout(saved))


_NO_GRADIENTS = Gradients(None, None, None, None)


class NormFunction(torch.autograd.Function):
    """A norm under autograd, straight to the launchers: y, or (y, total) where the residual is added first."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        seed: Tensor | None,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *running: Any,
    ) -> Any:
        y, total, mean, rstd, bits = plan.forward(seed, x, residual, weight, bias, *running)
        keeps_x, _, _, keeps_residual = plan.saving
        normalized = None if not keeps_x else x if total is None else total
        # In the order of Saved.
        residual = residual if keeps_residual else None
        ctx.save_for_backward(normalized, residual, weight, bias, mean, rstd, bits, seed)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        if total is None:
            return y
        if True not in ctx.needs_input_grad[2:4]:
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return ctx.plan.backward(Saved(*ctx.saved_tensors), dy, dtotal, ctx.needs_input_grad)


_apply = fallback.apply_of(NormFunction)  # no kernel runs under a transform (functional.dispatch)


def plan(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    *running: Tensor | None,
) -> Callable[..., Any]:
    """How calls on tensors that lie, and learn, as these do run: y, or (y, total) where the residual is added first,
    as a function of the seed of what is dropped, if any, the four tensors and, of batch norm, both running statistics
    and the momentum. Through autograd only where something requires it."""
    if norm.dropout_p > 0.0:
        norm = norm._replace(seed=placeholder(x.device))
    if is_grad_enabled():
        needs = Needs(*[tensor is not None and tensor.requires_grad for tensor in (x, residual, weight, bias)])
        if any(needs):
            return functools.partial(_apply, Plan(x, residual, weight, bias, norm, needs, *running))
    forward = family_of(norm).plan_forward(x, residual, weight, bias, norm, False, False, *running)

    def infer(*seed_and_tensors: Tensor | None) -> Any:
        y, total, _, _, _ = forward(*seed_and_tensors)
        return y if total is None else (y, total)

    return infer
