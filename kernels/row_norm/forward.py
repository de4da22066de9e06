"""Launches the forward of the row family: whole rows in registers, a walk along each row, or shared rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import empty_like

from ..activations import ACTIVATIONS
from ..dropout import rate_of
from ..launch import cdiv, chunk_config, device_facts, row_forward_config, walk_stages, walks_rows
from ..launcher import Launcher, Tensors
from ..problem import Forward, RowNorm, Tensor, compute_dtype
from ..views import Rows, plan_reading, vector_length
from .forward_kernels import row_apply_kernel, row_moments_kernel, row_norm_forward_kernel, row_walk_forward_kernel

Strides = tuple[int, int]
Floats = tuple[float, ...]  # the threshold and the factor of dropout, eps, alpha, beta
Schedule = Callable[[int, Tensors, Forward, Strides, Floats], None]


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
    run = plan_forward(x, residual, weight, bias, norm, save_statistics, save_bits)
    return run(norm.seed, x, residual, weight, bias)


def plan_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: RowNorm,
    save_statistics: bool,
    save_bits: bool,
) -> Callable[..., Forward]:
    """`row_norm_forward` of all tensors that lie as these do, of any number of rows if there are any: a function of the
    seed and of them."""
    span, eps, subtract_mean, add_first, activation, alpha, beta, dropout_p, seed = norm
    norm = norm._replace(seed=None)  # that of each call is its own
    if x.numel() == 0:
        return lambda seed, x, residual, *_: allocate(x, residual, norm, save_statistics, save_bits)
    tensors = (x, residual, weight, bias, seed)
    (x_stride, residual_stride), read = plan_reading(Rows(span), tensors, activations=2)
    vec = vector_length(x.element_size(), x_stride, residual_stride)
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    schedule = _schedule(span, vec, subtract_mean, add_first, activation, save_bits, save_statistics, *dtypes)
    units = x_stride // vec, residual_stride // vec
    floats = (*rate_of(seed, dropout_p), eps, alpha, beta)

    def run(
        seed: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Forward:
        out = allocate(x, residual, norm, save_statistics, save_bits)
        schedule(x.numel() // span, read((x, residual, weight, bias, seed)), out, units, floats)
        return out

    return run


def allocate(x: Tensor, residual: Tensor | None, norm: RowNorm, save_statistics: bool, save_bits: bool) -> Forward:
    """What `row_norm_forward` returns, nothing in it yet."""
    y = empty_like(x, memory_format=_WITHOUT_GAPS)
    if not (save_statistics or save_bits or norm.add_first):
        return Forward(y, None, None, None, None)
    total = mean = rstd = bits = None
    if norm.add_first:
        total = empty_like(residual, memory_format=_WITHOUT_GAPS)  # type: ignore[arg-type]
    rows = x.numel() // max(1, norm.span)
    if save_statistics:
        rstd = torch.empty(rows, dtype=compute_dtype(x.dtype), device=x.device)
        if norm.subtract_mean:
            mean = empty_like(rstd)
    if save_bits:
        bits = torch.empty((rows, cdiv(norm.span, 8)), dtype=torch.uint8, device=x.device)
    return Forward(y, total, mean, rstd, bits)


_WITHOUT_GAPS = torch.contiguous_format


# --- schedules, one for each kind of call --------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What the calls that one schedule serves have in common; the last five are types, None without the tensor."""

    span: int
    vec: int
    subtract_mean: bool
    add_first: bool
    activation: str | None
    save_bits: bool
    save_statistics: bool
    x: torch.dtype
    residual: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None
    seed: torch.dtype | None

    @property
    def constants(self) -> tuple[Any, ...]:
        """Those of every kernel that normalizes."""
        functions = ACTIVATIONS[self.activation]
        passes = functions.passes if self.save_bits else None
        return self.span, self.vec, self.subtract_mean, functions.value, passes

    @property
    def waiting(self) -> int:
        """Tensors of x's size that wait for the statistics: x or the total, and a residual that is added afterwards."""
        return 1 + (self.residual is not None and not self.add_first)

    @property
    def parameter_itemsizes(self) -> list[int]:
        return [dtype.itemsize for dtype in (self.weight, self.bias) if dtype is not None]


@functools.cache
def _schedule(*fields: Any) -> Schedule:
    kind = _Kind(*fields)
    parameters = kind.parameter_itemsizes
    wide_residual = kind.residual is not None and kind.residual.itemsize > kind.x.itemsize
    config = row_forward_config(
        kind.span, kind.x.itemsize, kind.waiting, len(parameters),
        max(parameters, default=0), kind.add_first, wide_residual,
    )  # fmt: skip
    if config is None:
        return _LongRows(kind)
    constants = (*kind.constants, config.block_rows, config.block_span)
    launch = Launcher(row_norm_forward_kernel, config.num_warps, *constants)

    def whole_rows(rows: int, given: Tensors, out: Forward, strides: Strides, floats: Floats) -> None:
        y, total, mean, rstd, bits = out
        programs = cdiv(rows, config.block_rows)
        launch(programs, y.device, given, (y, total, bits, mean, rstd), rows, *strides, *floats)

    return whole_rows


class _LongRows:
    """A row in chunks. One program walks them all; or several share them, where rows are few or too long for the L2:
    then partial moments of each chunk, which every program of the next launch merges before it finishes its chunk."""

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind
        self.loaded_itemsize = kind.x.itemsize
        if kind.add_first:
            assert kind.residual is not None
            self.loaded_itemsize += kind.residual.itemsize
        self.config = config = chunk_config(kind.span, kind.x.itemsize, self.loaded_itemsize, kind.waiting)
        chunk = (config.block_span, config.steps, config.chunks, (config.chunks - 1).bit_length(), config.parts)

        def launcher(kernel: Any, *constants: Any) -> Launcher:
            return Launcher(kernel, config.num_warps, *constants, most_registers=config.most_registers)

        @functools.cache
        def walk(stages: int) -> Launcher:
            return launcher(row_walk_forward_kernel, *kind.constants, *chunk, stages)

        self.walk = walk
        self.moments = launcher(row_moments_kernel, *kind.constants[:3], *chunk[:3])
        # The total that it reads lies in memory without gaps.
        vec = vector_length(kind.x.itemsize, kind.span) if kind.add_first else kind.vec
        self.apply_vec = vec
        self.apply = launcher(row_apply_kernel, *kind._replace(vec=vec).constants, *chunk)

    def __call__(self, rows: int, given: Tensors, out: Forward, strides: Strides, floats: Floats) -> None:
        facts = device_facts(out.y.device)
        span, itemsize = self.kind.span, self.kind.x.itemsize
        alone = self.config.chunks == 1
        if alone or (self._may_walk(given) and walks_rows(rows, span, itemsize, self.loaded_itemsize, facts)):
            y, total, mean, rstd, bits = out
            walk = self.walk(walk_stages(self.config, self.loaded_itemsize, facts.shared_bytes))
            walk(rows, y.device, given, (y, total, bits, mean, rstd), *strides, *floats)
        else:
            self._share(rows, given, out, strides, floats)

    def _may_walk(self, given: Tensors) -> bool:
        """Whether the walk sums a tile in the order in which shared rows do, so that both give the same bits.

        A compiler lays a tile out for its widest access. In the walk that must be x's, as it is where rows are shared:
        with x at 16 bytes a thread no other access is wider, if parameters are no narrower than x.
        """
        span, vec, itemsize = self.kind.span, self.kind.vec, self.kind.x.itemsize
        if vec * itemsize != 16 or span % vec or min(self.kind.parameter_itemsizes, default=itemsize) < itemsize:
            return False
        return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in given)

    def _share(self, rows: int, given: Tensors, out: Forward, strides: Strides, floats: Floats) -> None:
        x, residual, weight, bias, seed = given
        y, total, mean, rstd, bits = out
        drop, finish = floats[:2], floats[2:]
        chunks = self.config.chunks
        m2s = torch.empty((rows, chunks), dtype=compute_dtype(y.dtype), device=y.device)
        means = torch.empty_like(m2s) if self.kind.subtract_mean else None
        added = residual if self.kind.add_first else None
        self.moments(rows * chunks, y.device, (x, added, seed), (total, means, m2s), *strides, *drop)
        if self.kind.add_first:
            x, residual, strides = total, None, (self.kind.span // self.apply_vec, 0)
        allocated = (y, bits, mean, rstd, means, m2s)
        self.apply(rows * chunks, y.device, (x, residual, weight, bias), allocated, *strides, *finish)
