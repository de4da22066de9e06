"""Tensor -> what a kernel sees: rows, samples of planes, or a matrix; every layout case ends here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

Tensors = tuple[torch.Tensor | None, ...]


class View(Protocol):
    """A way in which kernels see activations: runs of elements without gaps, rows or samples, a stride apart."""

    def stride(self, tensor: torch.Tensor) -> int | None:
        """Distance between the runs of a tensor that lies so; None of one that has to be copied."""

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy that lies so."""

    def dense_stride(self, tensor: torch.Tensor) -> int:
        """The stride of that copy."""


class Reading(NamedTuple):
    """How the tensors of calls are read: the strides of the activations, 0 of those that are absent, and what puts
    copies in the place of tensors that do not lie as kernels see them."""

    strides: list[int]
    read: Callable[[Tensors], Tensors]


def plan_reading(view: View, given: Tensors, activations: int) -> Reading:
    """The reading of tensors that lie as these do: `activations` of them by the view, the rest as `columns`."""
    strides = [0] * activations
    copied = []
    for index, tensor in enumerate(given[:activations]):
        if tensor is not None:
            stride = view.stride(tensor)
            if stride is None:
                copied.append(index)
                stride = view.dense_stride(tensor)
            strides[index] = stride
    lies = all(tensor is None or _is_column(tensor) for tensor in given[activations:])
    if lies and not copied:
        return Reading(strides, _as_they_lie)

    def read(given: Tensors) -> Tensors:
        tensors = list(given[:activations])
        for index in copied:
            tensors[index] = view.copied(tensors[index])  # type: ignore[arg-type]
        return *tensors, *map(columns, given[activations:])

    return Reading(strides, read)


def _as_they_lie(given: Tensors) -> Tensors:
    return given


def _is_column(parameter: torch.Tensor) -> bool:
    return parameter.is_contiguous() and not parameter.is_neg()


def columns(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A weight or bias as one contiguous run of its elements; None stays None."""
    return parameter if parameter is None or _is_column(parameter) else parameter.resolve_neg().contiguous()


def vector_length(itemsize: int, *strides: int) -> int:
    """Elements of the widest access, 16 bytes at most, that every one of these row strides keeps aligned."""
    return math.gcd(16 // itemsize, *strides)


# --- rows ----------------------------------------------------------------------------------------------------------


def _row_stride(shape: Sequence[int], strides: Sequence[int], span: int) -> int | None:
    """Distance between rows of `span` contiguous elements, or None where the layout is not such rows.

    A single row counts as having row stride `span`, so that a sample is treated alone as it is in a batch.
    """
    run, dim = 1, len(shape) - 1
    while run < span:
        if shape[dim] != 1 and strides[dim] != run:
            return None
        run *= shape[dim]
        dim -= 1
    stride = reach = None
    for size, step in zip(reversed(shape[: dim + 1]), reversed(strides[: dim + 1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != reach:
            return None
        reach = step * size
    return span if stride is None else stride


row_stride = functools.lru_cache(maxsize=4096)(_row_stride)


class Rows(NamedTuple):
    """Rows of `span` contiguous elements."""

    span: int

    def stride(self, tensor: torch.Tensor) -> int | None:
        if tensor.is_neg():  # a view that torch negates as it reads
            return None
        return self.span if tensor.is_contiguous() else row_stride(tuple(tensor.shape), tensor.stride(), self.span)

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.resolve_neg().contiguous()

    def dense_stride(self, tensor: torch.Tensor) -> int:
        return self.span


# --- samples of planes ---------------------------------------------------------------------------------------------


def _sample_stride(shape: Sequence[int], strides: Sequence[int], channels_last: bool) -> int | None:
    """Distance between the samples of a tensor [samples, channels, *positions], each without gaps, its planes one after
    the other or, channels_last, its positions; None where the layout is not such samples."""
    if channels_last:
        shape, strides = (*shape[:1], *shape[2:], shape[1]), (*strides[:1], *strides[2:], strides[1])
    return _row_stride(shape, strides, math.prod(shape[1:]))


sample_stride = functools.lru_cache(maxsize=4096)(_sample_stride)


LONGEST_OF_SINGLES = 128  # channels of a group, of any type


def lies_channels_last(shape: Sequence[int], strides: Sequence[int], groups: int) -> bool:
    """Whether the channels of a position are neighbours in memory.

    Planes of one element lie either way. Short groups of them are held whole, as contiguous ones are; longer ones would
    be padded there, to eight elements a plane.
    """
    if math.prod(shape[2:]) == 1:
        return shape[1] > LONGEST_OF_SINGLES * groups
    if _sample_stride(shape, strides, False) is not None:
        return False
    # A slice of channels, or of positions, of such a tensor lies so, too: what is made of it keeps the layout.
    return _sample_stride(shape, strides, True) is not None or strides[1] == 1


class Samples(NamedTuple):
    """Samples in one of the two layouts of `sample_stride`."""

    channels_last: bool

    def stride(self, tensor: torch.Tensor) -> int | None:
        return None if tensor.is_neg() else sample_stride(tuple(tensor.shape), tensor.stride(), self.channels_last)

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.resolve_neg()
        if self.channels_last:
            return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
        return tensor.contiguous()

    def dense_stride(self, tensor: torch.Tensor) -> int:
        return math.prod(tensor.shape[1:])


def empty_samples(like: torch.Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialized tensor of the same shape without any gaps in one of the two layouts. Where planes are of one
    element these are one, and it has the strides that `like` has."""
    dtype = dtype or like.dtype
    if like.dim() > 2 and math.prod(like.shape[2:]) == 1:
        channels_last = like.stride(1) == 1 and like.stride(-1) == like.shape[1]
    if not channels_last:
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    _, step, *positions = like.shape
    strides: list[int] = []
    for size in reversed(positions):
        strides.insert(0, step)
        step *= size
    # No view of another tensor: autograd would forbid users to change it in place.
    return torch.empty_strided(like.shape, (step, 1, *strides), dtype=dtype, device=like.device)


# --- planes whose statistics all samples share ---------------------------------------------------------------------


# Most planes shorter than this begin between 16-byte boundaries, and partial results of each would weigh too much.
SHORTEST_POOLED = 256


class PooledPlanes(NamedTuple):
    """[samples, channels, plane] as a kernel takes it: where it can, as one sample, which is a matrix of rows."""

    samples: int
    channels: int
    plane: int
    channels_last: bool

    @property
    def runs(self) -> tuple[int, int]:
        """How many runs of neighbouring elements there are, and their length."""
        if self.channels_last:
            return self.samples * self.plane, self.channels
        return self.samples * self.channels, self.plane


def pooled_planes(shape: Sequence[int], channels_last: bool) -> PooledPlanes:
    """The view of a tensor [samples, channels, *positions] by a kernel whose statistics go by channel alone.

    channels_last it is a matrix, a row a position. So it is where planes are short: a row is then a sample, and a plane
    is as many columns, which are one channel's.
    """
    samples, channels, *positions = shape
    plane = math.prod(positions)
    if channels_last:
        return PooledPlanes(1, channels, samples * plane, True)
    if plane < SHORTEST_POOLED:
        return PooledPlanes(1, channels * plane, samples, True)
    return PooledPlanes(samples, channels, plane, False)


def lies_pooled_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """`lies_channels_last`, of which planes of one element always are."""
    return math.prod(shape[2:]) == 1 or lies_channels_last(shape, strides, 1)


class Pooled(NamedTuple):
    """Samples as their `pooled_planes`; the stride of one sample, which is all, is 0."""

    channels_last: bool
    planes: PooledPlanes

    def stride(self, tensor: torch.Tensor) -> int | None:
        samples = Samples(self.channels_last)
        stride = samples.stride(tensor)
        if stride is None or self.planes.samples != 1:
            return stride
        return 0 if tensor.shape[0] == 1 or stride == samples.dense_stride(tensor) else None

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        return empty_samples(tensor, self.channels_last).copy_(tensor)

    def dense_stride(self, tensor: torch.Tensor) -> int:
        return 0 if self.planes.samples == 1 else Samples(self.channels_last).dense_stride(tensor)


# --- elements, in whatever order they lie in memory ----------------------------------------------------------------


_ANY_LENGTH = 4096  # of the runs of a lone channel: a multiple of any block


class Arrangement(NamedTuple):
    """How a tensor lies in memory without gaps, and what an element's place in memory tells of it.

    The scale's channel is (place // inner) % channels, the sample is place // sample_size. channels_last: memory is
    [samples, positions, last_channels], the logical index goes by [samples, last_channels, positions]; else it is the
    place, where anybody asks.
    """

    strides: tuple[int, ...]
    elements: int
    inner: int
    channels: int
    sample_size: int
    channels_last: bool
    last_channels: int
    positions: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """Those of the above that kernels are told at run time."""
        return self.inner, self.channels, self.sample_size, self.last_channels, self.positions


def _is_dense(shape: Sequence[int], strides: Sequence[int], order: Sequence[int]) -> bool:
    """Whether dims in this order, the innermost last, lie in memory without gaps."""
    run = 1
    for dim in reversed(order):
        if shape[dim] != 1 and strides[dim] != run:
            return False
        run *= shape[dim]
    return True


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def memory_arrangement(
    shape: tuple[int, ...], strides: tuple[int, ...], scale: tuple[int, ...] | None, drops: bool
) -> Arrangement:
    """The arrangement of a tensor that has elements, and no gaps between them; one to copy it to where kernels cannot
    tell from its own what they need to know, of a scale (its shape) or of what is dropped."""
    elements, dims = math.prod(shape), len(shape)
    size = (1,) * (dims - len(scale)) + scale if scale is not None else (1,) * dims
    axes = [dim for dim in range(dims) if size[dim] != 1]
    first, last = (axes[0], axes[-1]) if axes else (dims, dims - 1)
    channels = math.prod(shape[first : last + 1])
    sample_size = elements // shape[0] if dims else elements
    inner = math.prod(shape[last + 1 :]) if axes else _ANY_LENGTH
    plain = Arrangement(strides, elements, inner, channels, sample_size, False, 1, 1)
    if (scale is None and not drops) or _is_dense(shape, strides, range(dims)):
        return plain
    order = (0, *range(2, dims), 1)
    by_last = axes == [1]
    if dims > 2 and _is_dense(shape, strides, order) and (by_last or 1 not in range(first, last + 1)):
        if axes and first > 0:
            inner = 1 if by_last else inner * shape[1]
        last_channels = shape[1]
        return plain._replace(
            inner=inner, channels_last=True, last_channels=last_channels, positions=sample_size // last_channels
        )
    return plain._replace(strides=_contiguous_strides(shape))


def lies(tensor: torch.Tensor, places: Arrangement) -> bool:
    """Whether the tensor's elements are in memory as these places tell."""
    if tensor.is_neg():
        return False
    strides = tensor.stride()
    if strides == places.strides:
        return True
    pairs = zip(tensor.shape, strides, places.strides, strict=True)
    return all([size == 1 or stride == wanted for size, stride, wanted in pairs])


def arranged(tensor: torch.Tensor, places: Arrangement, *, copy: bool = True) -> torch.Tensor:
    """`tensor` itself where it lies so, otherwise a new tensor that does, with its values if they are to be copied."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if lies(tensor, places):
        return tensor
    to = torch.empty_strided(tensor.shape, places.strides, dtype=tensor.dtype, device=tensor.device)
    return to.copy_(tensor) if copy else to
