"""PTX as Triton prints it, parsed: one entry, its parameters, registers, labels and instructions.

Nothing here knows what an instruction does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SHARED_MEMORY = "global_smem"  # Triton's name for all that a program has of it
PREDICATE_BITS = 1


class UnknownInstruction(NotImplementedError):
    """PTX that the emulator does not model; the text names it."""


@dataclass(frozen=True)
class Guard:
    """`@%p1` or `@!%p1`: the threads in which an instruction is executed."""

    predicate: str
    negated: bool


@dataclass(frozen=True)
class Instruction:
    """`@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd3+8]`: opcode, operands as they are written, guard."""

    opcode: str
    operands: tuple[str, ...]
    guard: Guard | None
    text: str

    @functools.cached_property
    def parts(self) -> tuple[str, ...]:
        """Name, modifiers, type."""
        return tuple(self.opcode.split("."))

    def unknown(self, why: str = "") -> UnknownInstruction:
        return UnknownInstruction(self.text + (f": {why}" if why else ""))


@dataclass(frozen=True)
class Kernel:
    """An entry. parameters: types by name, in order. registers: bits by name, or by prefix for `%r<42>`."""

    name: str
    threads: int
    parameters: Mapping[str, str]
    registers: Mapping[str, int]
    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]

    def register_bits(self, name: str) -> int:
        return self.registers[name] if name in self.registers else self.registers[name.rstrip("0123456789")]


def elements(operand: str) -> list[str]:
    """Of `{%r1, %r2}`, or of a scalar the one that it is."""
    return [element.strip() for element in operand.strip("{} ").split(",")]


@functools.cache
def base_and_offset(address: str) -> tuple[str, int]:
    """Of `[%rd1+16]`."""
    found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", address)
    if not found:
        raise UnknownInstruction(f"address {address}")
    return found[1], int(found[2] or "0", 0)


@functools.lru_cache(maxsize=64)
def parse(ptx: str) -> Kernel:
    """The entry of a module that has one. Raises UnknownInstruction where a statement is not an instruction."""
    text = re.sub(r"//[^\n]*", "", ptx)
    header, body = text[text.index(".entry") :].split("{", 1)
    name, threads = re.match(r"\.entry\s+(\w+)", header), re.search(r"\.reqntid\s+(\d+)", header)
    assert name and threads, "an entry has a name, and Triton tells its number of threads"
    instructions: list[Instruction] = []
    registers: dict[str, int] = {}
    labels: dict[str, int] = {}
    for statement in _statements(re.sub(r"\.loc[^\n]*", "", body)):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL):
            bits = PREDICATE_BITS if declared[1] == "pred" else int(declared[1].lstrip("bsuf"))
            registers.update({register.strip().split("<")[0]: bits for register in declared[2].split(",")})
        elif not statement.startswith(".pragma"):
            instructions.append(_instruction(statement))
    parameters = {each[2]: each[1] for each in re.finditer(r"\.param\s+\.(\w+)[^,\n]*?(\w+_param_\d+)", header)}
    return Kernel(name[1], int(threads[1]), parameters, registers, tuple(instructions), labels)


def _statements(body: str) -> Iterator[str]:
    """Labels, with their colon, and what ends with a semicolon, until the brace that closes the body."""
    depth = 1
    for piece in body.split(";"):
        rest = piece.strip()
        # No statement begins with a brace, so that one in its place opens or closes the scope of inline assembly.
        while label_or_brace := re.match(r"[{}]|[\w$]+:(?!:)", rest):
            found = label_or_brace[0]
            if found not in "{}":
                yield found
            depth += {"{": 1, "}": -1}.get(found, 0)
            if not depth:
                return
            rest = rest[len(found) :].lstrip()
        if rest:
            yield rest


def _instruction(text: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
    if not found:
        raise UnknownInstruction(text)
    guard = Guard(found[2], found[1] == "!") if found[2] else None
    operands = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[\s])+", found[4])
    return Instruction(found[3], tuple(operands), guard, " ".join(text.split()))
