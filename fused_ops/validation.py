"""Every check of the arguments and its message: the invariant, what came, what to do. Nothing has been touched yet."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

Tensor = torch.Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)


class ArgumentError(ValueError, RuntimeError):
    """An argument that the call cannot take: a ValueError, and a RuntimeError because torch raises that for most."""


class DtypeError(ArgumentError, NotImplementedError, TypeError):
    """A tensor of a type that the call cannot take; torch raises NotImplementedError for these."""


def floating(function: str, argument: str, tensor: Tensor) -> None:
    """Requires a tensor of one of the four floating types."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {argument} must be a torch.Tensor, but is {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise DtypeError(
            f"{function}: {argument} must have one of the types {names}, but has {tensor.dtype}; cast it first"
        )


def _sizes(function: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """normalized_shape as a tuple of Python's own integers (or torch's symbolic ones)."""
    # A tuple is told first: an abstract class takes long to ask.
    is_sequence = isinstance(normalized_shape, (tuple, Sequence))
    sizes: Sequence[Any] = normalized_shape if is_sequence else (normalized_shape,)  # type: ignore[assignment]
    try:
        return tuple([size if isinstance(size, int | torch.SymInt) else operator.index(size) for size in sizes])  # type: ignore[misc]
    except TypeError:
        raise TypeError(
            f"{function}: normalized_shape must be an integer or a sequence of integers, but is {normalized_shape!r}"
        ) from None


def row_span(function: str, x: Tensor, normalized_shape: int | Sequence[int]) -> tuple[tuple[int, ...], int]:
    """(normalized_shape as a tuple, its number of elements); it must be the last dims of x."""
    floating(function, "input", x)
    shape = _sizes(function, normalized_shape)
    if not shape:
        raise ArgumentError(f"{function}: normalized_shape must name at least one dim, but is {normalized_shape!r}")
    if x.shape[-len(shape) :] != shape:
        raise ArgumentError(
            f"{function}: normalized_shape must be the last dims of the input, but it is {shape} and the input has "
            f"shape {tuple(x.shape)}"
        )
    return shape, math.prod(shape)


def parameter(function: str, argument: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """A weight or bias, if given, has the given shape and lies on x's device."""
    if tensor is None:
        return
    floating(function, argument, tensor)
    if tensor.shape != shape:
        raise ArgumentError(f"{function}: {argument} must have shape {shape}, but has shape {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ArgumentError(
            f"{function}: {argument} must lie on the input's device {x.device}, but lies on {tensor.device}; move one"
        )


def residual(function: str, tensor: Tensor | None, x: Tensor, *, may_be_float32: bool = False) -> None:
    """A residual, if given, matches x in shape, device and type; where it may be float32, half x takes that too."""
    if tensor is None:
        return
    floating(function, "residual", tensor)
    if tensor.shape != x.shape:
        raise ArgumentError(
            f"{function}: residual must have the input's shape {tuple(x.shape)} and does not broadcast, but has shape "
            f"{tuple(tensor.shape)}; expand it first"
        )
    if tensor.device != x.device:
        raise ArgumentError(
            f"{function}: residual must lie on the input's device {x.device}, but lies on {tensor.device}; move one"
        )
    if tensor.dtype != x.dtype and not (may_be_float32 and tensor.dtype == torch.float32 and x.dtype in HALF):
        allowed = f"{x.dtype} or torch.float32" if may_be_float32 and x.dtype in HALF else f"{x.dtype}"
        raise ArgumentError(f"{function}: residual must have type {allowed}, but has {tensor.dtype}; cast one of them")


def dropout(function: str, dropout_p: float) -> None:
    """A drop rate lies in [0, 1]; above 0 it is not built yet."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(f"{function}: dropout_p must lie between 0 and 1, but is {dropout_p}")
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"{function}: dropout_p={dropout_p} is not built yet; pass 0 and apply torch.nn.functional.dropout to x"
        )
