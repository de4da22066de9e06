"""Launches the backward of the channel family: whole groups in one launch and a sum of partials, pieces in three."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..column_sum import column_sum
from ..dropout import drop_numbers
from ..launch import cdiv
from ..launcher import Launcher, Tensors
from ..problem import BatchNorm, Gradients, GroupNorm, SwitchNorm, Tensor, Wanted, plan_needed, without_elements
from ..views import Samples, View, empty_samples, plan_reading
from .backward_kernels import channel_norm_backward_kernel
from .backward_pieces import BackwardKind, BackwardPieces, Floats, Pair, Strides
from .config import group_backward_tile, plane_kind, plane_units, widest_access

Schedule = Callable[[int, int, Tensors, Pair, Strides, Floats], Pair]


def group_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm: GroupNorm,
    wanted: Wanted,
) -> Gradients:
    """The wanted gradients, in two launches, or three where groups are too large to hold or their elements lie apart.

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
    norm: GroupNorm,
    wanted: Wanted,
) -> Callable[..., Gradients]:
    """`group_norm_backward` of all tensors that lie as these do: a function of the seed and of them."""
    groups, channels_last, _, add_first, activation, alpha, beta, dropout_p, seed = norm
    samples, channels, *positions = dy.shape
    plane = math.prod(positions)
    if dy.numel() == 0:
        return without_elements(allocate_gradients, norm, wanted)
    tensors = (dy, dtotal, x, residual, bits, weight, bias, mean, rstd, seed)
    read, units, vec, dtypes = plan_operands(
        tensors, norm, wanted, (channels, plane, channels_last), Samples(channels_last)
    )
    kind = (channels, groups, plane_kind(plane), channels_last, False, False, vec, add_first, activation, wanted)
    schedule = _schedule(*kind, *dtypes)
    floats = (*drop_numbers(seed, dropout_p, plane), alpha, beta)
    norm = norm._replace(seed=None)  # that of each call is its own

    def run(seed: Tensor | None, dy: Tensor, dtotal: Tensor | None, x: Tensor | None, *others: Any) -> Gradients:
        out = allocate_gradients(dy, x, norm, wanted)
        given = read((dy, dtotal, x, *others, seed))
        return Gradients(*out, *schedule(samples, plane, given, out, units, floats))

    return run


class Operands(NamedTuple):
    """What a backward reads, as kernels take it: a function of dy and what follows it, the seed last; strides of
    samples in units of vec elements, and the types of `BackwardKind`."""

    read: Callable[[Tensors], Tensors]
    strides: Strides
    vec: int
    dtypes: list[Any]


def plan_operands(
    tensors: Tensors,
    norm: GroupNorm | BatchNorm | SwitchNorm,
    wanted: Wanted,
    sizes: tuple[int, int, bool],
    view: View,
    reads_x: bool = True,
) -> Operands:
    """The operands of calls on `tensors`, dy and what follows it in `group_norm_backward`, then the seed; `sizes` are
    the channels of a sample, the length of a plane and whether channels lie last, as the view shows them."""
    dy, _, _, _, bits, _, bias, *_ = tensors
    assert dy is not None
    needed = plan_needed(norm, wanted, bits, reads_x)
    given = needed(tensors)
    # What was saved may come back in another layout, from whoever packed it.
    strides, read = plan_reading(view, given, activations=4)
    channels, plane, _ = sizes
    # What is written has no gaps, and may be read again.
    vec = widest_access(dy.element_size(), *sizes, *strides, channels * plane)
    dtypes = [None if tensor is None else tensor.dtype for tensor in (*given, bias)]  # bias: read or not, dbias's type
    return Operands(lambda tensors: read(needed(tensors)), [stride // vec for stride in strides], vec, dtypes)


def allocate_gradients(dy: Tensor, x: Tensor | None, norm: GroupNorm | BatchNorm | SwitchNorm, wanted: Wanted) -> Pair:
    """(dx, dresidual), each where wanted, nothing in them yet; x is what was normalized."""
    dtype = x.dtype if norm.add_first and x is not None else dy.dtype
    dx = empty_samples(dy, norm.channels_last) if wanted.dx else None
    return dx, empty_samples(dy, norm.channels_last, dtype) if wanted.dresidual else None


# --- schedules, one for each kind of call --------------------------------------------------------------------------


@functools.cache
def _schedule(*fields: Any) -> Schedule:
    kind = BackwardKind(*fields)
    tile = None
    if not kind.channels_last:
        crowded, is_read = kind.crowded or kind.wanted.dresidual, kind.residual is not None
        tile = group_backward_tile(kind.group_planes, kind.dy.itemsize, crowded, is_read)
    if tile is None:
        return BackwardPieces(kind)
    block_groups = tile.block_groups
    constants = (kind.channels, kind.groups, kind.plane[0], kind.vec, kind.add_first, kind.needs_dx, *kind.slope)
    block = tile.block(kind.plane, kind.vec)
    launch = Launcher(
        channel_norm_backward_kernel, tile.num_warps, *constants, *block, most_registers=tile.most_registers
    )

    def whole_groups(samples: int, plane: int, given: Tensors, out: Pair, strides: Strides, floats: Floats) -> Pair:
        device = given[0].device  # type: ignore[union-attr]
        partials = kind.partials((samples, kind.channels), device, both=False)
        groups = samples * kind.groups
        launch(
            cdiv(groups, block_groups), device, given, (*out, *partials),
            groups, *strides, plane_units(plane, kind.vec, False), *floats,
        )  # fmt: skip
        return column_sum(*partials, kind.weight, kind.dbias)

    return whole_groups
