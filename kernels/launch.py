"""How a kernel is launched: how many warps, rows and programs, as tables.

Configurations are pure functions of span, element size and the operands; of the device, only how many programs share
the work and how many tiles are loaded ahead. None looks at the number of rows to choose a warp count or a block size:
the bits that forward gives a row must not depend on the batch around it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton

THREADS_PER_WARP = 32  # what a warp count means here; the launcher converts it for devices with wider warps


class DeviceFacts(NamedTuple):
    """What a schedule needs to know of a device. registers: of a multiprocessor, 32 bits each. shared_bytes: the most
    that a program may have for tiles that are loaded ahead."""

    multiprocessors: int
    l2_bytes: int
    registers: int = 65536
    shared_bytes: int = 227 << 10


# CPU tensors reach a kernel only interpreted, or under a driver that compiles for a GPU which is not there.
H200 = DeviceFacts(multiprocessors=132, l2_bytes=50 << 20)
_absent_device = H200


@contextlib.contextmanager
def assume_device(facts: DeviceFacts) -> Iterator[None]:
    """Schedules CPU tensors as for a device with these facts, an H200 otherwise."""
    global _absent_device
    previous, _absent_device = _absent_device, facts
    try:
        yield
    finally:
        _absent_device = previous


def device_facts(device: torch.device) -> DeviceFacts:
    """The facts of a device, by torch's properties; of the assumed one for CPU tensors."""
    return _present_facts(device) if is_gpu(device) else _absent_device


@functools.cache
def is_gpu(device: torch.device) -> bool:
    """Asked of every launch, and a device takes long to tell its type."""
    return device.type == "cuda"


@functools.cache
def _present_facts(device: torch.device) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(device)
    registers = getattr(properties, "regs_per_multiprocessor", 65536)  # an attribute that torch's stubs lack
    # AMD's pipeline keeps tiles in registers.
    shared = 160 << 10 if torch.version.hip else getattr(properties, "shared_memory_per_block_optin", 48 << 10)
    l2_bytes = properties.L2_cache_size
    if torch.version.hip and "gfx942" in properties.gcnArchName:
        l2_bytes *= cdiv(properties.multi_processor_count, 38)  # of one die, which has 38; a program stays on its own
    return DeviceFacts(properties.multi_processor_count, l2_bytes, registers, shared)


# --- configurations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowConfig:
    """Whole rows in registers: tiles of block_rows x block_span."""

    block_rows: int
    block_span: int
    num_warps: int
    stages: int = 1  # of the software pipeline over tiles, where a program takes several
    most_registers: int | None = None  # a thread; left alone, ptxas takes so many that fewer programs fit


@dataclass(frozen=True)
class ChunkConfig:
    """A row in chunks of steps * block_span elements."""

    block_span: int
    steps: int
    chunks: int
    num_warps: int
    most_registers: int  # as in RowConfig
    parts: int = 1  # of a tile, in which it is normalized one after the other


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def registers_a_thread(num_warps: int, most: int = 255) -> int:
    """`most`, or as many as a program of so many warps can have."""
    return min(most, 65536 // (num_warps * THREADS_PER_WARP))


def more_registers(num_warps: int, registers: int) -> int | None:
    """The bound of a thread in a program that spills with so many registers: what it can have if as many programs as
    possible fit with 16 more. None where there are no more."""
    granted = 8 * cdiv(registers, 8)
    programs = max(1, 65536 // (num_warps * THREADS_PER_WARP * (granted + 16)))
    more = registers_a_thread(num_warps * programs)
    return more if more > registers else None


def _padded_span(span: int) -> int:
    return max(8, triton.next_power_of_2(span))  # 8: the bits of a mask fill whole bytes


def _row_tile(
    span: int,
    elements_per_thread: int,
    least_rows: int = 1,
    stages: int = 1,
    most_registers: int | None = None,
    least_threads: int = 128,
) -> RowConfig:
    """A tile of at least so many threads and rows."""
    block_span = _padded_span(span)
    block_rows = max(least_rows, least_threads * elements_per_thread // block_span)
    num_warps = block_rows * block_span // (elements_per_thread * THREADS_PER_WARP)
    return RowConfig(block_rows, block_span, num_warps, stages, most_registers)


def ragged_rows(span: int, itemsize: int) -> bool:
    """Whether rows begin between 16-byte boundaries; an element's address and mask then take registers of their own."""
    return span % (16 // itemsize) != 0


def _mixed(itemsize: int, loaded_bytes: int) -> bool:
    """Whether a backward of 16-bit x reads float32 tensors as well: a total, and its gradient."""
    return itemsize == 2 and loaded_bytes > 3 * itemsize


# Of a program's shared memory: the most for tiles, since a loop over larger ones spills, and what reductions take.
_MOST_TILE_BYTES = 160 << 10
_SCRATCH_BYTES = 2 << 10


def _loads_ahead(block_span: int, loaded_bytes: int, shared_bytes: int) -> bool:
    """Whether two tiles, of so many bytes a column, find room in shared memory while a third is worked on."""
    return 2 * block_span * loaded_bytes <= min(shared_bytes - _SCRATCH_BYTES, _MOST_TILE_BYTES)


# The longest rows that are held whole are the longest that do not spill, for any activation, residual and parameter
# type, on sm_80, sm_90, sm_100 and gfx942, with Triton 3.6, 3.7 and 3.9: one table for all of them.


@functools.cache
def row_forward_config(
    span: int,
    itemsize: int,
    waiting: int,
    parameters: int,
    parameter_itemsize: int = 0,
    added: bool = False,
    wide_residual: bool = False,
) -> RowConfig | None:
    """Tile of the forward kernel that holds whole rows, or None where a row has to be cut into chunks.

    Until the statistics are there, registers hold `waiting` tensors of x's size, x or the total and a residual that is
    added afterwards, and `parameters` ones, weight and bias, parameter_itemsize being the wider one's, 0 without
    either. added: a residual is a part of what is normalized. wide_residual: it has a wider type than x, and so has the
    total.
    """
    crowded = waiting + parameters == 4
    wide_parameters = parameter_itemsize > itemsize
    if itemsize == 2:
        longest = 8192 if crowded and wide_parameters else 16384
        if waiting + parameters >= 3 and not added:  # above, only one program fits: a walk takes two thirds of its time
            longest = min(longest, 12288)
    else:
        longest = {4: 8192 if crowded else 16384, 8: 2048}[itemsize]
    ragged = ragged_rows(span, itemsize)
    if ragged:
        longest = min(longest, 8192)
    if span > longest:
        return None
    if itemsize == 8:
        return _row_tile(span, elements_per_thread=4)  # one row will do, as weights are no wider than x
    # 64 bytes of x a thread, so that the programs that fit have 64 KB and more in flight on a multiprocessor. Half of
    # that where a residual waits beside it in a longer row, or where each element has an address and a mask of its own.
    small = 1024 < span <= 4096 and waiting == 2 and itemsize == 2
    elements_per_thread = 16 if small or (ragged and span <= 1024) else 64 // itemsize
    if ragged or itemsize == 4:
        two_rows = span <= 4096 and not wide_residual and (wide_parameters or waiting == 1 or itemsize == 4)
        return _row_tile(span, elements_per_thread, least_rows=2 if two_rows else 1)
    # Of 16 bits one row, or as many as fill a warp: up to 1024 elements no warp waits for another's sum. Each row reads
    # weight and bias again, from the L1 cache, which on an H200 costs less than sums across warps (h200-variants.txt).
    return _row_tile(span, elements_per_thread, least_threads=THREADS_PER_WARP)


def row_backward_config(
    span: int, itemsize: int, operands: int, loaded_bytes: int, shared_bytes: int
) -> RowConfig | None:
    """Tile of the backward kernel that holds whole rows, or None where a row has to be cut into chunks.

    operands counts what a program keeps in registers, or has no registers to spare for, while it goes down the rows:
    weight, bias, the sums for dweight and dbias, and the bit mask. A bias is kept only to compute z again. loaded_bytes
    are those of an element of every tensor of x's size that it reads, shared_bytes what a program may have.
    """
    # Without parameters a residual is read only where z is computed again.
    crowded = operands >= 4 or (operands == 0 and itemsize == 2 and loaded_bytes > 2 * itemsize)
    longest = {2: 4096 if crowded else 8192, 4: 4096 if crowded else 8192, 8: 1024}[itemsize]
    if ragged_rows(span, itemsize):
        longest = min(longest, 2048)
    elif _mixed(itemsize, loaded_bytes):
        longest = 2048 if operands >= 3 else 4096
    if span > longest:
        return None
    if itemsize == 8:
        return _row_tile(span, elements_per_thread=4, stages=3, most_registers=255)
    # 32 KB of dy and x in flight with the programs of `backward_programs`, of half as many elements where registers are
    # short. With three stages tiles are loaded while another is worked on; with two, which need half the shared memory,
    # a program waits for each of its tiles.
    wide = loaded_bytes >= 10 and span <= 4096
    elements_per_thread = 8 if crowded or wide or span <= 1024 else 16
    stages = 3 if _loads_ahead(_padded_span(span), loaded_bytes, shared_bytes) else 2
    # 16 warps a multiprocessor. Fewer where elements have masks and addresses of their own: 12 where registers are
    # short, 8 in a tile of short rows. Where registers are short, one stage more of two 16-bit tensors keeps more bytes
    # in flight.
    ragged = ragged_rows(span, itemsize)
    several_rows = _padded_span(span) < 128 * elements_per_thread
    most_registers = 128
    if ragged and span <= 128 * elements_per_thread:
        most_registers = 255
    elif crowded and ragged:
        most_registers = 168
    if crowded and (several_rows or ragged) and most_registers < 255 and loaded_bytes <= 4:
        stages = 4
    return _row_tile(span, elements_per_thread, stages=stages, most_registers=most_registers)


def column_block_config(span: int, itemsize: int, loaded_bytes: int) -> RowConfig:
    """Block of columns that a program of the chunked backward goes down the rows with: 4 KB, or 2 KB where elements
    take more registers. loaded_bytes as in `row_backward_config`."""
    ragged = ragged_rows(span, itemsize)
    block_span = (2048 if ragged or _mixed(itemsize, loaded_bytes) else 4096) // itemsize
    return RowConfig(1, block_span, num_warps=4, stages=3, most_registers=200 if ragged else 168)


def resident_programs(config: RowConfig, facts: DeviceFacts) -> int:
    """Programs on a device that fit at once with the registers that the config allows a thread."""
    assert config.most_registers is not None
    threads = facts.registers // config.most_registers
    return max(1, threads // (config.num_warps * THREADS_PER_WARP)) * facts.multiprocessors


def column_stripes(rows: int, blocks: int, config: RowConfig, facts: DeviceFacts) -> int:
    """Programs that share each block of columns, and so rows of its partial sums: as many as fit at once."""
    return min(rows, cdiv(resident_programs(config, facts), blocks))


# Merged by every program that applies them, so few; but enough that one long row fills a device.
MOST_CHUNKS = 256


def _chunks(span: int, itemsize: int, num_warps: int, most_registers: int = 128, least_steps: int = 1) -> ChunkConfig:
    block_span = num_warps * THREADS_PER_WARP * 32 // itemsize  # 32 bytes a thread: 64 spill
    steps = max(least_steps, cdiv(span, block_span * MOST_CHUNKS))
    most_registers = registers_a_thread(num_warps, most_registers)
    return ChunkConfig(block_span, steps, cdiv(span, block_span * steps), num_warps, most_registers)


def chunk_config(span: int, itemsize: int, loaded_itemsize: int, waiting: int = 1) -> ChunkConfig:
    """Chunks of a row that is too long for the forward to hold: the same whether one program walks them or several
    share them. loaded_itemsize: bytes of an element of x and of a residual to be added; waiting as in
    `row_forward_config`.

    A row of up to 64 KB is one chunk of 8 KB tiles, which one program walks beside others; above, tiles of 32 KB. Of
    float64 and of ragged rows 16 KB always: they spill with the 64 registers that 32 warps leave a thread, as do 16
    elements beside a residual that is added afterwards, or is float32. Half as many where sums of each place are kept
    beside a residual.
    """
    narrow = itemsize == 8 or ragged_rows(span, itemsize)
    if not narrow and span * loaded_itemsize <= 65536:
        return _chunks(span, itemsize, num_warps=8, least_steps=cdiv(span * itemsize, 8192))
    num_warps = 16 if narrow else 32
    config = _chunks(span, itemsize, num_warps)
    if itemsize == 2 and config.steps > 1 and loaded_itemsize > itemsize:
        return _chunks(span, itemsize, num_warps // 2, most_registers=255)
    if num_warps == 32 and itemsize == 2 and (waiting == 2 or loaded_itemsize > 2 * itemsize):
        return replace(config, parts=2)
    return config


def walk_stages(config: ChunkConfig, loaded_itemsize: int, shared_bytes: int) -> int:
    """Stages of the walk over chunks; loaded_itemsize as in `chunk_config`.

    With 32 warps a program has a multiprocessor for itself, and has to load ahead: all its warps wait for each sum.
    """
    alone = config.num_warps == 32
    return 3 if alone and _loads_ahead(config.block_span, loaded_itemsize, shared_bytes) else 1


def backward_chunk_config(span: int, itemsize: int) -> ChunkConfig:
    """Chunks of a row that is too long for the backward to hold: 8 KB in two steps, several programs at once."""
    return _chunks(span, itemsize, num_warps=4, most_registers=168, least_steps=2)


def backward_walk_config(itemsize: int) -> RowConfig:
    """Tile of the backward that walks along a row: 4 KB, so that several programs overlap their walks."""
    return RowConfig(1, 4096 // itemsize, num_warps=8, most_registers=128)


def walks_gradients(rows: int, span: int, loaded_bytes: int, facts: DeviceFacts) -> bool:
    """Whether one program should walk a row of the backward twice: the second walk stays in L2, and there are rows for
    three fifths of the device, which then moves 3 S as fast as all of it the 5 S of shared rows."""
    walked_bytes = facts.multiprocessors * span * loaded_bytes
    return 5 * rows >= 3 * facts.multiprocessors and walked_bytes <= facts.l2_bytes // 2


def walks_rows(rows: int, span: int, itemsize: int, loaded_itemsize: int, facts: DeviceFacts) -> bool:
    """Whether one program should walk a chunked row twice: there are rows for all, and the second walk stays in L2."""
    # Walking takes over 40 registers a thread, so no more programs than these fit on a multiprocessor at once.
    resident = 1 if chunk_config(span, itemsize, loaded_itemsize).num_warps == 32 else 3
    walked_bytes = resident * facts.multiprocessors * span * loaded_itemsize
    return rows >= facts.multiprocessors and walked_bytes <= facts.l2_bytes // 2


def backward_programs(tiles: int, config: RowConfig, facts: DeviceFacts) -> int:
    """Programs of a row backward, each of which takes many tiles, and so the rows of its partial sums: as many as fit
    at once. More would run in a second wave that leaves most of the device idle, and each adds a partial row."""
    return min(tiles, resident_programs(config, facts))


def column_sum_config(span: int) -> RowConfig:
    """Tile of the sum over partial rows: of columns that fill a sector, 32 bytes of float32, or more where that still
    makes programs enough for a device; 16 KB a program, for rows are hundreds, and it waits for each tile of them."""
    block_span = 8 if span < 4096 else 16 if span < 8192 else 32
    return RowConfig(4096 // block_span, block_span, num_warps=8)
