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

from . import backend
from .fallback import PLAIN

Tensor = torch.Tensor
Key = tuple[Any, ...]
Call = Callable[..., Any]

MOST = 4096  # calls; when shapes vary without end, all is forgotten now and then

_calls: dict[Key, Call] = {}
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_tracing_state = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


def watched() -> bool:
    """Whether somebody compiles, traces, transforms or intercepts the operations."""
    return (
        torch.compiler.is_compiling()  # first: a compiler must not look at the others
        or _tracing_state() is not None
        or _transforms() is not None
        or forward_ad._current_level >= 0
        or _dispatch_modes() > 0
        or _function_modes() > 0
    )


def recall(
    function: str, options: tuple[Any, ...], *tensors: Tensor | None, inner: int = 0
) -> tuple[tuple[Key, ...], Call | None]:
    """What `remember` was told of a call like this one; if nothing, the keys that this one would be known by, none if
    it cannot be.

    inner: of the first two tensors, x and a residual, only so many of the last dims matter, and not how often they are
    there: these are rows. Who has the same number of them again is known by it, which is quicker to tell.
    """
    if watched() or not {*map(type, tensors)} <= PLAIN:
        return (), None
    key = (function, options, *_state(), *map(signature, tensors))
    try:
        found = _calls.get(key)
    except TypeError:  # an option or a size that cannot be told again
        return (), None
    if found is not None or not inner:
        return (key,), found
    x, residual, *others = tensors
    alike = x is None or residual is None or residual.shape == x.shape
    of_rows = (function, options, *_state(), _rows(x, inner), _rows(residual, inner), alike, *map(signature, others))
    found = _calls.get(of_rows)
    return (key, of_rows), found if found is None else remember((key,), found)


def remember(keys: tuple[Key, ...], call: Call) -> Call:
    """The call itself, kept for those of the same keys."""
    if keys:  # none while a compiler looks, which would guard on all that is known
        if len(_calls) >= MOST:
            forget()
        _calls.update(dict.fromkeys(keys, call))
    return call


def forget() -> None:
    """Decides anew from now on, as whoever has changed what decisions follow from may want."""
    _calls.clear()


def _state() -> tuple[Any, ...]:
    return backend.get_backend(), is_grad_enabled(), is_autocast_enabled("cuda")


# Of each plain tensor, all that a decision may depend on. One that torch negates as it reads, and one that has left a
# transform and still wears its wrapper, is not what lies in memory.


def signature(tensor: Tensor | None) -> Key | None:
    """Of a tensor whatever it is."""
    return None if tensor is None else (
        tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_neg(), _wrapped(tensor),
        tensor.shape, tensor.stride(),
    )  # fmt: skip


def gradient_signature(tensor: Tensor | None) -> Key | None:
    """Of a tensor whose shape is known."""
    return None if tensor is None else (
        tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_neg(), _wrapped(tensor),
        layout(tensor),
    )  # fmt: skip


def _rows(tensor: Tensor | None, inner: int) -> Key | None:
    """Of rows, whose number may be any."""
    return None if tensor is None else (
        tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_neg(), _wrapped(tensor),
        tensor.shape[-inner:], tensor.numel() > 0, layout(tensor),
    )  # fmt: skip


def layout(tensor: Tensor) -> Any:
    """How elements lie beside each other: without gaps in their order, or as these sizes and strides tell."""
    return tensor.is_contiguous() or (tensor.shape, tensor.stride())
