"""Bytes that interpreted kernels move: each launch's tensors, how much was asked for, how much of it is distinct.

The rules (section 5 of docs/design.md): bytes of distinct addresses, added up over launches; an address that one launch
reads and writes counts twice; what a program reads again counts once more, unless all that the resident programs
read again fits half of the L2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .watch import Access, Kind, Launch

Size = Literal["activation", "mask", "parameter", "partial", "statistics"]

# By the names of kernel parameters, without _ptr: what a kernel calls its tensors says how large they are.
SIZES: dict[str, Size] = {
    **dict.fromkeys(("X", "Residual", "Total", "Y", "DY", "DTotal", "DX", "DResidual"), "activation"),
    "Bits": "mask",
    **dict.fromkeys(("Weight", "Bias", "Scale", "Seed", "DWeight", "DBias"), "parameter"),
    **dict.fromkeys(("PartialDWeight", "PartialDBias", "PartialDScale", "DScaleSums"), "partial"),
    **dict.fromkeys(("Mean", "Rstd", "Means", "M2s", "GSums", "GXHatSums"), "statistics"),
    **dict.fromkeys(("Origins", "DZSums", "DZXHatSums", "MeanG", "MeanGXHat"), "statistics"),
    **dict.fromkeys(("RunningMean", "RunningVar", "GivenMean", "GivenVar", "KindMeans", "KindVars"), "statistics"),
    **dict.fromkeys(("Products", "Origin", "M2"), "statistics"),
    **dict.fromkeys(("MeanWeight", "VarWeight", "DMeanWeight", "DVarWeight"), "parameter"),
}


def size_of(argument: str) -> Size:
    """The size of what a kernel calls so; KeyError where the name is not known."""
    try:
        return SIZES[argument]
    except KeyError:
        raise KeyError(
            f"{argument}_ptr must be the name of a tensor whose size SIZES in benchmarks/audit/counts.py tells, but is "
            f"none of {', '.join(SIZES)}; add it there"
        ) from None


@dataclass(frozen=True)
class TensorTraffic:
    """Bytes of one tensor in one launch. again: read by a program that had read them before; again_footprint: the most
    distinct bytes that one program reads again."""

    argument: str
    asked_read: int
    asked_written: int
    read: int
    written: int
    again: int
    again_footprint: int


@dataclass(frozen=True)
class LaunchTraffic:
    """One launch and its tensors."""

    kernel: str
    programs: int
    tensors: tuple[TensorTraffic, ...]

    def asked(self) -> int:
        """Bytes asked for, to read and to write."""
        return sum(tensor.asked_read + tensor.asked_written for tensor in self.tensors)

    def distinct(self) -> int:
        """Bytes of distinct addresses, read and written."""
        return sum(tensor.read + tensor.written for tensor in self.tensors)

    def moved(self, resident_programs: int, l2_bytes: int) -> dict[str, int]:
        """Bytes that count, by tensor: the distinct ones, and what is read again where that has left the L2 by then.

        resident_programs: as many as run at once on the device, each of which reads again as much as any of these.
        """
        held = resident_programs * sum(tensor.again_footprint for tensor in self.tensors)
        again = held > l2_bytes // 2
        return {
            tensor.argument: tensor.read + tensor.written + (tensor.again if again else 0) for tensor in self.tensors
        }


@dataclass
class _Count:
    """Of one tensor, while a launch runs."""

    asked_read: int = 0
    asked_written: int = 0
    read: int = 0
    written: int = 0
    again: int = 0
    again_by_program: dict[int, int] = field(default_factory=dict)


class TrafficCounter:
    """An observer that counts; `launches` fills."""

    def __init__(self) -> None:
        self.launches: list[LaunchTraffic] = []
        self._counts: dict[str, _Count] = {}
        self._last_reader: dict[int, np.ndarray] = {}
        self._read: dict[int, np.ndarray] = {}
        self._again: dict[int, np.ndarray] = {}
        self._written: dict[int, np.ndarray] = {}

    def begin(self, launch: Launch) -> None:
        self._counts = {}
        self._last_reader = launch.element_array(np.int32)
        self._read, self._again, self._written = (launch.element_array(bool) for _ in range(3))

    def access(self, launch: Launch, access: Access) -> None:
        count = self._counts.setdefault(access.argument.name, _Count())
        block, elements, itemsize = id(access.block), access.elements, access.block.itemsize
        if access.kind != "store":
            count.asked_read += access.bytes
            readers = self._last_reader[block]
            reader = access.program + 1  # 0 is nobody
            again = readers[elements] == reader
            if again.any():
                repeated = elements[again]
                count.again += repeated.size * itemsize
                fresh = _first_time(self._again[block], repeated)
                by_program = count.again_by_program
                by_program[access.program] = by_program.get(access.program, 0) + fresh * itemsize
            readers[elements] = reader
            count.read += _first_time(self._read[block], elements) * itemsize
        if access.kind != "load":
            count.asked_written += access.bytes
            count.written += _first_time(self._written[block], elements) * itemsize

    def outside(self, launch: Launch, kind: Kind, program: int, address: int) -> None:
        """Nothing is moved."""

    def end(self, launch: Launch) -> None:
        tensors = tuple(
            TensorTraffic(
                name,
                count.asked_read,
                count.asked_written,
                count.read,
                count.written,
                count.again,
                max(count.again_by_program.values(), default=0),
            )
            for name, count in self._counts.items()
        )
        self.launches.append(LaunchTraffic(launch.kernel, launch.programs, tensors))


def _first_time(flags: np.ndarray, elements: np.ndarray) -> int:
    """How many distinct elements were not flagged; now they are."""
    lowest, highest = int(elements.min()), int(elements.max())
    if highest - lowest > 64 * elements.size:  # too far apart to look at all between them
        fresh = np.unique(elements[~flags[elements]])
        flags[fresh] = True
        return int(fresh.size)
    between = flags[lowest : highest + 1]
    before = np.count_nonzero(between)
    flags[elements] = True
    return int(np.count_nonzero(between) - before)
