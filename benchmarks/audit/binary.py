"""What a compiled kernel takes of a multiprocessor and how it reaches memory, read from its binary and machine code."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass

from . import cubin
from .assembly import Assembly, CodeSize, parse_gcn, parse_sass
from .inert import WORD_BYTES, Launch
from .targets import Target

WIDEST_ACCESS = 16  # bytes a thread


@dataclass(frozen=True)
class CompiledLaunch:
    """One launch as compiled for a target.

    registers: a thread. spilled_bytes: of stack and local memory a thread. shared_bytes: a program.
    resident_programs: as many as fit on a multiprocessor at once. widths: bytes a thread -> how many accesses of global
    memory in the code. copies: asynchronous ones among the loads; stages: of the software pipeline they belong to.
    thread_bytes_in_flight: asked for before the first wait; overlap: the share of them that is on its way while a loop
    works (`Assembly.overlap`), in_step: whether that loop holds a barrier. hash: of what was compiled.
    """

    kernel: str
    programs: int
    warps: int
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    resident_programs: int
    widths: dict[int, int]
    copies: int
    stages: int
    thread_bytes_in_flight: int
    overlap: float
    in_step: bool
    code: CodeSize
    hash: str

    @property
    def wide_share(self) -> float:
        """The share of the accessed bytes that is moved 16 bytes a thread at a time."""
        return self.share_at(WIDEST_ACCESS)

    def share_at(self, width: int) -> float:
        """The share of the accessed bytes that is moved so many bytes a thread at a time, or more."""
        moved = {of: of * count for of, count in self.widths.items()}
        return sum(count for of, count in moved.items() if of >= width) / max(1, sum(moved.values()))

    def side_by_side(self, multiprocessors: int) -> int:
        """How many programs of this launch a multiprocessor has at once."""
        return min(self.resident_programs, -(-self.programs // multiprocessors))

    def bytes_in_flight(self, multiprocessors: int) -> int:
        """Bytes of loads on their way on a multiprocessor, with as many programs as it gets of this launch."""
        return self.side_by_side(multiprocessors) * self.threads * self.thread_bytes_in_flight


_read: dict[tuple[str, str], CompiledLaunch] = {}


def describe(launch: Launch, target: Target) -> CompiledLaunch:
    """Reads one recorded launch; a binary that was seen before is not taken apart again, which lasts 0.2 s."""
    key = (launch.compiled.hash, target.name)
    if key not in _read:
        _read[key] = _describe(launch, target)
    return dataclasses.replace(_read[key], programs=launch.programs)


def _describe(launch: Launch, target: Target) -> CompiledLaunch:
    registers, spilled = resources(launch, target)
    code = assembly(launch, target)
    shared = int(launch.compiled.metadata.shared)
    return CompiledLaunch(
        kernel=launch.kernel,
        programs=launch.programs,
        warps=launch.warps,
        threads=launch.warps * target.warp_size,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        resident_programs=target.resident_programs(launch.warps, registers, shared),
        widths=dict(sorted(Counter(code.widths("load", "store", "copy")).items())),
        copies=len(code.widths("copy")),
        stages=code.stages(),
        thread_bytes_in_flight=code.bytes_in_flight(),
        overlap=code.overlap(),
        in_step=code.in_step(),
        code=code.size(),
        hash=launch.compiled.hash,
    )


def resources(launch: Launch, target: Target) -> tuple[int, int]:
    """(registers, spilled bytes) of a thread."""
    if target.backend == "hip":
        text = launch.compiled.asm["amdgcn"]
        return _amd(text, "vgpr_count"), _amd(text, "private_segment_fixed_size") + 4 * _amd(text, "vgpr_spill_count")
    return launch.compiled.n_regs, launch.compiled.n_spills * WORD_BYTES


def assembly(launch: Launch, target: Target) -> Assembly:
    """The machine code of a launch."""
    if target.backend == "hip":
        return parse_gcn(launch.compiled.asm["amdgcn"])
    return parse_sass(cubin.machine_code(launch.compiled.asm["cubin"], launch.kernel))


def _amd(text: str, name: str) -> int:
    found = re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"AMD's assembly must hold .{name} among its metadata, but does not")
    return int(found[1])
