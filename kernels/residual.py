"""Launches the residual stream: one launch forward; backward one, and another where a scale learns."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .activations import ACTIVATIONS
from .column_sum import column_sum
from .dropout import rate
from .launch import THREADS_PER_WARP, cdiv, device_facts
from .launcher import Launcher, Tensors
from .problem import ResidualAdd, Tensor, compute_dtype
from .residual_kernels import residual_add_backward_kernel, residual_add_forward_kernel
from .views import Arrangement, arranged, columns, memory_arrangement

GROUP = 8  # neighbours that a kernel treats as one: a byte of the mask


class Added(NamedTuple):
    """Outputs of the forward: y in x's layout and the residual's type; bits of eight neighbours each, or None."""

    y: Tensor
    bits: Tensor | None


class WantedOfSum(NamedTuple):
    """Which gradients a backward is to compute and allocate."""

    dx: bool
    dresidual: bool
    dscale: bool


class SumGradients(NamedTuple):
    """Outputs of the backward; None where not wanted."""

    dx: Tensor | None
    dresidual: Tensor | None
    dscale: Tensor | None


def residual_add_forward(
    x: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    problem: ResidualAdd,
    *,
    save_bits: bool = False,
) -> Added:
    """y and, with save_bits, of which elements the activation's slope is 1.

    The scale broadcasts to x, its axes longer than 1 neighbours. seed is an int64 on x's device, needed where anything
    is dropped. x or residual is copied where it does not lie in memory as y does.
    """
    y, bits = out = allocate(x, residual, save_bits)
    if x.numel() == 0:
        return out
    places = memory_arrangement(tuple(y.shape), y.stride(), _axes_of(scale), drops=seed is not None)
    given = (arranged(x, places), arranged(residual, places), columns(scale), seed)
    written = arranged(y, places, copy=False)
    launch, block = _forward_launcher(_kind(places, problem, *given, written, bits))
    numbers = (*_numbers(places, problem), problem.alpha, problem.beta)
    launch(cdiv(x.numel(), block), y.device, given, (written, bits), x.numel(), *numbers)
    if written is not y:
        y.copy_(written)
    return out


def allocate(x: Tensor, residual: Tensor, save_bits: bool) -> Added:
    """What `residual_add_forward` returns, nothing in it yet."""
    y = torch.empty_like(x, dtype=residual.dtype)
    bits = torch.empty(cdiv(x.numel(), GROUP), dtype=torch.uint8, device=x.device) if save_bits else None
    return Added(y, bits)


def residual_add_backward(
    dy: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    bits: Tensor | None,
    seed: Tensor | None,
    problem: ResidualAdd,
    wanted: WantedOfSum,
    strides: Sequence[int],
    x_dtype: torch.dtype,
) -> SumGradients:
    """The wanted gradients; those of x and residual have these strides, which are y's, and bits go by them.

    x is needed for dscale and, as the residual, where z is computed again: with an activation and no bits.
    """
    dx, dresidual = allocate_gradients(dy, strides, x_dtype, wanted)
    if dy.numel() == 0:
        return SumGradients(dx, dresidual, torch.zeros_like(scale) if scale is not None and wanted.dscale else None)
    places = memory_arrangement(tuple(dy.shape), tuple(strides), _axes_of(scale), drops=seed is not None)
    if problem.activation is None or bits is not None:  # z is not computed again
        residual = None
        x = x if wanted.dscale else None
    activations = [None if tensor is None else arranged(tensor, places) for tensor in (dy, x, residual)]
    given = (*activations, None if bits is None else columns(bits), columns(scale), seed)
    written = [None if to is None else arranged(to, places, copy=False) for to in (dx, dresidual)]
    launch = _backward_launcher(wanted.dscale, _kind(places, problem, *given, *written))
    partials = launch(dy.numel(), places, given, written, problem)
    for to, values in zip((dx, dresidual), written, strict=True):
        if to is not None and values is not to:
            to.copy_(values)  # type: ignore[arg-type]
    if partials is None or scale is None:
        return SumGradients(dx, dresidual, None)
    dscale, _ = column_sum(partials, None, scale.dtype, None)
    return SumGradients(dx, dresidual, dscale.view(scale.shape))  # type: ignore[union-attr]


def allocate_gradients(
    dy: Tensor, strides: Sequence[int], x_dtype: torch.dtype, wanted: WantedOfSum
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dresidual), each where wanted, nothing in them yet."""
    dx = torch.empty_strided(dy.shape, strides, dtype=x_dtype, device=dy.device) if wanted.dx else None
    dresidual = torch.empty_strided(dy.shape, strides, dtype=dy.dtype, device=dy.device) if wanted.dresidual else None
    return dx, dresidual


def unpack_bits(
    bits: Tensor, like: Tensor, strides: Sequence[int], scale: Tensor | None, seed: Tensor | None
) -> Tensor:
    """The bits of a forward as booleans of `like`'s shape, given the strides of its y."""
    if like.numel() == 0:
        return like.bool()
    arrangement = memory_arrangement.__wrapped__  # whoever asks may be traced
    places = arrangement(tuple(like.shape), tuple(strides), _axes_of(scale), drops=seed is not None)
    flags = ((bits.unsqueeze(-1) >> torch.arange(GROUP, dtype=torch.uint8, device=bits.device)) & 1).flatten().bool()
    return flags.as_strided(like.shape, places.strides)


def _axes_of(scale: Tensor | None) -> tuple[int, ...] | None:
    return None if scale is None else tuple(scale.shape)


# --- launchers, one for each kind of call --------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What the calls that one launcher serves have in common; the last are types, None without the tensor."""

    activation: str | None
    ragged: bool
    shared: str | None
    drops_elements: bool
    drops_samples: bool
    channels_last: bool
    share_sample: bool
    itemsize: int
    types: tuple[torch.dtype | None, ...]

    @property
    def variant(self) -> tuple[Any, ...]:
        return self[1:7]


def _kind(places: Arrangement, problem: ResidualAdd, *tensors: Tensor | None) -> _Kind:
    shared = None
    if places.inner % GROUP == 0:
        shared = "one"
    elif places.inner >= GROUP:
        shared = "two"
    elif places.inner == 1 and places.channels % GROUP == 0:
        shared = "next"
    itemsize = max(tensor.element_size() for tensor in tensors[:2] if tensor is not None)
    return _Kind(
        problem.activation, places.elements % GROUP != 0, shared, problem.dropout_p > 0, problem.drop_path_p > 0,
        places.channels_last, places.sample_size % GROUP == 0, itemsize,
        tuple([None if tensor is None else tensor.dtype for tensor in tensors]),
    )  # fmt: skip


def _numbers(places: Arrangement, problem: ResidualAdd) -> tuple[float, ...]:
    """The arguments of both kernels that tell where an element is and what is dropped."""
    elements, samples = rate(problem.dropout_p), rate(problem.drop_path_p)
    numbers = (places.inner, places.channels, places.sample_size, places.last_channels, places.positions)
    return (*numbers, elements.threshold, samples.threshold, elements.factor, samples.factor)


_WARPS = 4


def _block(itemsize: int) -> int:
    """Elements of a program: 32 bytes a thread of every tensor, of which half a multiprocessor's threads have 32 KB and
    more in flight."""
    return _WARPS * THREADS_PER_WARP * 32 // itemsize


@functools.cache
def _forward_launcher(kind: _Kind) -> tuple[Launcher, int]:
    functions, block = ACTIVATIONS[kind.activation], _block(kind.itemsize)
    passes = functions.passes if kind.types[-1] is not None else None
    return Launcher(residual_add_forward_kernel, _WARPS, *kind.variant, functions.value, passes, block), block


class _BackwardLauncher:
    """A block of neighbours a program; where a scale learns, blocks of a period that several programs go down."""

    def __init__(self, sums: bool, kind: _Kind) -> None:
        self.sums, self.kind = sums, kind
        self.block = _block(kind.itemsize)

    @functools.cache  # noqa: B019 (launchers are few, and stay)
    def _launcher(self, division: Division) -> Launcher:
        _, slope, passes = ACTIVATIONS[self.kind.activation]
        constants = (*self.kind.variant, slope, passes, self.block, 3 if self.sums else 1)
        return Launcher(residual_add_backward_kernel, _WARPS, *constants, *division)

    def __call__(
        self, elements: int, places: Arrangement, given: Tensors, written: Sequence[Tensor | None], problem: ResidualAdd
    ) -> Tensor | None:
        """Partial sums for dscale [rows, channels], or None."""
        dy = given[0]
        assert dy is not None
        division, stripes, partials = Division(self.block, 1, True), 1, None
        period = cdiv(elements, self.block) * self.block
        if self.sums:
            division = divide(places.inner, self.block)
            period = period_length(places.inner * places.channels, division.owned)
            programs = _PROGRAMS * device_facts(dy.device).multiprocessors
            stripes = min(cdiv(elements, period), cdiv(programs, cdiv(period, division.owned)))
            rows = stripes * (period // (places.channels * division.summed))
            partials = torch.empty((rows, places.channels), dtype=compute_dtype(dy.dtype), device=dy.device)
        numbers = (*_numbers(places, problem), problem.alpha, problem.beta)
        self._launcher(division)(
            cdiv(period, division.owned) * stripes, dy.device, given, (*written, partials),
            elements, period // GROUP, stripes, *numbers,
        )  # fmt: skip
        return partials


# A multiprocessor, of those that go down the rows: 16 warps, with three tiles each of dy and x under way.
_PROGRAMS = 4
_MOST_PADDING = 1.125
_MOST_BLOCKS = 8


@functools.cache
def _backward_launcher(sums: bool, kind: _Kind) -> _BackwardLauncher:
    return _BackwardLauncher(sums, kind)


class Division(NamedTuple):
    """What a program of the backward owns of a block, and how many neighbours it sums for dscale: whole runs of a
    channel, or parts of one."""

    owned: int
    summed: int
    whole_runs: bool


@functools.cache
def divide(inner: int, block: int) -> Division:
    """Whole runs of `inner` elements, if some of them fill a block but for an eighth and begin where a group does; else
    parts of them that divide it."""
    unit = math.lcm(inner, GROUP)
    owned = block // unit * unit
    if owned * _MOST_PADDING >= block:
        return Division(owned, inner, True)
    summed = math.gcd(inner, block)
    return Division(block, summed, summed == inner)


@functools.lru_cache(maxsize=4096)
def period_length(columns: int, block: int) -> int:
    """The least multiple of `columns` that is one of GROUP and fills blocks but for an eighth; if none of a few blocks
    does, the one that fills them best."""
    unit = math.lcm(columns, GROUP)
    candidates = range(unit, max(unit, _MOST_BLOCKS * block) + 1, unit)
    return min(candidates, key=lambda period: max(_MOST_PADDING, cdiv(period, block) * block / period))
