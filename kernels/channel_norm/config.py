"""How the channel family is launched: tables of tiles. None looks at the number of samples: the bits of a sample must
not depend on the batch around it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import triton

from ..launch import THREADS_PER_WARP, DeviceFacts, cdiv, ragged_rows
from ..tiles import HALF_WARP as _HALF_WARP
from ..views import PooledPlanes, vector_length

HALF_WARP: int = _HALF_WARP.value

# Planes below this many elements compile for their length; longer ones take it at run time, and compile once for each
# power of two up to a tile. A run-time length costs a mask and an addition a tile, which short planes would notice.
SHORT_PLANE = 1024
LONG_PLANE = 2**15  # from which on kernels know nothing of the length


PlaneKind = tuple[int | None, int]


def plane_kind(plane: int) -> PlaneKind:
    """What a compiled kernel knows of a plane: its length, if short; else the power of two above it, up to 32 K."""
    return (plane, 0) if plane < SHORT_PLANE else (None, min(plane - 1, LONG_PLANE - 1).bit_length())


def pooled_plane_kind(planes: PooledPlanes) -> PlaneKind:
    """Rows of a matrix are as many as the batch has, for which nothing may compile anew."""
    return plane_kind(LONG_PLANE if planes.channels_last else planes.plane)


def longest_of(kind: PlaneKind) -> int:
    """The longest plane of a kind, by which its tile is chosen."""
    length, bits = kind
    return 2**bits if length is None else length


def plane_access(kind: PlaneKind, vec: int) -> int:
    """Elements of the widest access to planes of a kind that lie one after the other, where vec is that to samples."""
    length, _ = kind
    return vec if length is None else math.gcd(length, vec)


def half_warp_run(rows: int, columns: int, num_warps: int, access: int) -> int:
    """Elements of a row of a tile that half a warp reads side by side (`tiles.in_runs`), where otherwise each thread
    would have elements of eight rows and more, and rows are of sixteen runs at most, since each has its own mask; else
    0."""
    threads = num_warps * THREADS_PER_WARP
    rows_of_thread = rows * min(threads, columns // access) // threads
    run = HALF_WARP * access
    return run if rows_of_thread >= 8 and run < columns <= 16 * run else 0


def plane_units(plane: int, vec: int, channels_last: bool) -> int:
    """A plane's length as kernels take it (`planes.plane_length`)."""
    return plane if channels_last else plane // vec


@dataclass(frozen=True)
class GroupTile:
    """Whole groups in registers: block_groups, each padded to block_planes planes of block_plane elements."""

    block_groups: int
    block_planes: int
    block_plane: int
    num_warps: int
    most_registers: int | None = None

    def block(self, kind: PlaneKind, vec: int) -> tuple[int, int, int, int]:
        """As kernels take it, of planes of this kind, where the widest access to samples is of vec elements."""
        rows = self.block_groups * self.block_planes
        run = half_warp_run(rows, self.block_plane, self.num_warps, plane_access(kind, vec))
        return self.block_groups, self.block_planes, self.block_plane, run


@dataclass(frozen=True)
class PieceTile:
    """A piece of planes: some tiles of block_channels x block_plane elements, one after the other."""

    block_channels: int
    block_plane: int
    num_warps: int
    most_registers: int | None
    stages: int  # of the software pipeline over the tiles; 0 where a plane is one

    def block(self, kind: PlaneKind, vec: int, channels_last: bool) -> tuple[int, int, int]:
        """As kernels take it, of planes of this kind, where the widest access to samples is of vec elements."""
        run = 0
        if not channels_last:
            run = half_warp_run(self.block_channels, self.block_plane, self.num_warps, plane_access(kind, vec))
        return self.block_channels, self.block_plane, run


def _padded(length: int) -> int:
    return max(8, triton.next_power_of_2(length))  # 8: the bits of a mask fill whole bytes


class GroupPlanes(NamedTuple):
    """The groups of a sample whose planes lie one after the other: the planes of each, and their length."""

    channels: int
    plane: int


def group_planes(channels: int, groups: int, kind: PlaneKind) -> GroupPlanes:
    """The groups of planes of a kind."""
    return GroupPlanes(channels // groups, longest_of(kind))


def widest_access(itemsize: int, channels: int, plane: int, channels_last: bool, *strides: int) -> int:
    """Elements of the widest access, 16 bytes at most, that run-time numbers of the kernels allow: the strides of
    samples, and the length of a plane where that is one."""
    if channels_last:
        return vector_length(itemsize, channels, *strides)
    return vector_length(itemsize, *strides) if plane < SHORT_PLANE else vector_length(itemsize, plane, *strides)


def _group_tile(of: GroupPlanes, itemsize: int, elements_per_thread: int, longest: int) -> GroupTile | None:
    """A tile of at least 128 threads, or None where a group has more than `longest` elements."""
    block_planes, block_plane = triton.next_power_of_2(of.channels), _padded(of.plane)
    padded = block_planes * block_plane
    if padded > longest:
        return None
    block_groups = max(1, 128 * elements_per_thread // padded)
    num_warps = max(1, block_groups * padded // (elements_per_thread * THREADS_PER_WARP))
    return GroupTile(block_groups, block_planes, block_plane, num_warps)


@functools.cache
def group_forward_tile(of: GroupPlanes, itemsize: int, waiting: int, drops: bool = False) -> GroupTile | None:
    """Tile of the forward that reads a group once, or None where it has to be cut into pieces. waiting: the tensors of
    x's size that are in registers at once, x and a residual. drops: elements draw whether they are kept. Elements with
    addresses of their own, and those that draw beside masks of their own, take so many registers that a thread has half
    as many."""
    longest = {2: 16384, 4: 16384 if waiting == 1 else 8192, 8: 2048}[itemsize]
    elements_per_thread = {2: 32, 4: 16, 8: 4}[itemsize]
    if of.plane * itemsize % (16 if drops else 4):
        longest, elements_per_thread = longest // 2, elements_per_thread // 2
    elif drops and itemsize == 4:  # 32 warps leave them too few
        longest //= 2
    return _group_tile(of, itemsize, elements_per_thread, longest)


@functools.cache
def group_backward_tile(of: GroupPlanes, itemsize: int, crowded: bool, residual: bool) -> GroupTile | None:
    """Tile of the backward that reads a group once, or None where it has to be cut into pieces. crowded: a slope takes
    more than two values, the gradient of a total is read, or float32 beside 16 bits, or dresidual is written; residual:
    one is read, to compute z again."""
    longest = {2: 8192, 4: 4096 if residual else 8192, 8: 1024}[itemsize]
    tile = _group_tile(of, itemsize, {2: 16, 4: 16, 8: 4}[itemsize], longest)
    # Of 16 warps but one program would fit.
    if tile is not None and itemsize == 2 and not crowded and not residual and tile.num_warps == 16:
        return replace(tile, num_warps=8, most_registers=128)
    return tile


@dataclass(frozen=True)
class ChannelTile:
    """All rows, padded to block_rows, of the columns of block_channels channels, those of each padded to a power of
    two: block_columns together. full: the rows are as many as block_rows."""

    block_channels: int
    block_rows: int
    block_columns: int
    full: bool
    num_warps: int

    @property
    def block(self) -> tuple[int, int, int, bool]:
        """As kernels take it."""
        return self.block_channels, self.block_rows, self.block_columns, self.full


_FEW = 128 * 8  # elements


def _channel_tile(rows: int, spread: int, itemsize: int, elements_per_thread: int, longest: int) -> ChannelTile | None:
    """As few channels as make runs of whole bytes of bits and of 16 bytes, or, one column each, of a sector's 32; and
    eight elements for each of 128 threads: calls of so few are soon done if many programs share them, and many threads.
    """
    block_channels = 8 // math.gcd(8, spread) if spread > 1 else max(8, 32 // itemsize)
    block_rows = triton.next_power_of_2(rows)
    while True:
        block_columns = block_channels * triton.next_power_of_2(spread)
        elements = block_rows * block_columns
        if elements >= _FEW:
            break
        block_channels *= 2
    if elements > longest:
        return None
    if elements == _FEW:
        elements_per_thread = min(8, elements_per_thread)
    num_warps = max(1, elements // (elements_per_thread * THREADS_PER_WARP))
    return ChannelTile(block_channels, block_rows, block_columns, rows == block_rows, num_warps)


@functools.cache
def batch_forward_tile(
    rows: int, spread: int, itemsize: int, waiting: int, added: bool, smooth: bool, drops: bool
) -> ChannelTile | None:
    """Tile of the forward that reads a channel once, `spread` columns of `rows`, or None where it has to be cut into
    pieces. waiting and drops as in `group_forward_tile`. added: the residual is a part of what is normalized; smooth:
    the activation has a slope of more than two values."""
    longest = {2: 16384, 4: 16384 if waiting == 1 else 8192, 8: 2048}[itemsize]
    elements_per_thread = {2: 32, 4: 16, 8: 4}[itemsize]
    if drops or rows == 1:  # of more, some bytes spill
        longest, elements_per_thread = longest // 2, elements_per_thread // 2
    if itemsize == 2 and rows.bit_count() > 1 and (added or 1 < spread < 32 or (waiting == 2 and smooth)):
        longest = min(longest, 8192)  # checks of bounds take registers, too
    return _channel_tile(rows, spread, itemsize, elements_per_thread, longest)


@functools.cache
def batch_backward_tile(rows: int, spread: int, itemsize: int, crowded: bool, residual: bool) -> ChannelTile | None:
    """Tile of the backward that reads a channel once, or None. crowded and residual as in `group_backward_tile`,
    but that dresidual finds room."""
    longest = {2: 8192, 4: 4096 if residual else 8192, 8: 1024}[itemsize]
    tile = _channel_tile(rows, spread, itemsize, {2: 16, 4: 16, 8: 4}[itemsize], longest)
    if tile is None and itemsize == 2 and not crowded:  # nor masks of rows: registers have room for twice as many
        twice = _channel_tile(rows, spread, itemsize, elements_per_thread=32, longest=2 * longest)
        tile = twice if twice is not None and twice.full else None
    return tile


# Of a piece at least: tiles of the forward's, bytes of a tensor of the backward's; and bytes of each of its channels,
# whose partial results then weigh little beside them. Of planes that a program walks along in small tiles up to four
# times as many, as long as a plane has four pieces: a sixteenth faster on an H200.
LEAST_FORWARD_TILES = 4
LEAST_BACKWARD_BYTES = 16384
LEAST_CHANNEL_BYTES = 256
# Of a sample: enough to fill a device with one, few enough to be merged by one program a group.
MOST_PIECES = 2048
BACKWARD_PROGRAMS = 16  # a multiprocessor, where there is work for so many


def _piece_tile(
    channels: int, plane: int, itemsize: int, channels_last: bool, tile_bytes: int, thread_bytes: int
) -> PieceTile:
    """A tile of so many bytes of a tensor, so many of them a thread.

    channels_last, a thread has eight channels and the values of each, which takes registers: smaller programs, of which
    more fit, and which load tiles ahead.
    """
    elements = tile_bytes // itemsize
    if channels_last:
        block_channels = _block_of_channels(channels, itemsize)
        block_plane = max(8, elements // block_channels)
    else:
        block_plane = min(_padded(plane), elements)
        block_channels = min(elements // block_plane, triton.next_power_of_2(channels))
    threads = block_channels * block_plane * itemsize // thread_bytes
    num_warps = max(1, threads // THREADS_PER_WARP)
    stages = 0 if plane <= block_plane else 4 if channels_last else 1
    return PieceTile(block_channels, block_plane, num_warps, 144 if channels_last else None, stages)


def _in_runs(plane: int, itemsize: int, tile_bytes: int, thread_bytes: int) -> bool:
    """Whether half warps take runs of planes of such tiles, so that a thread has few of them."""
    block_plane = min(_padded(plane), tile_bytes // itemsize)
    num_warps = tile_bytes // thread_bytes // THREADS_PER_WARP
    access = math.gcd(plane, 16 // itemsize)
    return half_warp_run(tile_bytes // itemsize // block_plane, block_plane, num_warps, access) > 0


# Of the channels that are columns of a matrix, several of each channel (see `views.pooled_planes`): of smaller programs
# more overlap, a sixth faster on an H200.
_SPREAD_TILE_BYTES = 2048


@functools.cache
def forward_piece_tile(
    channels: int,
    plane: int,
    itemsize: int,
    channels_last: bool,
    drops: bool = False,
    spread: bool = False,
    mixes: bool = False,
) -> PieceTile:
    """Tile of the forward's passes over pieces, as fast as were found on an H200: of planes up to 8 KB one tile, 64
    bytes a thread; of longer ones many small programs. drops: each element draws whether it is kept, which takes so
    many registers that a thread has 16 bytes. spread: channels are several columns each. mixes: statistics are mixed
    here for each plane. Where elements have addresses of their own, of channels side by side or beside a mixture but
    for short planes, a thread has half as many."""
    one_tile = not channels_last and plane * itemsize <= 8192
    tile_bytes = _SPREAD_TILE_BYTES if spread else 8192 if one_tile else 4096 if channels_last else 2048
    thread_bytes = 64 if (one_tile or channels_last) and not spread and itemsize < 8 else 32
    if channels_last:
        ragged = ragged_rows(channels, itemsize)
    else:
        ragged = mixes and plane * itemsize % 4 > 0 and not _in_runs(plane, itemsize, tile_bytes, thread_bytes)
    if ragged:
        thread_bytes = 32
    if drops:
        tile_bytes, thread_bytes = tile_bytes // 2, 16
    return _piece_tile(channels, plane, itemsize, channels_last, tile_bytes, thread_bytes)


@functools.cache
def backward_piece_tile(
    channels: int,
    plane: int,
    itemsize: int,
    channels_last: bool,
    mixed: bool = False,
    drops: bool = False,
    spread: bool = False,
    mixes: bool = False,
) -> PieceTile:
    """Tile of the backward's passes over pieces: 8 KB of a tensor, 4 KB where registers are short, 32 bytes a thread.

    mixed: beside 16-bit tensors float32 ones are read, which take more of them, and with `mixes` and addresses of their
    own so many that a thread has half as many elements. drops, spread and mixes as in `forward_piece_tile`.
    """
    tile_bytes = _SPREAD_TILE_BYTES if spread else 4096 if channels_last or mixed else 8192
    thread_bytes = 32
    if mixes and mixed and plane * itemsize % 4:
        thread_bytes = 16
    elif mixes and not (mixed or channels_last or itemsize == 8):
        wide = plane * itemsize % 16 == 0 or _in_runs(plane, itemsize, tile_bytes, thread_bytes=64)
        thread_bytes = 64 if wide else 32  # every thread works out what is mixed, for all of its elements
    if drops:
        tile_bytes, thread_bytes = tile_bytes // 2, 16
    return _piece_tile(channels, plane, itemsize, channels_last, tile_bytes, thread_bytes)


def forward_steps(plane: int, itemsize: int, tile: PieceTile) -> int:
    """Tiles of a piece: of the plane's length alone, so that a sample's bits do not depend on the batch."""
    least = LEAST_FORWARD_TILES
    if tile.stages == 1:
        least = min(max(least, cdiv(plane, tile.block_plane) // 4), 4 * least)
    return _steps(plane, itemsize, tile, least, MOST_PIECES)


def backward_steps(plane: int, itemsize: int, tile: PieceTile, blocks: int, facts: DeviceFacts) -> int:
    """Tiles of a piece, where there are as many blocks of channels in all samples."""
    least = _least_backward_steps(itemsize, tile)
    return _steps(plane, itemsize, tile, least, cdiv(BACKWARD_PROGRAMS * facts.multiprocessors, blocks))


def pieces_of_forward(kind: PlaneKind, itemsize: int, tile: PieceTile) -> int | None:
    """About how many pieces a plane of this kind has in the forward; None where they may be many."""
    plane = longest_of(kind)
    return None if plane == LONG_PLANE else cdiv(plane, tile.block_plane * forward_steps(plane, itemsize, tile))


def pieces_of_backward(kind: PlaneKind, itemsize: int, tile: PieceTile) -> int | None:
    """The same of the backward, at most, as of few samples."""
    plane = longest_of(kind)
    steps = _steps(plane, itemsize, tile, _least_backward_steps(itemsize, tile), most_pieces=plane)
    return None if plane == LONG_PLANE else cdiv(plane, tile.block_plane * steps)


def _least_backward_steps(itemsize: int, tile: PieceTile) -> int:
    return cdiv(LEAST_BACKWARD_BYTES, tile.block_channels * tile.block_plane * itemsize)


def _steps(plane: int, itemsize: int, tile: PieceTile, least: int, most_pieces: int) -> int:
    of_channel = cdiv(LEAST_CHANNEL_BYTES, tile.block_plane * itemsize)
    return max(least, of_channel, cdiv(cdiv(plane, tile.block_plane), most_pieces))


class Merged(NamedTuple):
    """Partial results that a program of switchable norm merges at a time: pieces of planes, those of a sample, rows of
    channels."""

    pieces: int
    planes: int
    of_sample: int
    rows: int
    channels: int


MERGED = Merged(pieces=16, planes=64, of_sample=1024, rows=128, channels=8)


def merge_tile(pieces: int | None) -> Merged:
    """How the partial results of planes with about so many pieces are merged, None: any number."""
    block = MERGED.pieces if pieces is None else min(MERGED.pieces, triton.next_power_of_2(pieces))
    return MERGED._replace(pieces=block, planes=MERGED.planes * (MERGED.pieces // block))


def _block_of_channels(channels: int, itemsize: int) -> int:
    """Channels side by side in a tile: up to 256 bytes, without a remainder where a power of two allows."""
    divisor = channels & -channels
    if divisor * itemsize >= 128:
        return min(divisor, 256 // itemsize)
    return min(_padded(channels), 256 // itemsize)
