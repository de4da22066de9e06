"""Every entry of the launch tables x type x activation x residual x target, compiled, to see that none spills.

An entry is what tells one compiled kernel from another apart from its span or planes: warps, registers, tile, stages,
access width, norm. Which entry a call gets is seen by making it and launching nothing. Each is compiled once, with the
most operands that get it: of rows at the longest span, aligned or ragged, of planes at the first of those listed.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.runtime.jit import JITFunction

from fused_ops.kernels import launcher
from fused_ops.kernels.launcher import Launcher

from . import binary, inert, targets
from .binary import resources
from .inert import compiling_for
from .sweep_calls import Call, Kind, candidates, kinds
from .targets import TARGETS


class Entry(NamedTuple):
    """kernel: its name; source: a hash of it and of the activation in it; registers: the most that a thread gets at
    first; tile: what else is constant."""

    kernel: str
    source: str
    warps: int
    registers: int | None
    tile: tuple[int, ...]


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


@dataclass(frozen=True)
class Group:
    """Calls of one kind on one target: with others they share no entry. contents: a hash of them, of their entries, and
    of what compiles and judges them."""

    target: str
    calls: tuple[Call, ...]
    contents: str

    @property
    def kind(self) -> Kind:
        return self.calls[0].kind

    def compile(self) -> list[Spill]:
        """What spills."""
        return spills(self.calls, self.target)


def groups(target_name: str, some_kinds: Iterable[Kind] | None = None, every: int = 1) -> list[Group]:
    """Every n-th of the calls that together get every entry on a target, for each type, activation and residual."""
    found: list[tuple[Call, list[Entry]]] = []
    with compiling_for(TARGETS[target_name]):
        for kind in kinds() if some_kinds is None else some_kinds:
            seen: set[Entry] = set()
            for call in candidates(kind):
                entries = entries_of(call)
                if not entries <= seen:
                    seen |= entries
                    found.append((call, sorted(entries, key=repr)))
    made = []
    judges = [inspect.getsource(module) for module in (launcher, inert, binary, targets)]
    for _, of_kind in itertools.groupby(found[::every], key=lambda pair: pair[0].kind):
        pairs = list(of_kind)
        text = "\n".join((*judges, *(f"{call}: {entries}" for call, entries in pairs)))
        calls = tuple(call for call, _ in pairs)
        made.append(Group(target_name, calls, hashlib.sha256(text.encode()).hexdigest()))
    return made


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
    functions = [function for function in launcher.constants if isinstance(function, JITFunction)]
    source = " ".join(function.cache_key for function in (launcher.kernel, *functions))
    return Entry(launcher.kernel.__name__, source, launcher.num_warps, launcher.most_registers, tile)


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
