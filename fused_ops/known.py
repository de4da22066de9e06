"""Calls that came before: what was checked and decided for one is kept, by all that it depended on.

Checks and decisions are the greater part of what a small call costs, and are the same each time. Nothing is kept, and
nothing found again, while somebody compiles, traces or transforms the operations: he wants to see them made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
) -> tuple[Key | None, Call | None]:
    """What the call is known by, None if it cannot be, and what `remember` was told of one like it.

    inner: of the first two tensors, x and a residual, only so many of the last dims matter, and not how often they are
    there: these are rows.
    """
    if watched():
        return None, None
    seen: Iterable[Any] = map(signature, tensors)
    try:
        if inner:
            x, residual, *others = tensors
            seen = (_rows(x, inner), _rows(residual, inner), _are_alike(x, residual), *map(signature, others))
        key = (function, options, backend.get_backend(), is_grad_enabled(), is_autocast_enabled("cuda"), *seen)
        return key, _calls.get(key)
    except TypeError:  # no tensor, or an option or a size that cannot be told again
        return None, None


def signature(tensor: Tensor | None) -> Key | None:
    """All of a tensor that a decision may depend on; TypeError for what is no plain tensor."""
    return None if tensor is None else (*_facts(tensor), tensor.shape, tensor.stride())


def gradient_signature(tensor: Tensor | None) -> Key | None:
    """`signature` of a tensor whose shape is known."""
    return None if tensor is None else (*_facts(tensor), layout(tensor))


def layout(tensor: Tensor) -> Any:
    """How elements lie beside each other: without gaps in their order, or as these sizes and strides tell."""
    return tensor.is_contiguous() or (tensor.shape, tensor.stride())


def _rows(tensor: Tensor | None, inner: int) -> Key | None:
    if tensor is None:
        return None
    return *_facts(tensor), tensor.shape[-inner:], tensor.numel() > 0, layout(tensor)


def _are_alike(x: Tensor | None, residual: Tensor | None) -> bool:
    return residual is None or (x is not None and residual.shape == x.shape)


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    """To be asked first: what is no tensor has nothing else."""
    if type(tensor) not in PLAIN or _wrapped(tensor):  # what has left a transform wears its wrapper
        raise TypeError
    return tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_neg()


def remember(key: Key | None, call: Call) -> Call:
    """The call itself, kept for those of the same key."""
    if key is not None:
        if len(_calls) >= MOST:
            forget()
        _calls[key] = call
    return call


def forget() -> None:
    """Decides anew from now on, as whoever has changed what decisions follow from may want."""
    _calls.clear()
