"""Finds what a kernel must not do to memory, whichever order its programs run in.

Three kinds: a lane outside every tensor of the launch, two programs that write one address, and a plain read of what
another program of the launch wrote (before or after). Atomic operations may meet each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .watch import Access, Kind, Launch, watch

# In the place of a program, whose number is kept plus 1: nobody, and more than one (of writers: atomically).
NOBODY, SEVERAL = 0, -1
# Elements of a block whose readers and writers are remembered; of larger ones only the bounds are checked.
LARGEST_BLOCK = 2**28

OUT_OF_BOUNDS = "out of bounds"
TWO_WRITERS = "two programs write one address"
READ_OF_ANOTHERS_WRITE = "reads what another program writes"


@dataclass(frozen=True)
class Problem:
    """One kind of fault of one kernel at one of its tensors, and its first occurrence."""

    what: str
    kernel: str
    argument: str
    first: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.what}: {self.argument}: {self.first}"


class MemoryFault(AssertionError):
    """A kernel did to memory what it must not."""


class MemoryChecker:
    """An observer that remembers, for each element, who read and who wrote it in the launch."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._readers: dict[int, np.ndarray] = {}
        self._writers: dict[int, np.ndarray] = {}

    def begin(self, launch: Launch) -> None:
        self._readers = launch.element_array(np.int32, LARGEST_BLOCK)
        self._writers = launch.element_array(np.int32, LARGEST_BLOCK)

    def access(self, launch: Launch, access: Access) -> None:
        if id(access.block) not in self._readers:
            return
        elements, program = access.elements, access.program + 1
        readers, writers = self._readers[id(access.block)], self._writers[id(access.block)]
        written_by = writers[elements]
        if access.kind == "load":
            self._report(READ_OF_ANOTHERS_WRITE, launch, access, written_by)
            read_by = readers[elements]
            readers[elements] = np.where((read_by == NOBODY) | (read_by == program), program, SEVERAL)
            return
        atomic = access.kind == "atomic"
        if atomic:
            written_by = np.where(written_by == SEVERAL, NOBODY, written_by)
        self._report(TWO_WRITERS, launch, access, written_by)
        self._report(READ_OF_ANOTHERS_WRITE, launch, access, readers[elements])
        writers[elements] = SEVERAL if atomic else program

    def outside(self, launch: Launch, kind: Kind, program: int, address: int) -> None:
        who = f"{kind} of program {program}"
        if not launch.blocks:
            return self._add(OUT_OF_BOUNDS, launch, "no tensor", who)
        block = min(launch.blocks, key=lambda block: max(block.address - address, address - block.end + 1))
        element = (address - block.address) // block.itemsize
        near = min(block.arguments, key=lambda found: max(found.first - element, element - found.end + 1))
        between = " between its rows" if near.first <= element < near.end else f" of {near.end - near.first}"
        self._add(OUT_OF_BOUNDS, launch, near.name, f"{who}, element {element - near.first}{between}")

    def end(self, launch: Launch) -> None:
        self._readers, self._writers = {}, {}

    def raise_problems(self) -> None:
        """MemoryFault, where there is any."""
        if self.problems:
            raise MemoryFault("\n".join(map(str, self.problems)))

    def _report(self, what: str, launch: Launch, access: Access, others: np.ndarray) -> None:
        """Adds the first element that another program, of those given for each element, got hold of as well."""
        bad = (others != NOBODY) & (others != access.program + 1)
        if not bad.any():
            return
        place = int(np.flatnonzero(bad)[0])
        element, other = int(access.elements[place]), int(others[place])
        argument = access.block.argument(element)
        whose = "several programs" if other == SEVERAL else f"program {other - 1}"
        who = f"{access.kind} of program {access.program}, element {element - argument.first}, which is {whose}'s too"
        self._add(what, launch, argument.name, who)

    def _add(self, what: str, launch: Launch, argument: str, first: str) -> None:
        if not any((what, launch.kernel, argument) == (old.what, old.kernel, old.argument) for old in self.problems):
            self.problems.append(Problem(what, launch.kernel, argument, first))


@contextlib.contextmanager
def checked() -> Iterator[MemoryChecker]:
    """Checks every launch inside, and raises MemoryFault at the end where one is at fault."""
    checker = MemoryChecker()
    with watch(checker):
        yield checker
    checker.raise_problems()
