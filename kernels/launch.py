"""How a kernel is launched: its configuration tables, and the launcher that remembers what was compiled.

Configurations are pure functions of span, element size and the operands; of the device, only how many programs share
the work. None looks at the number of rows to choose a warp count or a block size: the bits of a row must not depend on
the batch around it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction

INTERPRETED = bool(triton.knobs.runtime.interpret)  # read by @triton.jit at the same time as here

THREADS_PER_WARP = 32
BYTES_PER_THREAD = 64  # of one operand: four 16-byte loads in flight; more spills, fewer leave the memory idle


class DeviceFacts(NamedTuple):
    """What a schedule needs to know of a device."""

    multiprocessors: int
    l2_bytes: int


# CPU tensors reach a kernel only interpreted, or under a driver that compiles for a GPU which is not there.
_H200 = DeviceFacts(multiprocessors=132, l2_bytes=50 << 20)


@functools.cache
def device_facts(device: torch.device) -> DeviceFacts:
    """The facts of a device, by torch's properties; of an H200 for CPU tensors."""
    if device.type != "cuda":
        return _H200
    properties = torch.cuda.get_device_properties(device)
    return DeviceFacts(properties.multi_processor_count, properties.L2_cache_size)


# --- configurations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowConfig:
    """Whole rows in registers: tiles of block_rows x block_span."""

    block_rows: int
    block_span: int
    num_warps: int
    stages: int = 1  # of the software pipeline over tiles, where a program takes several


@dataclass(frozen=True)
class ChunkConfig:
    """A row in chunks of steps * block_span elements."""

    block_span: int
    steps: int
    chunks: int
    num_warps: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _padded_span(span: int) -> int:
    return max(8, triton.next_power_of_2(span))  # 8: the bits of a mask fill whole bytes


def _row_tile(span: int, elements_per_thread: int, least_threads: int, stages: int = 1) -> RowConfig:
    block_span = _padded_span(span)
    block_rows = max(1, least_threads * elements_per_thread // block_span)
    threads = block_rows * block_span // elements_per_thread
    return RowConfig(block_rows, block_span, min(32, threads // THREADS_PER_WARP), stages)


def row_forward_config(span: int, itemsize: int, operands: int) -> RowConfig | None:
    """Tile of the forward kernel that holds whole rows, or None where a row has to be cut into chunks.

    operands counts the activation- or parameter-sized reads: x, residual, weight, bias.
    """
    # Longest span without a spill on any target, for any activation.
    longest = {2: 16384, 4: 16384, 8: 2048}[itemsize]
    if itemsize == 2 and operands == 1:
        longest = 32768
    if span > longest:
        return None
    return _row_tile(span, BYTES_PER_THREAD // itemsize, least_threads=128)


def row_backward_config(span: int, itemsize: int) -> RowConfig | None:
    """Tile of the backward kernel that holds whole rows, or None where a row has to be cut into chunks."""
    longest = {2: 8192, 4: 8192, 8: 1024}[itemsize]
    if span > longest:
        return None
    return _row_tile(span, 8 if itemsize == 8 else 16, least_threads=128, stages=2)


def column_block_config(itemsize: int) -> RowConfig:
    """Block of columns that a program of the chunked backward goes down the rows with."""
    return RowConfig(block_rows=1, block_span=4096 // itemsize, num_warps=4, stages=2)


def column_stripes(rows: int, blocks: int, facts: DeviceFacts) -> int:
    """Programs that share each block of columns, and so rows of its partial sums: four programs a multiprocessor."""
    return min(rows, cdiv(4 * facts.multiprocessors, blocks))


MOST_CHUNKS = 1024  # merged in registers by every program that applies them


def chunk_config(span: int, itemsize: int) -> ChunkConfig:
    """Chunks of a row that is too long to hold: 32 KB, or 16 KB of a row under 64 KB so that two programs overlap."""
    num_warps = 32 if span * itemsize > 65536 else 16
    block_span = num_warps * THREADS_PER_WARP * 32 // itemsize
    steps = cdiv(span, block_span * MOST_CHUNKS)
    return ChunkConfig(block_span, steps, cdiv(span, block_span * steps), num_warps)


def walks_rows(rows: int, span: int, itemsize: int, facts: DeviceFacts) -> bool:
    """Whether one program should walk a chunked row twice: there are rows for all, and the second walk stays in L2."""
    return rows >= facts.multiprocessors and facts.multiprocessors * span * itemsize <= facts.l2_bytes // 2


# A program's accumulators make it worth many rows, so the longer the row the fewer programs. Quack's table for Hopper.
_BACKWARD_PROGRAMS = ((256, 16), (1024, 8), (2048, 4), (4096, 2))


def backward_programs(tiles: int, span: int, facts: DeviceFacts) -> int:
    """Programs of a row backward that accumulates parameter gradients, and so the rows of its partial sums."""
    per_multiprocessor = next((programs for limit, programs in _BACKWARD_PROGRAMS if span <= limit), 1)
    return min(tiles, per_multiprocessor * facts.multiprocessors)


def column_sum_config(span: int) -> RowConfig:
    """Tile of the sum over partial rows: 128-byte lines, fewer columns where that leaves too few programs."""
    return RowConfig(block_rows=64, block_span=32 if span >= 2048 else 16, num_warps=4)


# --- launching -----------------------------------------------------------------------------------------------------


class Launcher:
    """A kernel with its constants fixed. A call through Triton costs 7 us, of what it compiled 2 us: so that is kept.

    The key of what is kept: driver, device, the type of every tensor (or that it is None) and its 16-byte alignment.
    All other run-time arguments are declared so that Triton does not specialize on their values.
    """

    def __init__(self, kernel: Any, num_warps: int, *constants: Any) -> None:
        self.kernel = kernel
        self.num_warps = num_warps
        self.constants = constants
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._compiles = isinstance(kernel, JITFunction)

    def __call__(self, programs: int, tensors: tuple[torch.Tensor | None, ...], *scalars: float) -> None:
        """Launches `programs` programs on the tensors' device. The first tensor must not be None."""
        device = tensors[0].device  # type: ignore[union-attr]
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(device, programs, tensors, scalars)
        else:
            self._launch(device, programs, tensors, scalars)

    def _launch(self, device: torch.device, programs: int, tensors: tuple, scalars: tuple) -> None:
        if not self._compiles:
            self._first_launch(programs, tensors, scalars)
            return
        addresses = 0
        for tensor in tensors:
            if tensor is not None:
                addresses |= tensor.data_ptr()
        aligned: Any = True
        if addresses & 15:
            aligned = tuple([None if t is None else t.data_ptr() & 15 == 0 for t in tensors])
        types = tuple([None if t is None else t.dtype for t in tensors])
        key = (triton.runtime.driver.active, device, types, aligned)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._first_launch(programs, tensors, scalars)
        else:
            compiled[(programs, 1, 1)](*tensors, *scalars, *self.constants)

    def _first_launch(self, programs: int, tensors: tuple, scalars: tuple) -> Any:
        # fp fusion: its default changes in Triton 3.10, and with it the bits.
        return self.kernel[(programs,)](
            *tensors, *scalars, *self.constants, num_warps=self.num_warps, enable_fp_fusion=True
        )
