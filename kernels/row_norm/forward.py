"""Launches the forward of the row family: chooses between whole rows, a walk along each row, and shared rows."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..activations import ACTIVATIONS
from ..launch import (
    ChunkConfig,
    Launcher,
    cdiv,
    chunk_config,
    device_facts,
    row_forward_config,
    walk_stages,
    walks_rows,
)
from ..views import columns, row_view, vector_length
from .forward_kernels import row_apply_kernel, row_moments_kernel, row_norm_forward_kernel, row_walk_forward_kernel
from .problem import Forward, RowNorm, Tensor, compute_dtype


def row_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: RowNorm,
    *,
    save_statistics: bool = False,
    save_bits: bool = False,
) -> Forward:
    """y and what else is asked for, in one launch, or two where several programs share a row.

    x or a residual whose trailing dims do not hold a row contiguously is copied. weight and bias have `norm.span`
    elements. With save_bits, bit i of a row says that the activation's slope is 1 at its element i.
    """
    out = _allocate(x, residual, norm, save_statistics, save_bits)
    rows = x.numel() // norm.span if norm.span else 0
    if rows == 0:
        return out

    x, x_stride = row_view(x, norm.span)
    residual, residual_stride = (None, 0) if residual is None else row_view(residual, norm.span)
    vec = vector_length(x.element_size(), x_stride, residual_stride)
    strides = (x_stride // vec, residual_stride // vec)
    floats = (norm.eps, norm.alpha, norm.beta)
    options = (norm.span, x.element_size(), norm.subtract_mean, norm.activation, save_bits)
    tensors = (x, residual, columns(weight), columns(bias), out.y, out.total, out.bits, out.mean, out.rstd)

    operands = sum(operand is not None for operand in tensors[:4]) - norm.add_first
    parameter_itemsize = max(0 if parameter is None else parameter.itemsize for parameter in (weight, bias))
    whole = _whole_row_launcher(*options, vec, operands, parameter_itemsize)
    if whole is not None:
        launch, block_rows = whole
        launch(cdiv(rows, block_rows), tensors, rows, *strides, *floats)
    elif _may_walk(tensors, norm.span, vec) and walks_rows(rows, norm.span, x.element_size(), device_facts(x.device)):
        added_itemsize = residual.element_size() if residual is not None and norm.add_first else 0
        _walk_launcher(*options, vec, x.element_size() + added_itemsize)(rows, tensors, *strides, *floats)
    else:
        _share_rows(rows, tensors, strides, floats, options, vec)
    return out


def _may_walk(tensors: tuple[Tensor | None, ...], span: int, vec: int) -> bool:
    """Whether the walk sums a tile in the order in which shared rows do, so that both give the same bits.

    A compiler lays a tile out for its widest access. In the walk that must be x's, as it is where rows are shared: with
    x at 16 bytes a thread no other access is wider, if parameters are no narrower than x.
    """
    x, _, weight, bias, *_ = tensors
    assert x is not None
    full_width = vec * x.element_size() == 16 and span % vec == 0
    aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
    narrower = any(parameter is not None and parameter.itemsize < x.itemsize for parameter in (weight, bias))
    return full_width and aligned and not narrower


def _allocate(x: Tensor, residual: Tensor | None, norm: RowNorm, save_statistics: bool, save_bits: bool) -> Forward:
    rows = x.numel() // norm.span if norm.span else 0
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = mean = rstd = bits = None
    if norm.add_first:
        total = torch.empty_like(residual, memory_format=torch.contiguous_format)  # type: ignore[arg-type]
    if save_statistics:
        rstd = torch.empty(rows, dtype=compute_dtype(x.dtype), device=x.device)
        if norm.subtract_mean:
            mean = torch.empty_like(rstd)
    if save_bits:
        bits = torch.empty((rows, cdiv(norm.span, 8)), dtype=torch.uint8, device=x.device)
    return Forward(y, total, mean, rstd, bits)


def _share_rows(rows: int, tensors: tuple, strides: tuple, floats: tuple, options: tuple, vec: int) -> None:
    """Several programs a row: partial moments of each chunk, then every program merges them and finishes its chunk."""
    x, residual, weight, bias, y, total, bits, mean, rstd = tensors
    span, itemsize, subtract_mean, *_ = options
    chunks = chunk_config(span, itemsize).chunks
    m2s = torch.empty((rows, chunks), dtype=compute_dtype(x.dtype), device=x.device)
    means = torch.empty_like(m2s) if subtract_mean else None
    added = None if total is None else residual
    _moments_launcher(span, itemsize, subtract_mean, vec)(rows * chunks, (x, added, total, means, m2s), *strides)

    if total is not None:
        x, residual, vec = total, None, vector_length(itemsize, span)
        strides = (span // vec, 0)
    tensors = (x, residual, weight, bias, y, bits, mean, rstd, means, m2s)
    _apply_launcher(*options, vec)(rows * chunks, tensors, *strides, *floats)


# --- launchers, built once for each combination of constants -------------------------------------------------------


def _epilogue(activation: str | None, save_bits: bool) -> tuple[Any, Any]:
    functions = ACTIVATIONS[activation]
    return functions.value, functions.passes if save_bits else None


@functools.cache
def _whole_row_launcher(
    span: int,
    itemsize: int,
    subtract_mean: bool,
    activation: str | None,
    save_bits: bool,
    vec: int,
    operands: int,
    parameter_itemsize: int,
) -> tuple[Launcher, int] | None:
    config = row_forward_config(span, itemsize, operands, parameter_itemsize, activation is not None)
    if config is None:
        return None
    constants = (span, vec, subtract_mean, *_epilogue(activation, save_bits), config.block_rows, config.block_span)
    launch = Launcher(row_norm_forward_kernel, config.num_warps, *constants, most_registers=config.most_registers)
    return launch, config.block_rows


@functools.cache
def _walk_launcher(
    span: int,
    itemsize: int,
    subtract_mean: bool,
    activation: str | None,
    save_bits: bool,
    vec: int,
    loaded_itemsize: int,
) -> Launcher:
    config = chunk_config(span, itemsize)
    constants = (span, vec, subtract_mean, *_epilogue(activation, save_bits), *_chunk_constants(config))
    stages = walk_stages(config, loaded_itemsize)
    kernel = row_walk_forward_kernel
    return Launcher(kernel, config.num_warps, *constants, stages, most_registers=config.most_registers)


@functools.cache
def _apply_launcher(
    span: int, itemsize: int, subtract_mean: bool, activation: str | None, save_bits: bool, vec: int
) -> Launcher:
    config = chunk_config(span, itemsize)
    constants = (span, vec, subtract_mean, *_epilogue(activation, save_bits), *_chunk_constants(config))
    return Launcher(row_apply_kernel, config.num_warps, *constants, most_registers=config.most_registers)


def _chunk_constants(config: ChunkConfig) -> tuple[int, int, int, int]:
    return config.block_span, config.steps, config.chunks, (config.chunks - 1).bit_length()


@functools.cache
def _moments_launcher(span: int, itemsize: int, subtract_mean: bool, vec: int) -> Launcher:
    config = chunk_config(span, itemsize)
    constants = (span, vec, subtract_mean, config.block_span, config.steps, config.chunks)
    return Launcher(row_moments_kernel, config.num_warps, *constants, most_registers=config.most_registers)
