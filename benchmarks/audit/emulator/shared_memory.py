"""Shared memory of the programs that run at once, with who wrote and who read each byte since the last barrier.

Between two barriers a warp may read what it wrote itself, and nothing of what another did; nor may it write what
another read. What cp.async copies is nobody's to read until its thread has waited for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .findings import (
    MISALIGNED,
    OUT_OF_BOUNDS,
    OVERWRITES_READ,
    OVERWRITES_WRITTEN,
    READ_BEFORE_BARRIER,
    READ_BEFORE_DELIVERY,
    TWO_VALUES_SHARED,
    Report,
)
from .formats import Array
from .threads import Access, Threads

SEVERAL = -1  # in the place of a warp
ON_THE_WAY = 0xA5  # what is read of a byte that is neither the old one for certain nor the new one


@dataclass(frozen=True)
class _Copy:
    """Copies into shared memory that are on their way, and of which group of its thread each is."""

    access: Access
    data: Array
    group: Array


class SharedMemory:
    """Bytes of each program, one program after the other in one array."""

    def __init__(self, threads: Threads, size: int, report: Report) -> None:
        self._threads = threads
        self._size = size
        self._report = report
        everything = threads.programs * size
        self._data = np.zeros(everything, np.uint8)
        # Of each byte, in which interval between two barriers it was read and written last, and by which warp.
        self._interval = np.ones(threads.programs, np.int32)
        self._read_in, self._reader = np.zeros(everything, np.int32), np.zeros(everything, np.int16)
        self._written_in, self._writer = np.zeros(everything, np.int32), np.zeros(everything, np.int16)
        self._on_the_way = np.zeros(everything, bool)
        self._committed = np.zeros(len(threads), np.int32)
        self._copies: list[_Copy] = []

    def barrier(self, active: Array) -> None:
        self._interval[np.unique(self._threads.slot[active])] += 1

    def load(self, access: Access) -> Array:
        """Bytes, a row a lane."""
        inside, place = self._reached(access)
        loaded = np.zeros((len(access.lanes), access.bytes), np.uint8)
        loaded[inside] = self._data[place]
        warp, interval = self._warp_and_interval(access.only(inside))
        written = (self._written_in[place] == interval) & (self._writer[place] != warp)
        self._check(READ_BEFORE_BARRIER, written, access.only(inside))
        self._check(READ_BEFORE_DELIVERY, self._on_the_way[place], access.only(inside))
        by_another = (self._read_in[place] == interval) & (self._reader[place] != warp)
        reader = np.where(by_another, np.int16(SEVERAL), warp)
        self._read_in[place], self._reader[place] = interval, reader
        # Of several warps that read a byte by this instruction, the last has its entry.
        self._reader[place[self._reader[place] != reader]] = SEVERAL
        return loaded

    def store(self, access: Access, data: Array) -> None:
        inside, place = self._reached(access)
        access, data = access.only(inside), data[inside]
        self._check_readers(access, place)
        warp, interval = self._warp_and_interval(access)
        by_another = (self._written_in[place] == interval) & (self._writer[place] != warp)
        self._check(OVERWRITES_WRITTEN, by_another & (self._data[place] != data), access)
        self._written_in[place], self._writer[place] = interval, warp
        self._data[place], self._on_the_way[place] = data, False
        self._check(TWO_VALUES_SHARED, self._data[place] != data, access)

    def begin_copy(self, access: Access, data: Array) -> None:
        """cp.async: the bytes are on their way until their group is waited for."""
        inside, place = self._reached(access)
        access = access.only(inside)
        self._check_readers(access, place)
        self._data[place], self._on_the_way[place] = ON_THE_WAY, True
        self._copies.append(_Copy(access, data[inside], self._committed[access.lanes]))

    def commit_group(self, active: Array) -> None:
        """What these threads have copied since the last time is a group."""
        self._committed[active] += 1

    def wait_group(self, active: Array, pending: int) -> None:
        """Delivers to these threads all but so many of their latest groups."""
        waiting = []
        for copy in self._copies:
            lanes = copy.access.lanes
            due = active[lanes] & (copy.group < self._committed[lanes] - pending)
            if due.any():
                self.store(copy.access.only(due), copy.data[due])
            if not due.all():
                waiting.append(_Copy(copy.access.only(~due), copy.data[~due], copy.group[~due]))
        self._copies = waiting

    def _reached(self, access: Access) -> tuple[Array, Array]:
        """Which lanes reach shared memory, and the places of their bytes; reports those that do not."""
        outside = access.ends_after(self._size)
        misaligned = access.address % np.uint64(access.bytes) != 0
        self._check(OUT_OF_BOUNDS, outside[:, None], access)
        self._check(MISALIGNED, misaligned[:, None], access)
        inside = np.flatnonzero(~(outside | misaligned))
        start = self._threads.slot[access.lanes[inside]] * self._size + access.address[inside].astype(np.int64)
        return inside, access.bytes_from(start)

    def _warp_and_interval(self, access: Access) -> tuple[Array, Array]:
        lanes = access.lanes
        return self._threads.warp[lanes][:, None], self._interval[self._threads.slot[lanes]][:, None]

    def _check_readers(self, access: Access, place: Array) -> None:
        warp, interval = self._warp_and_interval(access)
        read = (self._read_in[place] == interval) & (self._reader[place] != warp)
        self._check(OVERWRITES_READ, read, access)

    def _check(self, what: str, wrong: Array, access: Access) -> None:
        """Of bytes, a row a lane."""
        if wrong.any():
            at = int(np.argmax(wrong.any(1)))
            where = f"byte {int(access.address[at]) + int(np.argmax(wrong[at]))} of shared memory"
            thread = self._threads.name(int(access.lanes[at]))
            self._report.add(what, access.instruction.text, f"{where}, {thread}")
