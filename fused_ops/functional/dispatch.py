"""How a call runs: the kernels, eagerly or as an op, or the composition in `fallback`. Its arguments are validated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import backend, fallback, residual_fallback, validation
from ..activation import Activation
from ..fallback import of_type
from ..known import Call

if backend.HAS_TRITON:
    from .. import drops, ops, planned
    from ..kernels.problem import Norm

Tensor = torch.Tensor


def _autocasts(x: Tensor) -> bool:
    """Whether torch's autocast would run this norm in float32: on a GPU it does, on a CPU it leaves norms alone."""
    return x.is_cuda and x.dtype in validation.HALF and torch.is_autocast_enabled("cuda")


# What a tracer puts in a tensor's place.
_TRACEABLE = fallback.PLAIN | {torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor}


def _kernels(x: Tensor, *others: Tensor | None) -> Callable[..., Call] | None:
    """What plans how kernels run this call: eagerly, or as an op; None for the torch composition."""
    if not backend.chooses_triton(x):
        return None
    # A transform, traced or not, cannot look into an op or a Function, nor a kernel into what has left a transform, and
    # to torch.jit.trace the sizes of a shape are tensors.
    if fallback.transformed() or fallback.recorded() or fallback.left_a_transform(x, *others):
        return None
    kinds = {type(x), *map(type, others)}
    if not kinds <= fallback.PLAIN and not kinds <= _TRACEABLE:
        return None  # a tensor subclass of somebody's own knows torch's functions, not ours
    return ops.plan if backend.traced(x) else planned.plan


def _plan_kernels(
    plan: Callable[..., Call],
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    *running: Tensor | None,
) -> Call:
    """How kernels run a norm that has no seed, as a function of the tensors: each call draws one where it drops."""
    call = plan(x, residual, weight, bias, norm, *running)
    if norm.dropout_p == 0.0:
        return functools.partial(call, None)
    return lambda x, *others: call(drops.draw_seed(x.device), x, *others)


def _fused(activation: Activation | None, dropout_p: float = 0.0) -> tuple[Any, ...]:
    """The last fields of a norm that kernels compute, as far as they differ from what they are by default: the
    activation with its parameters, the rate of dropout."""
    if dropout_p == 0.0:
        return () if activation is None else (activation.name, *activation.scalars)
    name, scalars = (None, (0.0, 0.0)) if activation is None else (activation.name, activation.scalars)
    return name, *scalars, dropout_p


def _plan_autocast(plan: Callable[..., Call], add_first: bool, dropout_p: float) -> Call:
    """A norm as torch's autocast runs it: in float32, planned for x, a residual that is added afterwards, weight and
    bias. A residual that is added first is added in the tensors' own type, so that y and total are of two types."""
    norm = fallback.at_first(plan)

    def run(x: Tensor, residual: Any, weight: Tensor | None, bias: Tensor | None) -> Any:
        if not add_first:
            return norm(x.float(), None if residual is None else residual.float(), weight, bias)
        total = residual_fallback.dropout(x, residual, dropout_p) + residual
        return norm(total.float(), None, weight, bias), total

    return run


def _plan_composed(
    normalize: Callable[..., Tensor], add_first: bool, activation: Activation | None, dropout_p: float
) -> Call:
    """The composition around a norm that keeps its argument's layout, for calls that are alike: a function of x, the
    residual and what else the norm takes."""
    finish: Callable[..., Tensor] | None = None

    def run(x: Tensor, residual: Any, *others: Any) -> Any:
        nonlocal finish
        if add_first:
            # x in front, so that the total has its layout
            total = residual_fallback.dropout(x, residual, dropout_p) + residual
            y, residual = of_type(normalize(total, *others), x.dtype), None
        else:
            y = normalize(x, *others)
        if residual is not None or activation is not None:
            if finish is None:  # decided by the first y for all, which are like it
                finish = fallback.plan_finish(y, residual, activation)
            y = finish(y, residual)
        return (y, total) if add_first else y

    return run
