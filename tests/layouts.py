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
