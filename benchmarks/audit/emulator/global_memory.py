"""Global memory: the storages of a launch's tensors, read and written where they are, and each access checked.

An access outside all of them, or between boundaries of its size, is reported and not carried out: what it would have
loaded is 0. Tensors of one storage are one piece of memory: gaps between the rows of a view are not told apart.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .findings import MISALIGNED, OUT_OF_BOUNDS, TWO_PROGRAMS, TWO_VALUES, Report
from .formats import Array
from .threads import Access, Threads

NOBODY = 0  # in the place of a program, whose number is kept plus 1


@dataclass(frozen=True)
class Region:
    """A storage, named as the first parameter that points into it, with the program that wrote each byte."""

    name: str
    address: int
    data: Array
    writer: Array

    @property
    def end(self) -> int:
        return self.address + len(self.data)


class GlobalMemory:
    """What all programs of a launch share."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], report: Report) -> None:
        self._report = report
        regions: dict[int, Region] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in regions:
                address, size = storage.data_ptr(), storage.nbytes()
                data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
                regions[address] = Region(name, address, data, np.full(size, NOBODY, np.int32))
        self._regions = [regions[address] for address in sorted(regions)]
        self._addresses = np.array([region.address for region in self._regions], np.uint64)
        self._ends = np.array([region.end for region in self._regions], np.uint64)

    def load(self, threads: Threads, access: Access) -> Array:
        """Bytes, a row a lane."""
        loaded = np.zeros((len(access.lanes), access.bytes), np.uint8)
        for region, chosen, place in self._reached(threads, access):
            loaded[chosen] = region.data[place]
        return loaded

    def store(self, threads: Threads, access: Access, data: Array) -> None:
        for region, chosen, place in self._reached(threads, access):
            lanes = access.lanes[chosen]
            region.data[place] = data[chosen]
            self._check(TWO_VALUES, region.data[place] != data[chosen], threads, access.only(chosen), region)
            program = threads.program[lanes].astype(np.int32)[:, None] + 1
            earlier = region.writer[place]
            region.writer[place] = program
            of_others = ((earlier != NOBODY) & (earlier != program)) | (region.writer[place] != program)
            self._check(TWO_PROGRAMS, of_others, threads, access.only(chosen), region)

    def _reached(self, threads: Threads, access: Access) -> list[tuple[Region, Array, Array]]:
        """Each storage with the lanes that reach it and the places of their bytes; reports those that reach none."""
        below = np.searchsorted(self._addresses, access.address, "right").astype(np.int64) - 1
        beyond = self._ends[np.maximum(below, 0)] if self._regions else np.zeros_like(access.address)
        outside = (below < 0) | access.ends_after(beyond)
        if outside.any():
            at = int(np.argmax(outside))
            self._add(OUT_OF_BOUNDS, self._position(int(access.address[at]), int(below[at])), threads, access, at)
        misaligned = access.address % np.uint64(access.bytes) != 0
        if misaligned.any():
            at = int(np.argmax(misaligned))
            where = f"{access.bytes} bytes at {self._position(int(access.address[at]), int(below[at]))}"
            self._add(MISALIGNED, where, threads, access, at)
        below[outside | misaligned] = -1
        reached = []
        for number in np.unique(below[below >= 0]):
            region, chosen = self._regions[number], np.flatnonzero(below == number)
            reached.append((region, chosen, access.bytes_from(access.address[chosen] - self._addresses[number])))
        return reached

    def _position(self, address: int, below: int) -> str:
        """An address by the last storage that begins before it, or by the first of all."""
        if not self._regions:
            return "no tensor"
        region = self._regions[max(below, 0)]
        return f"byte {address - region.address} of {region.name}, which has {len(region.data)}"

    def _check(self, what: str, wrong: Array, threads: Threads, access: Access, region: Region) -> None:
        """Of bytes, a row a lane."""
        if wrong.any():
            at = int(np.argmax(wrong.any(1)))
            byte = int(access.address[at]) - region.address + int(np.argmax(wrong[at]))
            self._add(what, f"byte {byte} of {region.name}", threads, access, at)

    def _add(self, what: str, where: str, threads: Threads, access: Access, at: int) -> None:
        self._report.add(what, access.instruction.text, f"{where}, {threads.name(int(access.lanes[at]))}")
