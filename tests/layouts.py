"""Layouts of a tensor: the same numbers, lain out otherwise, with NaN wherever no element is."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis
import torch
from hypothesis import strategies

Tensor = torch.Tensor
Layout = Callable[[Tensor], Tensor]


def in_buffer(tensor: Tensor, shape: tuple[int, ...], place: Callable[[Tensor], Tensor]) -> Tensor:
    buffer = torch.full(shape, math.nan, dtype=tensor.dtype, device=tensor.device)
    view = place(buffer)
    view.copy_(tensor)
    return view


def every_other_column(tensor: Tensor) -> Tensor:
    *rows, last = tensor.shape
    return in_buffer(tensor, (*rows, 2 * last), lambda buffer: buffer[..., ::2])


def left_columns(tensor: Tensor) -> Tensor:
    *rows, last = tensor.shape
    return in_buffer(tensor, (*rows, last + 3), lambda buffer: buffer[..., :last])


def right_columns(tensor: Tensor) -> Tensor:
    *rows, last = tensor.shape
    return in_buffer(tensor, (*rows, last + 16), lambda buffer: buffer[..., 16:])


def every_third_row(tensor: Tensor) -> Tensor:
    return in_buffer(tensor, (3 * tensor.shape[0], *tensor.shape[1:]), lambda buffer: buffer[1::3])


def unaligned(tensor: Tensor) -> Tensor:
    return in_buffer(tensor, (tensor.numel() + 1,), lambda buffer: buffer[1:].view(tensor.shape))


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def outer_dims_swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


# --- of planes -----------------------------------------------------------------------------------------------------


def channels_last(tensor: Tensor) -> Tensor:
    """The channels of a position side by side, in any number of dims."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def samples_apart_channels_last(tensor: Tensor) -> Tensor:
    return every_third_row(tensor.movedim(1, -1)).movedim(-1, 1)


def unaligned_channels_last(tensor: Tensor) -> Tensor:
    return unaligned(tensor.movedim(1, -1)).movedim(-1, 1)


def channels_of_more_channels_last(tensor: Tensor) -> Tensor:
    """As a chunk or a slice of channels leaves them: gaps between positions."""
    return left_columns(tensor.movedim(1, -1)).movedim(-1, 1)


def channels_of_more(tensor: Tensor) -> Tensor:
    """The same of a plain tensor: gaps between samples alone."""
    samples, channels, *positions = tensor.shape
    return in_buffer(tensor, (samples, channels + 5, *positions), lambda buffer: buffer[:, 3 : 3 + channels])


def spatial_dims_swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def spatial_dims_swapped_channels_last(tensor: Tensor) -> Tensor:
    return channels_last(tensor.transpose(-1, -2)).transpose(-1, -2)


def samples_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def lies_as(tensor: Tensor, layout: Layout) -> bool:
    """Whether a tensor's strides are those that `layout` gives, but for dims of one element."""
    expected = layout(torch.empty(tensor.shape, device="meta")).stride()
    return all(
        size == 1 or own == other for size, own, other in zip(tensor.shape, tensor.stride(), expected, strict=True)
    )


# --- drawn at random -----------------------------------------------------------------------------------------------

few = hypothesis.settings(max_examples=30, derandomize=True, deadline=None, database=None)
many = hypothesis.settings(few, max_examples=1000)


@strategies.composite
def layouts(draw: strategies.DrawFn, shape: tuple[int, ...]) -> Layout:
    """Dims in any order, cut from a larger buffer with any steps and offsets, some of them expanded."""
    order = draw(strategies.permutations(range(len(shape))))
    steps = [draw(strategies.sampled_from([1, 1, 2, 3])) for _ in shape]
    offsets = [draw(strategies.sampled_from([0, 0, 1, 4])) for _ in shape]
    expanded = [draw(strategies.sampled_from([False, False, False, True])) for _ in shape]

    def layout(tensor: Tensor) -> Tensor:
        for dim, expand in enumerate(expanded):
            tensor = tensor.narrow(dim, 0, 1) if expand else tensor
        sizes = [offset + step * size for offset, step, size in zip(offsets, steps, tensor.shape, strict=True)]
        slices = tuple(slice(offset, None, step) for offset, step in zip(offsets, steps, strict=True))
        buffer_shape = tuple(sizes[dim] for dim in order)
        inverse = [order.index(dim) for dim in range(len(shape))]
        return in_buffer(tensor, buffer_shape, lambda buffer: buffer.permute(inverse)[slices]).expand(shape)

    return layout
