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


def sizes(function: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """normalized_shape as a tuple of Python's own integers (or torch's symbolic ones)."""
    if type(normalized_shape) is tuple and {*map(type, normalized_shape)} == _INTEGERS:  # as modules pass it
        return normalized_shape
    is_sequence = isinstance(normalized_shape, (tuple, Sequence))  # an abstract class takes long to ask
    given: Sequence[Any] = normalized_shape if is_sequence else (normalized_shape,)  # type: ignore[assignment]
    if not len(given):
        raise ArgumentError(f"{function}: normalized_shape must name at least one dim, but is {normalized_shape!r}")
    try:
        return tuple([size if isinstance(size, int | torch.SymInt) else operator.index(size) for size in given])  # type: ignore[misc]
    except TypeError:
        raise TypeError(
            f"{function}: normalized_shape must be an integer or a sequence of integers, but is {normalized_shape!r}"
        ) from None


_INTEGERS = {int}


def row_span(function: str, x: Tensor, shape: tuple[int, ...]) -> int:
    """The number of elements of a row: its normalized_shape must be the last dims of x."""
    floating(function, "input", x)
    if x.shape[-len(shape) :] != shape:
        raise ArgumentError(
            f"{function}: normalized_shape must be the last dims of the input, but it is {shape} and the input has "
            f"shape {tuple(x.shape)}"
        )
    return math.prod(shape)


def channels(function: str, x: Tensor) -> int:
    """The number of channels of x, which must have shape (N, C, *)."""
    floating(function, "input", x)
    if x.dim() < 2:
        raise ArgumentError(
            f"{function}: the input must have shape (N, C, *), at least 2 dims, but has shape {tuple(x.shape)}; "
            "unsqueeze it first"
        )
    return x.shape[1]


def num_groups(function: str, groups: Any) -> int:
    """A number of groups is a positive integer."""
    if not isinstance(groups, int | torch.SymInt):
        try:
            groups = operator.index(groups)
        except TypeError:
            raise TypeError(f"{function}: num_groups must be an integer, but is {groups!r}") from None
    if groups < 1:
        raise ArgumentError(f"{function}: num_groups must be at least 1, but is {groups}; 1 is all channels together")
    return groups


def groups(function: str, x: Tensor, groups: int) -> int:
    """x has shape (N, C, *), and its channels fall into groups of one size; a lone value has no deviation."""
    count = channels(function, x)
    groups = num_groups(function, groups)
    if count % groups:
        raise ArgumentError(
            f"{function}: num_groups must divide the number of channels, but is {groups} and the input has {count} "
            f"channels (shape {tuple(x.shape)}); pass a divisor of {count}"
        )
    if x.numel() == groups:  # as torch, which lets a group of one value pass in a larger batch
        raise ArgumentError(
            f"{function}: a batch of one needs more than one value in a group, but num_groups is {groups} and the "
            f"input has shape {tuple(x.shape)}; pass fewer groups or a larger input"
        )
    return groups


def planes(
    function: str, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, use_input_stats: bool
) -> int:
    """The number of channels of x: its planes (n, c) have statistics of their own, or running ones are given."""
    count = channels(function, x)
    if use_input_stats and math.prod(x.shape[2:]) == 1:
        raise ArgumentError(
            f"{function}: statistics from the input need more than one spatial element, but the input has shape "
            f"{tuple(x.shape)}; pass a larger input, or use_input_stats=False and running statistics (of a module, "
            "track_running_stats=True and eval())"
        )
    running_statistics(function, x, running_mean, running_var, "use_input_stats", use_input_stats)
    return count


def batch(function: str, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> int:
    """The number of channels of x: each has statistics over the whole batch, or running ones are given."""
    count = channels(function, x)
    if training and x.shape[0] * math.prod(x.shape[2:]) == 1:
        raise ArgumentError(
            f"{function}: expected more than 1 value per channel when training, but the input has shape "
            f"{tuple(x.shape)}; pass a larger batch, or training=False and running statistics (of a module, eval())"
        )
    running_statistics(function, x, running_mean, running_var, "training", training)
    return count


def running_statistics(
    function: str, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, flag: str, follow: bool
) -> None:
    """Both or neither, and both where they do not `follow` the input's statistics, as the argument `flag` says."""
    if not follow and (running_mean is None or running_var is None):
        raise ArgumentError(
            f"{function}: {flag}={follow} needs running_mean and running_var, but "
            f"{'running_mean' if running_mean is None else 'running_var'} is None; pass both, or {flag}=True"
        )
    if (running_mean is None) != (running_var is None):
        raise ArgumentError(
            f"{function}: running_mean and running_var go together, but one is None; pass both or neither"
        )
    count = x.shape[1]
    for argument, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        parameter(function, argument, tensor, (count,), x)
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(f"{function}: {argument} must not require a gradient, but does; detach it")
        if tensor is not None and follow and count > 1 and tensor.stride(0) == 0:
            raise ArgumentError(
                f"{function}: {argument} must have an element of its own for each channel, but is expanded; clone it"
            )


def epsilon(function: str, eps: Any, training: bool) -> float:
    """eps as a float as torch's batch_norm takes it: not negative, and positive in training."""
    value = number(function, "eps", eps)
    if value < 0 or (training and value == 0):
        raise ArgumentError(
            f"{function}: eps must be {'positive in training' if training else 'at least 0'}, but is {value}"
        )
    return value


def mixture(function: str, x: Tensor, mean_weight: Tensor, var_weight: Tensor) -> None:
    """An entry for each kind of statistics; without positions an instance is one value, and no kind of its own."""
    kinds = ("Instance", "Layer", "Batch")[-3 if x.dim() > 2 else -2 :]
    fix = "pass one number for each"
    for argument, tensor in (("mean_weight", mean_weight), ("var_weight", var_weight)):
        floating(function, argument, tensor)
        if tensor.shape != (len(kinds),):
            if len(kinds) == 2 and tensor.shape == (3,):
                fix = "pass its last two"
            raise ArgumentError(
                f"{function}: {argument} must have shape {(len(kinds),)} ({', '.join(kinds)}) for an input of shape "
                f"{tuple(x.shape)}, but has shape {tuple(tensor.shape)}; {fix}"
            )
        parameter(function, argument, tensor, (len(kinds),), x)


def number(function: str, argument: str, value: Any) -> float:
    """value as a float; TypeError where it is no number, text that reads as one included, and ArgumentError where it
    cannot become a float, as a tensor of several numbers."""
    if type(value) is float:
        return value
    try:
        return float(None if isinstance(value, str | bytes) else value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{function}: {argument} must be a number, but is {value!r}") from None
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentError(f"{function}: {argument} must be one number, but is {value!r}") from error


def filters(function: str, weight: Tensor) -> None:
    """A weight of a convolution or a linear map: its first dim are the filters, each with at least one more."""
    floating(function, "weight", weight)
    if weight.dim() < 2:
        raise ArgumentError(
            f"{function}: weight must have shape (filters, *), at least 2 dims, but has shape {tuple(weight.shape)}"
        )


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


def like_input(function: str, tensor: Tensor | None, x: Tensor, *, may_be_float32: bool = False) -> None:
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


def operands(
    function: str,
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    added_first: bool = False,
) -> None:
    """Weight and bias of one shape, if given, and the residual, which must be given where it is added first."""
    parameter(function, "weight", weight, shape, x)
    parameter(function, "bias", bias, shape, x)
    if added_first and residual is None:
        raise ArgumentError(f"{function}: residual must be a tensor, but is None")
    like_input(function, residual, x, may_be_float32=added_first)


def rate(function: str, argument: str, value: Any) -> float:
    """A drop rate as a float: a number in [0, 1]."""
    p = number(function, argument, value)
    if not 0.0 <= p <= 1.0:
        raise ArgumentError(f"{function}: {argument} must lie between 0 and 1, but is {p}")
    return p


def shape_and_value(function: str, argument: str, given: Any) -> tuple[tuple[int, ...], float]:
    """(shape, initial value) of a parameter; the shape may be one integer."""
    try:
        shape, value = given
    except (TypeError, ValueError):
        raise ArgumentError(f"{function}: {argument} must be (shape, initial value), but is {given!r}") from None
    found = shape if isinstance(shape, tuple | list | torch.Size) else (shape,)
    try:
        sizes = tuple([operator.index(size) for size in found])
    except TypeError:
        raise TypeError(
            f"{function}: the shape of {argument} must be an integer or a sequence of integers, but is {shape!r}"
        ) from None
    if any(size < 0 for size in sizes) or any(isinstance(size, bool) for size in found):
        raise ArgumentError(
            f"{function}: the shape of {argument} must be of integers that are at least 0, but is {shape!r}"
        )
    return sizes, number(function, f"the initial value of {argument}", value)


def broadcasts(function: str, argument: str, tensor: Tensor | None, x: Tensor) -> None:
    """A factor, if given, broadcasts to x's shape and lies on its device."""
    if tensor is None:
        return
    floating(function, argument, tensor)
    pairs = zip(reversed(tensor.shape), reversed(x.shape), strict=False)
    if tensor.dim() > x.dim() or any(size not in (1, of_x) for size, of_x in pairs):
        raise ArgumentError(
            f"{function}: {argument} must broadcast to the input's shape {tuple(x.shape)}, but has shape "
            f"{tuple(tensor.shape)}; one number for each channel has shape (C,) where channels are the last dim, "
            "(C, 1, 1) in an image"
        )
    if tensor.device != x.device:
        raise ArgumentError(
            f"{function}: {argument} must lie on the input's device {x.device}, but lies on {tensor.device}; move one"
        )


def samples(function: str, drop_path_p: float, x: Tensor) -> None:
    """Drop-path drops samples, of which x has some."""
    if drop_path_p > 0.0 and x.dim() == 0:
        raise ArgumentError(
            f"{function}: drop_path_p={drop_path_p} drops samples, the first dim of the input, but it has no dims; "
            "pass 0 or unsqueeze it"
        )


def dropout(function: str, dropout_p: Any, training: bool) -> float:
    """The drop rate of a call, a number in [0, 1]: 0 unless training."""
    p = rate(function, "dropout_p", dropout_p)
    return p if training else 0.0
