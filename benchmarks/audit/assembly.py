"""A kernel's machine code as a list of instructions, of which only what matters to memory is told: SASS or AMD's.

What follows from the list: the widths of global accesses, whether loads are asynchronous, the loops, how many bytes a
thread has asked for before it first waits, and how many instructions it issues.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

# load, store: between global memory and registers. copy: from global memory straight to shared. commit closes a group
# of copies, wait lets at most `groups` groups (AMD: accesses) go on. barrier: a program's warps wait for each other.
Kind = Literal["load", "store", "copy", "commit", "wait", "barrier", "other"]


@dataclass(frozen=True)
class Instruction:
    """width: bytes a thread moves. registers: those it names; of a load, those that it fills."""

    kind: Kind
    width: int = 0
    groups: int = 0
    registers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Loop:
    """Instructions [first, last] of the list, taken again and again."""

    first: int
    last: int


@dataclass(frozen=True)
class CodeSize:
    """Of a thread: instructions and the bytes of global memory that they access, outside loops and in a trip of all."""

    instructions: int
    bytes: int
    loop_instructions: int
    loop_bytes: int

    def trips(self, bytes_accessed: float) -> float:
        """How often the loops are taken by a thread that accesses so many bytes, each loop equally often."""
        return max(1.0, (bytes_accessed - self.bytes) / self.loop_bytes) if self.loop_bytes else 1.0

    def issued(self, bytes_accessed: float) -> float:
        """How many instructions such a thread issues."""
        return self.instructions + self.trips(bytes_accessed) * self.loop_instructions


@dataclass(frozen=True)
class Assembly:
    """The instructions of a kernel in order, and its outermost loops."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def widths(self, *kinds: Kind) -> tuple[int, ...]:
        """Bytes of each access of these kinds, in order."""
        return tuple(found.width for found in self.instructions if found.kind in kinds)

    def bytes_in_flight(self) -> int:
        """The most that a thread has asked for and not yet waited for: in its leanest loop, once that is running."""
        return min((max(counts) for counts in self._running()), default=0)

    def overlap(self) -> float:
        """How much of that is on its way, on average over the instructions of a loop: near 0 where a loop waits for its
        loads before it works, near 1 where it loads ahead. 0 without a loop."""
        if not any(self._loads(loop) for loop in self.loops):
            return 0.0
        return min(sum(counts) / len(counts) / max(1, *counts) for counts in self._running())

    def in_step(self) -> bool:
        """Whether the warps of a program wait for each other in a loop that loads."""
        return any(
            self._loads(loop) and any(found.kind == "barrier" for found in self._body(loop)) for loop in self.loops
        )

    def _running(self) -> list[list[int]]:
        """Bytes on their way after each instruction, of each loop that loads in its third trip; of all without one."""
        loading = [loop for loop in self.loops if self._loads(loop)]
        if not loading:
            return [_outstanding(self.instructions)]
        counts = []
        for loop in loading:
            before, body = self.instructions[: loop.first], self._body(loop)
            counts.append(_outstanding((*before, *body, *body, *body))[-len(body) :])
        return counts

    def size(self) -> CodeSize:
        """Instructions and bytes accessed, outside loops and inside."""
        inside = {index for loop in self.loops for index in range(loop.first, loop.last + 1)}
        looped = sum(self.instructions[index].width for index in inside)
        straight = sum(found.width for found in self.instructions) - looped
        return CodeSize(len(self.instructions) - len(inside), straight, len(inside), looped)

    def stages(self) -> int:
        """num_stages of the deepest software pipeline of copies: 1 where no loop has one."""
        deepest = 1
        for loop in self.loops:
            body = self._body(loop)
            commits = sum(found.kind == "commit" for found in body)
            waits = [found.groups for found in body if found.kind == "wait"]
            if commits and waits:
                deepest = max(deepest, 2 + max(waits) // commits)
        return deepest

    def _loads(self, loop: Loop) -> bool:
        return any(found.kind in ("load", "copy") for found in self._body(loop))

    def _body(self, loop: Loop) -> tuple[Instruction, ...]:
        return self.instructions[loop.first : loop.last + 1]


def _outstanding(trace: Iterable[Instruction]) -> list[int]:
    """Bytes on their way after each instruction. Accesses return in order: who waits for one, waits for all before."""
    loads: list[Instruction] = []
    groups: list[int] = []
    open_group = 0
    asynchronous = False
    counts = []
    for found in trace:
        if found.kind == "copy":
            open_group += found.width
            asynchronous = True
        elif found.kind == "commit":
            groups.append(open_group)
            open_group = 0
        elif found.kind == "wait" and asynchronous:
            groups = groups[len(groups) - min(found.groups, len(groups)) :]
        elif found.kind == "wait":
            loads = loads[len(loads) - min(found.groups, len(loads)) :]
        else:
            waited = [index for index, load in enumerate(loads) if load.registers & found.registers]
            if waited:
                loads = loads[waited[-1] + 1 :]
            if found.kind == "load" or (found.kind == "store" and not found.registers):
                loads.append(found)
        counts.append(sum(load.width for load in loads if load.kind == "load") + sum(groups) + open_group)
    return counts


# --- NVIDIA --------------------------------------------------------------------------------------------------------

_SASS_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+?)(?:\s+(.*?))?\s*;")
_SASS_LABEL = re.compile(r"^(\.L_x_\d+):")
_SASS_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_SASS_REGISTER = re.compile(r"\bR(\d+)\b")
_SASS_KINDS: dict[str, Kind] = {
    "LDG": "load", "STG": "store", "LDGSTS": "copy", "LDGDEPBAR": "commit", "DEPBAR": "wait", "BAR": "barrier",
}  # fmt: skip


def parse_sass(text: str) -> Assembly:
    """From nvdisasm's listing of a binary with one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _SASS_LINE.search(line):
            if target := _SASS_TARGET.search(line):
                jumps.append((len(instructions), target[1]))
            instructions.append(_sass_instruction(found[1], found[2] or ""))
    return _assembly(instructions, labels, jumps)


def _sass_instruction(name: str, operands: str) -> Instruction:
    opcode, *modifiers = name.split(".")
    kind = _SASS_KINDS.get(opcode, "other")
    if kind == "wait":
        return Instruction(kind, groups=int(operands.split(",")[1].strip(), 16))
    registers = [int(number) for number in _SASS_REGISTER.findall(operands)]
    if kind not in ("load", "store", "copy"):
        return Instruction(kind, registers=frozenset(registers))
    width = next((size for name, size in _SASS_WIDTHS.items() if name in modifiers), 4)
    if kind == "load":
        filled = registers[0] if operands.startswith("R") and registers else -1
        return Instruction(kind, width, registers=frozenset(range(filled, filled + max(1, width // 4))))
    return Instruction(kind, width, registers=frozenset(registers))


_SASS_WIDTHS = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


# --- AMD -----------------------------------------------------------------------------------------------------------

_GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+)")
_GCN_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
_GCN_JUMP = re.compile(r"s_c?branch\w*\s+(\.LBB\d+_\d+)")
_GCN_VMCNT = re.compile(r"vmcnt\((\d+)\)")
_GCN_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1,
               "sshort": 2, "sbyte": 1}  # fmt: skip


def parse_gcn(text: str) -> Assembly:
    """From AMD's assembly text of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := _GCN_LABEL.match(line):
            labels[label[1]] = len(instructions)
            continue
        code = line.split(";")[0].strip()
        if not re.match(r"[a-z]+_\w+", code) or code.endswith(":"):
            continue
        if jump := _GCN_JUMP.match(code):
            jumps.append((len(instructions), jump[1]))
        instructions.append(_gcn_instruction(code))
        if code.startswith("s_endpgm"):
            break
    return _assembly(instructions, labels, jumps)


def _gcn_instruction(code: str) -> Instruction:
    """Accesses are counted by the hardware, and waited for by number: no register is followed."""
    if access := _GCN_ACCESS.match(code):
        size = next((part for part in access[2].split("_") if part in _GCN_WIDTHS), "dword")
        to_shared = code.split()[-1] == "lds"
        kind: Kind = "copy" if to_shared else "load" if access[1] == "load" else "store"
        return Instruction(kind, _GCN_WIDTHS[size])
    if code.startswith("s_barrier"):
        return Instruction("barrier")
    if code.startswith("s_waitcnt") and (allowed := _GCN_VMCNT.search(code)):
        return Instruction("wait", groups=int(allowed[1]))
    return Instruction("other")


# --- both ----------------------------------------------------------------------------------------------------------


def _assembly(instructions: Sequence[Instruction], labels: dict[str, int], jumps: list[tuple[int, str]]) -> Assembly:
    """A jump back is a loop, but for the one to itself that fills a kernel up."""
    back = sorted((labels[target], place) for place, target in jumps if target in labels and labels[target] < place)
    loops: list[Loop] = []
    for first, last in back:
        if loops and first <= loops[-1].last:
            loops[-1] = Loop(loops[-1].first, max(last, loops[-1].last))
        else:
            loops.append(Loop(first, last))
    return Assembly(tuple(instructions), tuple(loops))
