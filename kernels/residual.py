"""Launches the residual stream: one launch forward; backward one, and another where a scale learns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .activations import ACTIVATIONS
from .column_sum import column_sum_of_any_span
from .dropout import rate
from .launch import THREADS_PER_WARP, cdiv, device_facts
from .launcher import Launcher, Tensors
from .problem import ResidualAdd, Tensor, compute_dtype
from .residual_kernels import residual_add_backward_kernel, residual_add_forward_kernel
from .views import Arrangement, arranged, columns, lies, memory_arrangement

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
    return plan_forward(x, residual, scale, seed, problem, save_bits)(x, residual, scale, seed)


def plan_forward(
    x: Tensor, residual: Tensor, scale: Tensor | None, seed: Tensor | None, problem: ResidualAdd, save_bits: bool
) -> Callable[..., Added]:
    """`residual_add_forward` of all tensors of these shapes that lie as these do: a function of the four."""
    if x.numel() == 0:
        return lambda x, residual, *_: allocate(x, residual, save_bits)
    strides = strides_of_sum(x)
    types = *_types(x, residual, scale, seed), residual.dtype, torch.uint8 if save_bits else None
    places, launch, block = _forward_plan(x.shape, strides, _shape_of(scale), _kind(problem), types)
    programs = cdiv(places.elements, block)
    numbers = (places.elements, *places.numbers, *_drops(problem), problem.alpha, problem.beta)

    as_they_lie = lies(x, places) and lies(residual, places) and strides == places.strides and columns(scale) is scale

    def run(x: Tensor, residual: Tensor, scale: Tensor | None, seed: Tensor | None) -> Added:
        y, bits = out = allocate(x, residual, save_bits)
        written = y
        if not as_they_lie:
            x, residual, scale = arranged(x, places), arranged(residual, places), columns(scale)
            written = arranged(y, places, copy=False)
        launch(programs, y.device, (x, residual, scale, seed), (written, bits), *numbers)
        if written is not y:
            y.copy_(written)
        return out

    return run


def strides_of_sum(x: Tensor) -> tuple[int, ...]:
    """Those of y, whose layout is x's."""
    return torch.empty_like(x, device="meta").stride()


def _types(*tensors: Tensor | None) -> Types:
    return tuple([None if tensor is None else tensor.dtype for tensor in tensors])


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
    if problem.activation is None or bits is not None:  # z is not computed again
        residual = None
        x = x if wanted.dscale else None
    read = (dy, x, residual, bits, scale, seed)
    types = _types(*read, dx, dresidual)
    places, launch = _backward_plan(dy.shape, tuple(strides), _shape_of(scale), wanted.dscale, _kind(problem), types)
    activations = [None if tensor is None else arranged(tensor, places) for tensor in (dy, x, residual)]
    given = (*activations, None if bits is None else columns(bits), columns(scale), seed)
    written = [None if to is None else arranged(to, places, copy=False) for to in (dx, dresidual)]
    partials = launch(places, given, written, (*places.numbers, *_drops(problem), problem.alpha, problem.beta))
    for to, values in zip((dx, dresidual), written, strict=True):
        if to is not None and values is not to:
            to.copy_(values)  # type: ignore[arg-type]
    if partials is None or scale is None:
        return SumGradients(dx, dresidual, None)
    return SumGradients(dx, dresidual, _sum_rows(partials, scale.dtype).view(scale.shape))


def _sum_rows(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [channels] of partial sums [rows, channels]; of many rows at first some, as rows of so many more columns,
    because few channels are work for few programs."""
    rows, channels = partials.shape
    most = _ROWS * device_facts(partials.device).multiprocessors
    while (some := _rows_at_first(rows, most)) > 1:
        partials = column_sum_of_any_span(partials.view(some, -1), partials.dtype)
        rows //= some
    return column_sum_of_any_span(partials.view(rows, channels), dtype)


@functools.lru_cache(maxsize=256)
def _rows_at_first(rows: int, most: int) -> int:
    """The divisor of `rows` next below its root, where they are more than `most`; 1 where there is none."""
    return next((some for some in range(math.isqrt(rows), 1, -1) if rows % some == 0), 1) if rows > most else 1


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
    places = memory_arrangement(tuple(like.shape), tuple(strides), _shape_of(scale), drops=seed is not None)
    flags = ((bits.unsqueeze(-1) >> torch.arange(GROUP, dtype=torch.uint8, device=bits.device)) & 1).flatten().bool()
    return flags.as_strided(like.shape, places.strides)


def _shape_of(scale: Tensor | None) -> torch.Size | None:
    return None if scale is None else scale.shape


@functools.lru_cache(maxsize=256)
def _drop_numbers(dropout_p: float, drop_path_p: float) -> tuple[int, int, float, float]:
    elements, samples = rate(dropout_p), rate(drop_path_p)
    return elements.threshold, samples.threshold, elements.factor, samples.factor


def _drops(problem: ResidualAdd) -> tuple[int, int, float, float]:
    """The arguments of both kernels that tell what is dropped."""
    return _drop_numbers(problem.dropout_p, problem.drop_path_p)


# --- what calls of one kind, shape and layout have in common -------------------------------------------------------

Types = tuple[torch.dtype | None, ...]  # None without the tensor


class _Kind(NamedTuple):
    activation: str | None
    drops_elements: bool
    drops_samples: bool

    def variant(self, places: Arrangement) -> tuple[Any, ...]:
        """The constants of both kernels but for the activation."""
        shared = None
        if places.inner % GROUP == 0:
            shared = "one"
        elif places.inner >= GROUP:
            shared = "two"
        elif places.inner == 1 and places.channels % GROUP == 0:
            shared = "next"
        share_sample = places.sample_size % GROUP == 0
        ragged = places.elements % GROUP != 0
        return ragged, shared, self.drops_elements, self.drops_samples, places.channels_last, share_sample


def _kind(problem: ResidualAdd) -> _Kind:
    return _Kind(problem.activation, problem.dropout_p > 0, problem.drop_path_p > 0)


@functools.lru_cache(maxsize=4096)
def _forward_plan(
    shape: torch.Size, strides: tuple[int, ...], scale: torch.Size | None, kind: _Kind, types: Types
) -> tuple[Arrangement, Launcher, int]:
    """Where elements lie, the launcher, and the elements of each of its programs."""
    places = memory_arrangement(shape, strides, scale, drops=types[3] is not None)
    launch, block = _forward_launcher(kind.activation, kind.variant(places), types)
    return places, launch, block


@functools.lru_cache(maxsize=4096)
def _backward_plan(
    shape: torch.Size, strides: tuple[int, ...], scale: torch.Size | None, sums: bool, kind: _Kind, types: Types
) -> tuple[Arrangement, _BackwardLauncher]:
    places = memory_arrangement(shape, strides, scale, drops=types[5] is not None)
    return places, _backward_launcher(sums, kind.activation, kind.variant(places), types)


_WARPS = 4


def _block(types: Types) -> int:
    """Elements of a program: 32 bytes a thread of every tensor, of which half a multiprocessor's threads have 32 KB and
    more in flight."""
    widest = max(dtype.itemsize for dtype in types[:2] if dtype is not None)
    return _WARPS * THREADS_PER_WARP * 32 // widest


@functools.cache
def _forward_launcher(activation: str | None, variant: tuple[Any, ...], types: Types) -> tuple[Launcher, int]:
    functions, block = ACTIVATIONS[activation], _block(types)
    passes = functions.passes if types[-1] is not None else None
    return Launcher(residual_add_forward_kernel, _WARPS, *variant, functions.value, passes, block), block


class _BackwardLauncher:
    """A block of neighbours a program; where a scale learns, blocks of a period that several programs go down."""

    def __init__(self, sums: bool, activation: str | None, variant: tuple[Any, ...], types: Types) -> None:
        self.sums = sums
        # Who reads dy alone needs all programs that a multiprocessor can have, with few registers each.
        reads_dy_alone = types[1:3] == (None, None)
        self.block = _block(types) // (2 if reads_dy_alone else 1)
        _, slope, passes = ACTIVATIONS[activation]
        self.constants = (*variant, slope, passes, self.block, 3 if sums else 1)
        self.launchers: dict[Division, Launcher] = {}

    def _launcher(self, division: Division) -> Launcher:
        launch = self.launchers.get(division)
        if launch is None:
            launch = Launcher(residual_add_backward_kernel, _WARPS, *self.constants, *division)
            self.launchers[division] = launch
        return launch

    def __call__(
        self, places: Arrangement, given: Tensors, written: Sequence[Tensor | None], numbers: tuple[float, ...]
    ) -> Tensor | None:
        """Partial sums for dscale [rows, channels], or None."""
        dy, elements = given[0], places.elements
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
        self._launcher(division)(
            cdiv(period, division.owned) * stripes, dy.device, given, (*written, partials),
            elements, period // GROUP, cdiv(elements, period), stripes, *numbers,
        )  # fmt: skip
        return partials


# A multiprocessor, of those that go down the rows: 16 warps, with three tiles each of dy and x under way.
_PROGRAMS = 4
# Rows of partial sums for each multiprocessor that one launch sums, whose programs wait for some hundreds at a time.
_ROWS = 32
_MOST_PADDING = 1.125
_MOST_BLOCKS = 8


@functools.cache
def _backward_launcher(sums: bool, activation: str | None, variant: tuple[Any, ...], types: Types) -> _BackwardLauncher:
    return _BackwardLauncher(sums, activation, variant, types)


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
