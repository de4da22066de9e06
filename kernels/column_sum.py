"""Partial sums -> dweight and dbias: the reduction that both kernel families end their backward with."""

from __future__ import annotations

import functools
from collections.abc import Callable

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


Sums = tuple[Tensor | None, Tensor | None]


@functools.cache
def column_summer(
    span: int, partial_dtype: torch.dtype, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> Callable[[Tensor | None, Tensor | None], Sums]:
    """What sums partial gradients [partial_rows, span] for dweight and dbias over their rows, in a fixed order; the
    types are of the sums, None without."""
    if weight_dtype is None and bias_dtype is None:
        return lambda dweight, dbias: (None, None)
    config = column_sum_config(span)
    launch = Launcher(column_sum_kernel, config.num_warps, span, config.block_rows, config.block_span)
    programs = cdiv(span, config.block_span)

    def run(partial_dweight: Tensor | None, partial_dbias: Tensor | None) -> Sums:
        partials: Tensor = partial_dbias if partial_dweight is None else partial_dweight  # type: ignore[assignment]
        device = partials.device
        dweight = dbias = None
        if weight_dtype is not None:
            dweight = torch.empty(span, dtype=weight_dtype, device=device)
        if bias_dtype is not None:
            if dweight is not None and bias_dtype == weight_dtype:
                dbias = torch.empty_like(dweight)  # takes half the time
            else:
                dbias = torch.empty(span, dtype=bias_dtype, device=device)
        launch(programs, device, (), (partial_dweight, partial_dbias, dweight, dbias), partials.shape[0])
        return dweight, dbias

    return run


def column_sum(
    dweight: Tensor | None, dbias: Tensor | None, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> Sums:
    """Sums partial gradients as `column_summer` does; None stays None."""
    given = dweight if dweight is not None else dbias
    if given is None:
        return None, None
    dtypes = (None if dweight is None else weight_dtype, None if dbias is None else bias_dtype)
    return column_summer(given.shape[1], given.dtype, *dtypes)(dweight, dbias)


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
