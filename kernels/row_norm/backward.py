"""Launches the backward of the row family: whole rows in one launch, long ones in two, then the sum of partials."""

from __future__ import annotations

import functools

import torch
import triton

from ..activations import ACTIVATIONS
from ..column_sum import column_sum
from ..launch import (
    Launcher,
    RowConfig,
    backward_chunk_config,
    backward_programs,
    cdiv,
    column_block_config,
    column_stripes,
    device_facts,
    row_backward_config,
)
from ..views import columns, row_view, vector_length
from .backward_kernels import row_gradient_apply_kernel, row_gradient_sums_kernel, row_norm_backward_kernel
from .problem import Gradients, RowNorm, Tensor, Wanted, compute_dtype


def row_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm: RowNorm,
    wanted: Wanted,
) -> Gradients:
    """The wanted gradients, in one launch (two for a long row) and one more that sums dweight and dbias.

    x is what was normalized (with norm.add_first the total), or None where nothing wanted depends on it. With
    norm.add_first, dx and dresidual are the same values: ask for both only where their types differ.
    """
    needs_dx = wanted.dx or (norm.add_first and wanted.dresidual)
    if not needs_dx:
        dtotal = None
    residual_dtype = x.dtype if norm.add_first and x is not None else dy.dtype
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if wanted.dx else None
    dresidual = None
    if wanted.dresidual:
        dresidual = torch.empty_like(dy, dtype=residual_dtype, memory_format=torch.contiguous_format)
    rows = dy.numel() // norm.span if norm.span else 0
    if rows == 0:
        return Gradients(dx, dresidual, *_zeros(weight, bias, wanted))

    recomputes_z = norm.activation is not None and bits is None
    read = (dy, dtotal, x, residual if recomputes_z else None)
    views = [(None, 0) if tensor is None else row_view(tensor, norm.span) for tensor in read]
    vec = vector_length(dy.element_size(), *(stride for _, stride in views))
    dy, dtotal, x, residual = (tensor for tensor, _ in views)  # type: ignore[assignment]
    strides = tuple(stride // vec for _, stride in views)
    inputs = (dy, dtotal, x, residual, bits, columns(weight), columns(bias) if recomputes_z else None, mean, rstd)
    options = (norm.span, dy.element_size(), norm.subtract_mean, norm.add_first, norm.activation, vec)

    # What a program keeps in registers while it goes down the rows.
    operands = sum(tensor is not None for tensor in inputs[4:7]) + wanted.dweight + wanted.dbias
    activations = sum(tensor is not None for tensor in inputs[:4])
    whole = row_backward_config(norm.span, dy.element_size(), operands, activations) is not None
    run = functools.partial(_whole_rows, operands, activations) if whole else _chunked_rows
    partials = run(rows, inputs, (dx, dresidual), wanted, needs_dx, strides, (norm.alpha, norm.beta), options)
    dtypes = (None if parameter is None else parameter.dtype for parameter in (weight, bias))
    sums = column_sum(*partials, *dtypes)
    return Gradients(dx, dresidual, *sums)


def _zeros(weight: Tensor | None, bias: Tensor | None, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
    """The parameter gradients of a call without rows."""
    dweight = weight.new_zeros(weight.numel()) if weight is not None and wanted.dweight else None
    dbias = bias.new_zeros(bias.numel()) if bias is not None and wanted.dbias else None
    return dweight, dbias


def _partials(partial_rows: int, span: int, dy: Tensor, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
    """Uninitialized partial sums [partial_rows, span] for dweight and dbias, each only where wanted."""
    shape, dtype = (partial_rows, span), compute_dtype(dy.dtype)
    dweight = torch.empty(shape, dtype=dtype, device=dy.device) if wanted.dweight else None
    dbias = torch.empty(shape, dtype=dtype, device=dy.device) if wanted.dbias else None
    return dweight, dbias


def _whole_rows(
    operands: int,
    activations: int,
    rows: int,
    inputs: tuple,
    outputs: tuple,
    wanted: Wanted,
    needs_dx: bool,
    strides: tuple,
    floats: tuple,
    options: tuple,
) -> tuple[Tensor | None, Tensor | None]:
    span, dy = options[0], inputs[0]
    launch, config = _whole_row_launcher(*options, needs_dx, operands, activations)
    programs = backward_programs(cdiv(rows, config.block_rows), config, device_facts(dy.device))
    partials = _partials(programs, span, dy, wanted)
    launch(programs, (*inputs, *outputs, *partials), rows, *strides, *floats)
    return partials


def _chunked_rows(
    rows: int,
    inputs: tuple,
    outputs: tuple,
    wanted: Wanted,
    needs_dx: bool,
    strides: tuple,
    floats: tuple,
    options: tuple,
) -> tuple[Tensor | None, Tensor | None]:
    span, itemsize, subtract_mean, *_ = options
    dy, _, x, residual, bits, weight, bias, mean, rstd = inputs
    g_sums = g_x_hat_sums = None
    if needs_dx:
        chunks = backward_chunk_config(span, itemsize).chunks
        g_x_hat_sums = torch.empty((rows, chunks), dtype=compute_dtype(dy.dtype), device=dy.device)
        g_sums = torch.empty_like(g_x_hat_sums) if subtract_mean else None
        tensors = (dy, x, residual, bits, weight, bias, mean, rstd, g_sums, g_x_hat_sums)
        _sums_launcher(*options)(rows * chunks, tensors, strides[0], *strides[2:], *floats)

    accumulates = wanted.dweight or wanted.dbias
    launch, config = _apply_launcher(*options)
    blocks = cdiv(span, config.block_span)
    stripes = column_stripes(rows, blocks, config, device_facts(dy.device)) if accumulates else rows
    partials = _partials(stripes, span, dy, wanted)
    launch(blocks * stripes, (*inputs, g_sums, g_x_hat_sums, *outputs, *partials), rows, *strides, *floats)
    return partials


# --- launchers, built once for each combination of constants -------------------------------------------------------


@functools.cache
def _whole_row_launcher(
    span: int,
    itemsize: int,
    subtract_mean: bool,
    add_first: bool,
    activation: str | None,
    vec: int,
    needs_dx: bool,
    operands: int,
    activations: int,
) -> tuple[Launcher, RowConfig]:
    config = row_backward_config(span, itemsize, operands, activations)
    assert config is not None
    _, slope, passes = ACTIVATIONS[activation]
    tile = (config.block_rows, config.block_span, config.stages)
    constants = (span, vec, subtract_mean, add_first, needs_dx, slope, passes, *tile)
    launch = Launcher(row_norm_backward_kernel, config.num_warps, *constants, most_registers=config.most_registers)
    return launch, config


@functools.cache
def _sums_launcher(
    span: int, itemsize: int, subtract_mean: bool, add_first: bool, activation: str | None, vec: int
) -> Launcher:
    config = backward_chunk_config(span, itemsize)
    _, slope, passes = ACTIVATIONS[activation]
    constants = (span, vec, slope, passes, config.block_span, config.steps, config.chunks)
    return Launcher(row_gradient_sums_kernel, config.num_warps, *constants, most_registers=config.most_registers)


@functools.cache
def _apply_launcher(
    span: int, itemsize: int, subtract_mean: bool, add_first: bool, activation: str | None, vec: int
) -> tuple[Launcher, RowConfig]:
    chunks = backward_chunk_config(span, itemsize).chunks
    config = column_block_config(span, itemsize)
    _, slope, passes = ACTIVATIONS[activation]
    tile = (config.block_span, chunks, triton.next_power_of_2(chunks), config.stages)
    constants = (span, vec, add_first, slope, passes, *tile)
    launch = Launcher(row_gradient_apply_kernel, config.num_warps, *constants, most_registers=config.most_registers)
    return launch, config
