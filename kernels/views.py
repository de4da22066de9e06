"""Tensor -> the view that a kernel sees: rows, samples of planes, or a matrix; every layout case ends here."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


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


def row_view(tensor: torch.Tensor, span: int) -> tuple[torch.Tensor, int]:
    """`tensor` as rows of `span` contiguous elements, with their stride; copied only where its layout is not that."""
    if tensor.is_neg():  # a view that torch negates as it reads
        tensor = tensor.resolve_neg()
    if tensor.is_contiguous():
        return tensor, span
    stride = row_stride(tuple(tensor.shape), tensor.stride(), span)
    if stride is None:
        return tensor.contiguous(), span
    return tensor, stride


def columns(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A weight or bias as one contiguous run of its elements; None stays None."""
    if parameter is None:
        return None
    if parameter.is_neg():
        parameter = parameter.resolve_neg()
    return parameter if parameter.is_contiguous() else parameter.contiguous()


def vector_length(itemsize: int, *strides: int) -> int:
    """Elements of the widest access, 16 bytes at most, that every one of these row strides keeps aligned."""
    return math.gcd(16 // itemsize, *strides)


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


def sample_view(tensor: torch.Tensor, channels_last: bool) -> tuple[torch.Tensor, int]:
    """`tensor` in one of the two layouts of `sample_stride`, with its stride; copied only where it has the other."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    stride = sample_stride(tuple(tensor.shape), tensor.stride(), channels_last)
    if stride is None:
        tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else tensor.contiguous()
        return tensor, math.prod(tensor.shape[1:])
    return tensor, stride


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


def pooled_view(tensor: torch.Tensor, channels_last: bool, planes: PooledPlanes) -> tuple[torch.Tensor, int]:
    """`tensor` as its `pooled_planes`, with the stride of its samples; copied where it cannot lie so."""
    tensor, stride = sample_view(tensor, channels_last)
    if planes.samples == 1 and tensor.shape[0] != 1 and stride != math.prod(tensor.shape[1:]):
        tensor = empty_samples(tensor, channels_last).copy_(tensor)
    return tensor, 0 if planes.samples == 1 else stride


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


def arranged(tensor: torch.Tensor, places: Arrangement, *, copy: bool = True) -> torch.Tensor:
    """`tensor` itself where it lies so, otherwise a new tensor that does, with its values if they are to be copied."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    strides = tensor.stride()
    if strides == places.strides:
        return tensor
    pairs = zip(tensor.shape, strides, places.strides, strict=True)
    if all([size == 1 or stride == wanted for size, stride, wanted in pairs]):
        return tensor
    to = torch.empty_strided(tensor.shape, places.strides, dtype=tensor.dtype, device=tensor.device)
    return to.copy_(tensor) if copy else to
