"""Launches the backward of the row family: whole rows, a walk along each row, or shared rows; the sum of partials."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton

from ..activations import ACTIVATIONS
from ..column_sum import column_summer
from ..dropout import rate_of
from ..launch import (
    DeviceFacts,
    RowConfig,
    backward_chunk_config,
    backward_programs,
    backward_walk_config,
    cdiv,
    column_block_config,
    column_stripes,
    device_facts,
    registers_a_thread,
    row_backward_config,
    walks_gradients,
)
from ..launcher import Launcher, Tensors
from ..problem import Gradients, RowNorm, Tensor, Wanted, compute_dtype, plan_needed, without_elements
from ..views import Rows, plan_reading, vector_length
from .backward_kernels import (
    row_gradient_apply_kernel,
    row_gradient_sums_kernel,
    row_norm_backward_kernel,
    row_walk_backward_kernel,
)

Strides = list[int]
Floats = tuple[float, ...]  # the threshold and the factor of dropout, alpha, beta
Partials = tuple[Tensor | None, Tensor | None]
Schedule = Callable[[int, Tensors, Tensors, Strides, Floats, DeviceFacts], Partials]


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
    """The wanted gradients, in one launch (two for long rows that are shared) and one more that sums dweight and dbias.

    x is what was normalized (with norm.add_first the total), or None where nothing wanted depends on it. With
    norm.add_first, dx and dresidual are the same values, but for dropout: without it ask for both only where their
    types differ.
    """
    tensors = (dy, dtotal, x, residual, bits, weight, bias, mean, rstd)
    return plan_backward(*tensors, norm, wanted)(norm.seed, *tensors)


def plan_backward(
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
) -> Callable[..., Gradients]:
    """`row_norm_backward` of all tensors that lie as these do, of any number of rows if there are any: a function of
    the seed and of them."""
    span, _, subtract_mean, add_first, activation, alpha, beta, dropout_p, seed = norm
    norm = norm._replace(seed=None)  # that of each call is its own
    if dy.numel() == 0:
        return without_elements(allocate_gradients, norm, wanted)
    needed = plan_needed(norm, wanted, bits)
    given = needed((dy, dtotal, x, residual, bits, weight, bias, mean, rstd, seed))
    # What was saved may come back in another layout, from whoever packed it.
    strides, read = plan_reading(Rows(span), given, activations=4)
    vec = vector_length(dy.element_size(), *strides)
    dtypes = [None if tensor is None else tensor.dtype for tensor in given]
    schedule = _schedule(span, vec, subtract_mean, add_first, activation, wanted, *dtypes)
    units = [stride // vec for stride in strides]
    floats = (*rate_of(seed, dropout_p), alpha, beta)
    sum_partials = column_summer(
        span, compute_dtype(dy.dtype),
        weight.dtype if weight is not None and wanted.dweight else None,
        bias.dtype if bias is not None and wanted.dbias else None,
    )  # fmt: skip

    def run(
        seed: Tensor | None,
        dy: Tensor,
        dtotal: Tensor | None,
        x: Tensor | None,
        *others: Tensor | None,
    ) -> Gradients:
        dx, dresidual = out = allocate_gradients(dy, x, norm, wanted)
        given = read(needed((dy, dtotal, x, *others, seed)))
        partials = schedule(dy.numel() // span, given, out, units, floats, device_facts(dy.device))
        return Gradients(dx, dresidual, *sum_partials(*partials))

    return run


def allocate_gradients(dy: Tensor, x: Tensor | None, norm: RowNorm, wanted: Wanted) -> Partials:
    """(dx, dresidual), each where wanted, nothing in them yet; x is what was normalized."""
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if wanted.dx else None
    if not wanted.dresidual:
        return dx, None
    dtype = x.dtype if norm.add_first and x is not None else dy.dtype
    return dx, torch.empty_like(dy, dtype=dtype, memory_format=torch.contiguous_format)


# --- schedules, one for each kind of call --------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What the calls that one schedule serves have in common; from dy on types, None without the tensor."""

    span: int
    vec: int
    subtract_mean: bool
    add_first: bool
    activation: str | None
    wanted: Wanted
    dy: torch.dtype
    dtotal: torch.dtype | None
    x: torch.dtype | None
    residual: torch.dtype | None
    bits: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None
    mean: torch.dtype | None
    rstd: torch.dtype | None
    seed: torch.dtype | None

    @property
    def loaded_bytes(self) -> int:
        """Of an element of every tensor of x's size."""
        return sum(dtype.itemsize for dtype in (self.dy, self.dtotal, self.x, self.residual) if dtype is not None)

    @property
    def needs_dx(self) -> bool:
        return self.wanted.dx or (self.add_first and self.wanted.dresidual)

    @property
    def needs_partials(self) -> bool:
        return self.wanted.dweight or self.wanted.dbias

    @property
    def slope(self) -> tuple[Any, Any]:
        """The activation's slope, or which of its two values an element has."""
        _, slope, passes = ACTIVATIONS[self.activation]
        return slope, passes

    def config(self, shared_bytes: int) -> RowConfig | None:
        """The tile of whole rows, None where a row has to be cut into chunks."""
        # What a program keeps in registers while it goes down the rows.
        operands = sum(dtype is not None for dtype in (self.bits, self.weight, self.bias)) + sum(self.wanted[2:])
        config = row_backward_config(self.span, self.dy.itemsize, operands, self.loaded_bytes, shared_bytes)
        if config is None or self.seed is None:
            return config
        # What draws what is dropped takes registers, too.
        most = max(168, config.most_registers or 0)
        return replace(config, most_registers=registers_a_thread(config.num_warps, most))

    def partials(self, partial_rows: int, device: torch.device) -> Partials:
        """Uninitialized partial sums [partial_rows, span] for dweight and dbias, each only where wanted."""
        _, _, wants_dweight, wants_dbias = self.wanted
        if not self.needs_partials:
            return None, None
        sums = torch.empty((partial_rows, self.span), dtype=compute_dtype(self.dy), device=device)
        if wants_dweight and wants_dbias:
            return sums, torch.empty_like(sums)
        return (sums, None) if wants_dweight else (None, sums)


@functools.cache
def _schedule(*fields: Any) -> Schedule:
    kind = _Kind(*fields)
    if kind.config(_ANY_SHARED_BYTES) is None:
        return _LongRows(kind)

    @functools.cache
    def tile(shared_bytes: int) -> tuple[RowConfig, Launcher]:
        config = kind.config(shared_bytes)
        assert config is not None
        tile = (config.block_rows, config.block_span, config.stages)
        constants = (kind.span, kind.vec, kind.subtract_mean, kind.add_first, kind.needs_dx, *kind.slope, *tile)
        most = config.most_registers
        return config, Launcher(row_norm_backward_kernel, config.num_warps, *constants, most_registers=most)

    def whole_rows(
        rows: int, given: Tensors, out: Tensors, strides: Strides, floats: Floats, facts: DeviceFacts
    ) -> Partials:
        device = given[0].device  # type: ignore[union-attr]
        config, launch = tile(facts.shared_bytes)
        programs = backward_programs(cdiv(rows, config.block_rows), config, facts)
        partials = kind.partials(programs, device)
        launch(programs, device, given, (*out, *partials), rows, *strides, *floats)
        return partials

    return whole_rows


_ANY_SHARED_BYTES = 0  # whether rows are held whole does not depend on them


class _LongRows:
    """A row a program, walked twice; or, where rows are few or too long for the L2, or have partial sums, the sums of
    each chunk of each row, then a block of columns a program, down the rows with those sums."""

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind
        walk = backward_walk_config(kind.dy.itemsize)
        walked = (walk.block_span, cdiv(kind.span, walk.block_span), walk.stages)
        constants = (kind.span, kind.vec, kind.subtract_mean, kind.add_first, *kind.slope, *walked)
        self.walk = Launcher(row_walk_backward_kernel, walk.num_warps, *constants, most_registers=walk.most_registers)
        config = backward_chunk_config(kind.span, kind.dy.itemsize)
        self.chunks = config.chunks
        chunk = (kind.span, kind.vec, *kind.slope, config.block_span, config.steps, config.chunks)
        self.sums = Launcher(row_gradient_sums_kernel, config.num_warps, *chunk, most_registers=config.most_registers)
        self.block = block = column_block_config(kind.span, kind.dy.itemsize, kind.loaded_bytes)
        self.blocks = cdiv(kind.span, block.block_span)
        tile = (block.block_span, self.chunks, triton.next_power_of_2(self.chunks), block.stages)
        column = (kind.span, kind.vec, kind.add_first, *kind.slope, *tile)
        self.apply = Launcher(row_gradient_apply_kernel, block.num_warps, *column, most_registers=block.most_registers)

    def __call__(
        self, rows: int, given: Tensors, out: Tensors, strides: Strides, floats: Floats, facts: DeviceFacts
    ) -> Partials:
        kind, device = self.kind, given[0].device  # type: ignore[union-attr]
        g_sums = g_x_hat_sums = None
        if kind.needs_dx:
            if not kind.needs_partials and walks_gradients(rows, kind.span, kind.loaded_bytes, facts):
                self.walk(rows, device, given, out, *strides, *floats)
                return None, None
            g_x_hat_sums = torch.empty((rows, self.chunks), dtype=compute_dtype(kind.dy), device=device)
            g_sums = torch.empty_like(g_x_hat_sums) if kind.subtract_mean else None
            dy, _, *others, _ = given
            lengths = (strides[0], *strides[2:])
            self.sums(rows * self.chunks, device, (dy, *others), (g_sums, g_x_hat_sums), *lengths, *floats[2:])
        stripes = rows
        if kind.needs_partials:
            stripes = column_stripes(rows, self.blocks, self.block, facts)
        partials = kind.partials(stripes, device)
        allocated = (g_sums, g_x_hat_sums, *out, *partials)
        self.apply(self.blocks * stripes, device, given, allocated, rows, *strides, *floats)
        return partials
