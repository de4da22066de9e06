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


def _kernel(x: Tensor, *others: Tensor | None):  # type: ignore[no-untyped-def]
    """What runs the kernels for this call: eagerly, as an op, or None for the torch composition."""
    if not backend.chooses_triton(x):
        return None
    # A transform, traced or not, cannot look into an op or a Function, nor a kernel into what has left a transform, and
    # to torch.jit.trace the sizes of a shape are tensors.
    if fallback.transformed() or fallback.recorded() or fallback.left_a_transform(x, *others):
        return None
    kinds = {type(x), *map(type, others)}
    if not kinds <= fallback.PLAIN and not kinds <= _TRACEABLE:
        return None  # a tensor subclass of somebody's own knows torch's functions, not ours
    return ops.run if backend.traced(x) else planned.run


def _plan_kernels(
    run: Any,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    dropout_p: float,
    *running: Tensor | None,
) -> Call:
    """How kernels run a norm that is given without its dropout, as a function of the tensors; `run` is `_kernel`'s."""
    if run is not planned.run:
        if dropout_p > 0.0:
            norm = norm._replace(dropout_p=dropout_p, seed=drops.draw_seed(x.device))
        return lambda x, residual, weight, bias, *running: run(x, residual, weight, bias, norm, *running)
    if dropout_p == 0.0:
        return functools.partial(planned.plan(x, residual, weight, bias, norm, *running), None)
    # Each call draws a seed of its own; a plan depends on there being one.
    norm = norm._replace(dropout_p=dropout_p, seed=torch.empty(1, dtype=torch.int64, device=x.device))
    call = planned.plan(x, residual, weight, bias, norm, *running)
    return lambda x, *others: call(drops.draw_seed(x.device), x, *others)


def _activated(activation: Activation | None) -> tuple[Any, ...]:
    """The fields of a norm that kernels compute which its activation sets."""
    return () if activation is None else (activation.name, *activation.scalars)


def _fused(activation: Activation | None, dropout_p: float, x: Tensor) -> tuple[Any, ...]:
    """`_activated`, and the rate and the seed of dropout."""
    if dropout_p == 0.0:
        return _activated(activation)
    return *(_activated(activation) or (None, 0.0, 0.0)), dropout_p, drops.draw_seed(x.device)


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
