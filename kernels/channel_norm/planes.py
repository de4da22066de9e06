"""Which elements a program of the channel family works on, in either layout.

x is [samples, channels, plane], a plane being one channel's positions in one sample. A sample has no gaps: its planes
lie one after the other, or, CHANNELS_LAST, the channels of a position do. A tile is [channels, positions] in both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..epilogue import load_bits, store_bits
from ..tiles import columns_in_runs


@triton.jit
def plane_length(plane_units, PLANE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Elements of a plane: a constant, or a run-time number which, where planes lie one after the other, is a multiple
    of VEC that the compiler can see."""
    if PLANE is not None:
        return PLANE
    elif CHANNELS_LAST:
        return plane_units
    else:
        return plane_units * VEC


@triton.jit
def piece_of_planes(program, pieces, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """(sample, first channel, piece): a program takes one piece of the planes of a block of channels. Programs and
    pieces are int32: a division of int64 takes a hundred instructions."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    block = program // pieces
    return (block // BLOCKS).to(tl.int64), (block % BLOCKS).to(tl.int64) * BLOCK_CHANNELS, program % pieces


@triton.jit
def samples_of_launch(pieces, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """How many samples the programs of `piece_of_planes` have between them."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    return (tl.num_programs(0) // (pieces * BLOCKS)).to(tl.int64)


@triton.jit
def steps_of(piece, plane, steps, BLOCK_PLANE: tl.constexpr, STAGES: tl.constexpr):
    """How many of a piece's tiles begin inside the plane. Without STAGES there is but one."""
    if STAGES == 0:
        return 1
    else:
        return tl.minimum(steps, tl.cdiv(plane - piece * steps * BLOCK_PLANE, BLOCK_PLANE)).to(tl.int32)


@triton.jit
def places(channel, position, plane, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr):
    """(base, col) of the elements of a sample, as `tiles` takes them: of short planes in runs of RUN, if any."""
    if CHANNELS_LAST:
        return channel, position * CHANNELS
    else:
        return channel * plane, columns_in_runs(position, RUN)


@triton.jit
def owners(sample, channel, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, POOLED: tl.constexpr):
    """(statistics, parameter): which of each a channel has. POOLED, the samples share both, and so do the channels of a
    group, which are then columns of one channel (see `views.pooled_planes`)."""
    group = channel // (CHANNELS // GROUPS)
    if POOLED:
        return group, group
    else:
        return sample * GROUPS + group, channel


@triton.jit
def load_of_channels(ptr, channel, in_channels, COMPUTE: tl.constexpr, AXIS: tl.constexpr = 1):
    """One value a channel, a parameter or a statistic, to be broadcast along AXIS; None stays None."""
    if ptr is not None:
        return tl.expand_dims(tl.load(ptr + channel, mask=in_channels, other=0.0).to(COMPUTE), AXIS)


@triton.jit
def runs(
    sample, first_channel, first_position, plane, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PLANE: tl.constexpr,
):  # fmt: skip
    """Where the bit mask of a tile lies, whose rows are runs of neighbours in memory, one plane each or, CHANNELS_LAST,
    one position each: (row, in_rows, first byte of a row, bytes of a row)."""
    if CHANNELS_LAST:
        position = first_position + tl.arange(0, BLOCK_PLANE)
        return sample * plane + position, position < plane, first_channel // 8, (CHANNELS + 7) // 8
    else:
        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
        return sample * CHANNELS + channel, channel < CHANNELS, first_position // 8, (plane + 7) // 8


@triton.jit
def store_plane_bits(
    Bits_ptr, flags, sample, first_channel, first_position, plane, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Packs flags [channels, positions] along the neighbours in memory."""
    row, in_rows, first_byte, row_bytes = runs(
        sample, first_channel, first_position, plane, CHANNELS, CHANNELS_LAST, flags.shape[0], flags.shape[1]
    )
    flags = tl.trans(flags) if CHANNELS_LAST else flags
    store_bits(Bits_ptr, flags, row, first_byte, in_rows, row_bytes)


@triton.jit
def load_plane_bits(
    Bits_ptr, sample, first_channel, first_position, plane, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PLANE: tl.constexpr,
):  # fmt: skip
    """The flags [channels, positions] that `store_plane_bits` packed, or None where there is no mask."""
    if Bits_ptr is not None:
        row, in_rows, first_byte, row_bytes = runs(
            sample, first_channel, first_position, plane, CHANNELS, CHANNELS_LAST, BLOCK_CHANNELS, BLOCK_PLANE
        )
        RUN: tl.constexpr = BLOCK_CHANNELS if CHANNELS_LAST else BLOCK_PLANE
        flags = load_bits(Bits_ptr, row, first_byte, in_rows, row_bytes, RUN)
        return tl.trans(flags) if CHANNELS_LAST else flags
