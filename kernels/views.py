"""Tensor -> the two-dimensional view that a row kernel sees; every layout case ends here."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch


@functools.lru_cache(maxsize=4096)
def row_stride(shape: Sequence[int], strides: Sequence[int], span: int) -> int | None:
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


def row_view(tensor: torch.Tensor, span: int) -> tuple[torch.Tensor, int]:
    """`tensor` as rows of `span` contiguous elements, with their stride; copied only where its layout is not that."""
    if tensor.is_contiguous():
        return tensor, span
    stride = row_stride(tuple(tensor.shape), tensor.stride(), span)
    if stride is None:
        return tensor.contiguous(), span
    return tensor, stride


def columns(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A weight or bias as one contiguous run of its elements; None stays None."""
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()


def vector_length(itemsize: int, *strides: int) -> int:
    """Elements of the widest access, 16 bytes at most, that every one of these row strides keeps aligned."""
    return math.gcd(16 // itemsize, *strides)
