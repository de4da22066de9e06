"""Calls that came before: what was checked and decided for one is kept, by all that it depended on.

Checks and decisions are the greater part of what a small call costs, and are the same each time. Nothing is kept, and
nothing found again, while somebody compiles, traces or transforms the operations: he wants to see them made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import is_autocast_enabled, is_grad_enabled
from torch.autograd import forward_ad

from .backend import get_backend
from .fallback import PLAIN, intercepted
from .recent import Call as Call
from .recent import Decisions, Tensors

Tensor = torch.Tensor
Key = tuple[Any, ...]

_decisions = Decisions(most=4096)  # when shapes vary without end, all is forgotten now and then
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_tracing_state = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack  # a tracer, torch.export's among them, is one
_function_modes = torch._C._len_torch_function_stack


def watched() -> bool:
    """Whether somebody compiles, traces, transforms or intercepts the operations."""
    return (
        torch.compiler.is_dynamo_compiling()  # first: a compiler must not look at the others
        or _tracing_state() is not None
        or _transforms() is not None
        or forward_ad._current_level >= 0
        or _dispatch_modes() > 0
        or (_function_modes() > 0 and intercepted())
    )


def find(
    function: str, plan: Callable[..., Call], options: tuple[Any, ...], tensors: Tensors, *, inner: int = 0
) -> Call:
    """`plan(function, *tensors, *options)`, which checks and decides how such calls run: done now, or found again.

    inner: of the first two tensors, x and a residual, only so many of the last dims matter, and not how often they are
    there: these are rows.
    """
    if watched():
        return plan(function, *tensors, *options)
    state = get_backend(), is_grad_enabled(), is_autocast_enabled("cuda")
    types = tuple(map(type, tensors))
    near: Key | None
    try:
        near = function, options, state, types, tensors[0].shape
        call = _decisions.recall(near, tensors)
    except (AttributeError, TypeError):  # x is no tensor; an option or a size that cannot be told again
        near = call = None
    if call is not None:
        return call
    if near is None or not {*types} <= PLAIN:
        return plan(function, *tensors, *options)
    key = function, options, state, *(_of_rows(tensors, inner) if inner else map(signature, tensors))
    return _decisions.decide(near, tensors, key, lambda: plan(function, *tensors, *options))


def forget() -> None:
    """Decides anew from now on, as whoever has changed what decisions follow from may want."""
    _decisions.forget()


# Of each plain tensor, all that a decision may depend on.


def signature(tensor: Tensor | None) -> Key | None:
    """Of a tensor whatever it is."""
    return None if tensor is None else (*_traits(tensor), tensor.shape, tensor.stride())


def gradient_signature(tensor: Tensor | None) -> Key | None:
    """Of a tensor whose shape is known."""
    return None if tensor is None else (*_traits(tensor), layout(tensor))


def _of_rows(tensors: Tensors, inner: int) -> Key:
    """Of a call's tensors where the first two are rows, whose number may be any."""
    x, residual, *others = tensors
    alike = residual is None or residual.shape == x.shape
    return alike, _rows(x, inner), _rows(residual, inner), *map(signature, others)


def _rows(tensor: Tensor | None, inner: int) -> Key | None:
    return None if tensor is None else (*_traits(tensor), tensor.shape[-inner:], tensor.numel() > 0, layout(tensor))


def _traits(tensor: Tensor) -> Key:
    """What matters besides how it lies: one that torch negates as it reads, and one that has left a transform and still
    wears its wrapper, is not what lies in memory; one made in inference mode has no version."""
    return (
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        tensor.is_neg(),
        tensor.is_inference(),
        _wrapped(tensor),
    )


def layout(tensor: Tensor) -> Any:
    """How elements lie beside each other: without gaps in their order, or as these sizes and strides tell."""
    return tensor.is_contiguous() or (tensor.shape, tensor.stride())
