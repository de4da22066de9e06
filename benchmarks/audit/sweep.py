"""Every entry of the launch tables x type x activation x residual x target, compiled, to see that none spills.

An entry is what tells one compiled kernel from another apart from its span or planes: warps, registers, tile, stages,
access width, norm. Which entry a call gets is seen by making it and launching nothing. Each is compiled once, with the
most operands that get it: of rows at the longest span, aligned or ragged, of planes at the first of those listed.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton

from fused_ops.kernels.launcher import Launcher

from .binary import resources
from .inert import compiling_for
from .sweep_calls import Call, Kind, candidates, kinds
from .targets import TARGETS

Entry = tuple[str, int, int | None, tuple[int, ...]]  # kernel, warps, registers, what else is constant
# Constants of a kernel in which calls of one entry differ.
SIZES = frozenset({"SPAN", "CHANNELS", "GROUPS", "PLANE"})


@dataclass(frozen=True)
class Spill:
    """A kernel that keeps some of its values in memory for want of registers."""

    call: str
    target: str
    kernel: str
    registers: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.kernel} spills {self.bytes} bytes a thread ({self.registers} registers): {self.call}"
        )


def calls(target_name: str, some_kinds: Iterable[Kind] | None = None) -> list[Call]:
    """Calls that together get every entry on a target, for each type, activation and residual."""
    found = []
    with compiling_for(TARGETS[target_name]):
        for kind in kinds() if some_kinds is None else some_kinds:
            seen: set[Entry] = set()
            for call in candidates(kind):
                entries = entries_of(call)
                if not entries <= seen:
                    seen |= entries
                    found.append(call)
    return found


def entries_of(call: Call) -> set[Entry]:
    """The entries that a call gets; it is made, and launches nothing."""
    entries: set[Entry] = set()
    with mock.patch.object(Launcher, "__call__", lambda launcher, *_: entries.add(_entry(launcher))):
        call.run()
    return entries


def _entry(launcher: Launcher) -> Entry:
    names = launcher.kernel.arg_names[-len(launcher.constants) :]
    tile = tuple(
        constant
        for name, constant in zip(names, launcher.constants, strict=True)
        if isinstance(constant, int) and name not in SIZES
    )
    return launcher.kernel.__name__, launcher.num_warps, launcher.most_registers, tile


def by_kind(some_calls: Iterable[Call]) -> list[list[Call]]:
    """Neighbouring calls of one kind together: among these no entry is compiled twice."""
    return [list(group) for _, group in itertools.groupby(some_calls, key=lambda call: call.kind)]


def _once(launch: Callable[..., None]) -> Callable[..., None]:
    """`launch`, of each entry only the first time."""
    seen: set[Entry] = set()

    def launch_once(launcher: Launcher, *arguments: Any) -> None:
        if (entry := _entry(launcher)) not in seen:
            seen.add(entry)
            launch(launcher, *arguments)

    return launch_once


def spills(some_calls: Sequence[Call], target_name: str) -> list[Spill]:
    """Those of calls of one kind on one target. What is compiled is not kept: all entries are some gigabytes."""
    target = TARGETS[target_name]
    found = []
    with ExitStack() as stack:
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        launches = stack.enter_context(compiling_for(target))
        stack.enter_context(mock.patch.object(Launcher, "__call__", _once(Launcher.__call__)))
        for call in some_calls:
            launches.clear()
            call.run()
            for launch in launches:
                registers, spilled = resources(launch, target)
                if spilled:
                    found.append(Spill(str(call), target_name, launch.kernel, registers, spilled))
    return found
