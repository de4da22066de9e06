"""Every entry of the launch tables x type x activation x residual x target, compiled, to see that none spills.

An entry is what tells one compiled kernel from another apart from its span or planes: warps, registers, tile, stages,
access width, norm, types. Which entry a call gets is seen by making it and launching nothing. Each is compiled once,
with the most operands that get it: of rows at the longest span, aligned or ragged, of planes at the first of those
listed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fused_ops.kernels import launcher
from fused_ops.kernels.launch import more_registers
from fused_ops.kernels.launcher import Launcher, Tensors

from . import binary, cubin, inert, targets
from .binary import resources
from .inert import compiling_for
from .sweep_calls import Call, Kind, candidates, kinds
from .targets import TARGETS


class Entry(NamedTuple):
    """kernel: its name; source: a hash of it and of the activation in it; types: of its tensors, None without one;
    registers: the most that a thread gets at first; tile: what else is constant."""

    kernel: str
    source: str
    types: tuple[torch.dtype | None, ...]
    warps: int
    registers: int | None
    tile: tuple[int, ...]

    @property
    def of_any_type(self) -> Entry:
        """The entry of the tables, whatever tensors there are."""
        return self._replace(types=())


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
    """Calls of one type and activation on one target, and which of their entries of one kernel no earlier group has.
    contents: a hash of both, and of what compiles and judges them."""

    target: str
    kernel: str
    calls: tuple[Call, ...]
    entries: frozenset[Entry]
    contents: str

    @classmethod
    def of(cls, target: str, kernel: str, new: Mapping[Call, set[Entry]], judges: Sequence[str]) -> Group:
        """Of calls with the entries of a kernel that are new with each; judges: the source of what compiles them."""
        text = "\n".join((*judges, *(f"{call}: {sorted(entries, key=repr)}" for call, entries in new.items())))
        contents = hashlib.sha256(text.encode()).hexdigest()
        return cls(target, kernel, tuple(new), frozenset().union(*new.values()), contents)

    def compile(self) -> list[Spill]:
        """What spills."""
        return spills(self.calls, self.target, self.entries)


def groups(target_name: str, some_kinds: Iterable[Kind] | None = None, every: int = 1) -> list[Group]:
    """Every n-th of the calls that together get every entry on a target, for each type, activation and residual."""
    found: list[tuple[Call, set[Entry]]] = []
    compiled: set[Entry] = set()
    with compiling_for(TARGETS[target_name]):
        for kind in kinds() if some_kinds is None else some_kinds:
            seen: set[Entry] = set()  # of this kind, of whatever types its parameters are
            for call in candidates(kind):
                new = {entry for entry in entries_of(call) if entry.of_any_type not in seen}
                seen |= {entry.of_any_type for entry in new}
                if entries := new - compiled:
                    compiled |= entries
                    found.append((call, entries))
    grouped: defaultdict[tuple[Any, ...], defaultdict[Call, set[Entry]]] = defaultdict(lambda: defaultdict(set))
    for call, entries in found[::every]:
        for entry in sorted(entries, key=repr):
            grouped[call.kind.dtype, call.kind.activation, entry.kernel][call].add(entry)
    judges = [inspect.getsource(part) for part in (launcher, more_registers, inert, binary, cubin, targets)]
    return [Group.of(target_name, kernel, new, judges) for (_, _, kernel), new in grouped.items()]


def entries_of(call: Call) -> set[Entry]:
    """The entries that a call gets; it is made, and launches nothing."""
    entries: set[Entry] = set()
    with mock.patch.object(Launcher, "__call__", lambda *arguments: entries.add(_entry(*arguments))):
        call.run()
    return entries


def _entry(
    launcher: Launcher, _programs: int, _device: torch.device, given: Tensors, allocated: Tensors, *_: float
) -> Entry:
    types = tuple(None if tensor is None else tensor.dtype for tensor in given + allocated)
    names = launcher.kernel.arg_names[-len(launcher.constants) :]
    tile = tuple(
        constant
        for name, constant in zip(names, launcher.constants, strict=True)
        if isinstance(constant, int) and name not in SIZES
    )
    functions = [function for function in launcher.constants if isinstance(function, JITFunction)]
    source = " ".join(map(source_of, (launcher.kernel, *functions)))
    return Entry(launcher.kernel.__name__, source, types, launcher.num_warps, launcher.most_registers, tile)


@functools.cache
def source_of(function: Any) -> str:
    """A hash of a device function and of all that it calls. Triton's own depends on which were asked for theirs before,
    and so on the process."""
    found = hashlib.sha256(function.src.encode())
    for name in sorted({*function.fn.__code__.co_names}):
        used = function.fn.__globals__.get(name)
        if isinstance(used, JITFunction):
            found.update(source_of(used).encode())
        elif isinstance(used, tl.constexpr):
            found.update(f"{name} = {used.value!r}".encode())
    return found.hexdigest()


def _once(launch: Callable[..., None], entries: frozenset[Entry] | None, seen: set[Entry]) -> Callable[..., None]:
    """`launch`, of each of the entries only the first time, when it becomes one of those seen, and of no other."""

    def launch_once(*arguments: Any) -> None:
        entry = _entry(*arguments)
        if entry not in seen and (entries is None or entry in entries):
            seen.add(entry)
            launch(*arguments)

    return launch_once


def spills(some_calls: Sequence[Call], target_name: str, entries: frozenset[Entry] | None = None) -> list[Spill]:
    """Those of calls on one target: of these entries, or all. What is compiled is not kept: it is some gigabytes.
    RuntimeError where an entry is none that the calls get."""
    target = TARGETS[target_name]
    found, seen = [], set[Entry]()
    with ExitStack() as stack:
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        launches = stack.enter_context(compiling_for(target))
        stack.enter_context(mock.patch.object(Launcher, "__call__", _once(Launcher.__call__, entries, seen)))
        for call in some_calls:
            launches.clear()
            call.run()
            for launch in launches:
                registers, spilled = resources(launch, target)
                if spilled:
                    found.append(Spill(str(call), target_name, launch.kernel, registers, spilled))
    if entries is not None and (missed := entries - seen):
        raise RuntimeError(
            f"{len(missed)} of {len(entries)} entries must be among those of the calls, but are not; the first is "
            f"{next(iter(missed))}"
        )
    return found
