"""Partial sums -> dweight and dbias: the reduction that both kernel families end their backward with."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .launch import cdiv, column_sum_config
from .launcher import Launcher

Tensor = torch.Tensor


@triton.jit
def sum_columns(Partial_ptr, Sum_ptr, partial_rows, col, span, BLOCK_ROWS: tl.constexpr):
    """Sums the columns `col` [1, columns] of partial sums [partial_rows, span], in a fixed order; None stays None. A
    span that is a constant lets loads be wide."""
    if Sum_ptr is not None:
        total = tl.zeros([BLOCK_ROWS, col.shape[1]], Partial_ptr.dtype.element_ty)
        for first in range(0, partial_rows, BLOCK_ROWS):
            row = first + tl.arange(0, BLOCK_ROWS)[:, None]
            offsets = row.to(tl.int64) * span + col
            total += tl.load(Partial_ptr + offsets, mask=(row < partial_rows) & (col < span), other=0.0)
        sums = tl.sum(total, axis=0, keep_dims=True)
        tl.store(Sum_ptr + col, sums.to(Sum_ptr.dtype.element_ty), mask=col < span)


@triton.jit(do_not_specialize=["partial_rows"])
def column_sum_kernel(
    PartialDWeight_ptr, PartialDBias_ptr, DWeight_ptr, DBias_ptr, partial_rows: tl.int32,
    SPAN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
):  # fmt: skip
    """dweight and dbias [SPAN], each or None, from partial sums [partial_rows, SPAN]; a block of columns a program."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_SPAN + tl.arange(0, BLOCK_SPAN)[None, :]
    sum_columns(PartialDWeight_ptr, DWeight_ptr, partial_rows, col, SPAN, BLOCK_ROWS)
    sum_columns(PartialDBias_ptr, DBias_ptr, partial_rows, col, SPAN, BLOCK_ROWS)


@triton.jit(do_not_specialize=["partial_rows", "span"])
def column_sum_of_any_span_kernel(
    PartialDScale_ptr, DScaleSums_ptr, partial_rows: tl.int32, span: tl.int64,
    BLOCK_ROWS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
):  # fmt: skip
    """Sums [span] of partial sums [partial_rows, span], for spans that vary with a batch."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_SPAN + tl.arange(0, BLOCK_SPAN)[None, :]
    sum_columns(PartialDScale_ptr, DScaleSums_ptr, partial_rows, col, span, BLOCK_ROWS)


def column_sum(
    dweight: Tensor | None, dbias: Tensor | None, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Sums partial gradients [partial_rows, span] over their rows, in a fixed order; None stays None."""
    given = dweight if dweight is not None else dbias
    if given is None:
        return None, None
    partial_rows, span = given.shape
    sums = (
        None if dweight is None else torch.empty(span, dtype=weight_dtype, device=given.device),
        None if dbias is None else torch.empty(span, dtype=bias_dtype, device=given.device),
    )
    tensors = (dweight, dbias, *sums)
    launch, programs = _launcher(span, *[None if tensor is None else tensor.dtype for tensor in tensors])
    launch(programs, given.device, (), tensors, partial_rows)
    return sums


@functools.cache
def _launcher(span: int, *dtypes: torch.dtype | None) -> tuple[Launcher, int]:
    """A launcher for tensors of these types, and how many programs it takes."""
    config = column_sum_config(span)
    constants = (span, config.block_rows, config.block_span)
    return Launcher(column_sum_kernel, config.num_warps, *constants), cdiv(span, config.block_span)


def column_sum_of_any_span(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [span] of partial sums [partial_rows, span] in a fixed order, by a kernel that takes whatever span."""
    partial_rows, span = partials.shape
    launch, block_span = _launcher_of_any_span(partials.dtype, dtype)
    sums = torch.empty(span, dtype=dtype, device=partials.device)
    launch(cdiv(span, block_span), partials.device, (partials,), (sums,), partial_rows, span)
    return sums


@functools.cache
def _launcher_of_any_span(*dtypes: torch.dtype) -> tuple[Launcher, int]:
    config = column_sum_config(1)  # the tile of short spans, as wide ones have programs enough with any
    return Launcher(
        column_sum_of_any_span_kernel, config.num_warps, config.block_rows, config.block_span
    ), config.block_span
