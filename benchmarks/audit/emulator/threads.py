"""The threads that run at once, one vector lane each, and what one instruction of theirs reaches in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .formats import Array
from .ptx import Instruction

WARP = 32


class Threads:
    """All threads of neighbouring programs of a grid. slot: which of these programs a lane belongs to."""

    def __init__(self, first_program: int, programs: int, threads: int) -> None:
        self.programs = programs
        self.threads = threads
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), programs)
        self.slot = np.repeat(np.arange(programs), threads)
        self.program = (self.slot + first_program).astype(np.uint32)
        self.warp = (self.thread // WARP).astype(np.int16)

    def __len__(self) -> int:
        return len(self.thread)

    def name(self, lane: int) -> str:
        return f"program {self.program[lane]}, thread {self.thread[lane]}"


@dataclass(frozen=True)
class Access:
    """So many bytes at an address in each of some lanes."""

    instruction: Instruction
    lanes: Array
    address: Array
    bytes: int

    def only(self, chosen: Array) -> Access:
        return Access(self.instruction, self.lanes[chosen], self.address[chosen], self.bytes)

    def ends_after(self, end: Array | int) -> Array:
        """Which lanes reach beyond `end`; an address near the largest one is no small one."""
        return (self.address > end) | (self.address + np.uint64(self.bytes) > end)

    def bytes_from(self, start: Array) -> Array:
        """Places of all its bytes, a row a lane, where `start` are those of the first ones."""
        return start.astype(np.int64)[:, None] + np.arange(self.bytes)
