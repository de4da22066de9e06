"""Runs programs of a kernel: registers, control flow, and every instruction that is more than arithmetic.

Threads are lanes of NumPy arrays, and those that are furthest behind go first, so that after a branch all meet again.
Warps run in step, too, which no GPU promises: no result shows a barrier that lacks, and shared memory looks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .arithmetic import operation
from .formats import BITS, UNSIGNED, Array, constant, decode, encode, extended, join, split, undefined
from .global_memory import GlobalMemory
from .ptx import SHARED_MEMORY, Instruction, Kernel, base_and_offset, elements
from .shared_memory import SharedMemory
from .threads import WARP, Access, Threads

# Order what others see, or tell the hardware what to expect: nothing that shows here.
WITHOUT_EFFECT = frozenset({"griddepcontrol", "fence", "membar", "createpolicy", "prefetch"})
LEAVES = frozenset({"bra", "ret", "exit"})  # the instruction after it for another
ADDRESS = "u64"
MATRIX_ROWS, MATRIX_ROW_BYTES = 8, 16  # of what ldmatrix and stmatrix move
WHOLE_WARP = {"bfly": 31, "idx": 31, "down": 31, "up": 0}  # the bounds of a shfl that crosses no others


class Machine:
    """All threads of some programs from the first instruction to the last."""

    def __init__(
        self,
        kernel: Kernel,
        grid: int,
        parameters: Mapping[str, Array],
        threads: Threads,
        memory: GlobalMemory,
        shared: SharedMemory,
    ) -> None:
        self._kernel = kernel
        self._end = len(kernel.instructions)
        self._parameters = parameters
        self._threads = threads
        self._memory = memory
        self._shared = shared
        zero, one = np.zeros(1, np.uint32), np.ones(1, np.uint32)
        self._registers: dict[str, Array] = {
            "%tid.x": threads.thread,
            "%ntid.x": np.full(1, threads.threads, np.uint32),
            "%ctaid.x": threads.program,
            "%nctaid.x": np.full(1, grid, np.uint32),
            "%laneid": threads.thread % np.uint32(WARP),
            SHARED_MEMORY: np.zeros(1, np.uint64),
            **{f"%{of}.{axis}": zero for of in ("tid", "ctaid") for axis in "yz"},
            **{f"%{of}.{axis}": one for of in ("ntid", "nctaid") for axis in "yz"},
        }
        self._everywhere = True  # whether the instruction is executed in all threads
        self._next = np.zeros(len(threads), np.int64)  # instruction of each thread; of those that have ended, the end

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while (at := int(self._next.min())) < self._end:
                behind = self._next == at
                self._run_together(behind, at, self._end if behind.all() else int(self._next[~behind].min()))

    def _run_together(self, threads: Array, at: int, stop: int) -> None:
        """Runs these threads, which are all at one instruction, to a branch or to where others wait."""
        all_run = bool(threads.all())
        for number in range(at, stop):
            instruction = self._kernel.instructions[number]
            guard, active = instruction.guard, threads
            if guard:
                holds = self._read(guard.predicate, "pred")
                active = threads & (~holds if guard.negated else holds)
            name = instruction.parts[0]
            if name in LEAVES:
                self._next[threads] = number + 1
                self._next[active] = self._kernel.labels[instruction.operands[0]] if name == "bra" else self._end
                return
            if guard is None or active.any():
                self._everywhere = all_run and (guard is None or bool(active.all()))
                self._effects.get(name, Machine._compute)(self, instruction, active)
        self._next[threads] = stop

    # --- registers -------------------------------------------------------------------------------------------------

    def _read(self, operand: str, ptx_type: str) -> Array:
        """An element a lane, or one for all."""
        if operand.startswith("{"):
            parts = elements(operand)
            each = f"b{BITS[ptx_type] // len(parts)}"
            return decode(join([self._read(part, each) for part in parts]), ptx_type)
        held = self._registers.get(operand)
        if held is not None:
            return decode(held, ptx_type)
        if operand.startswith("%"):
            return decode(undefined(self._kernel.register_bits(operand)), ptx_type)
        return decode(constant(operand, BITS[ptx_type]), ptx_type)

    def _lanes(self, operand: str, ptx_type: str) -> Array:
        """An element a lane."""
        return np.broadcast_to(self._read(operand, ptx_type), len(self._threads))

    def _write(self, register: str, bits: Array, ptx_type: str, active: Array) -> None:
        if register == "_":
            return
        if register.startswith("{"):
            parts = elements(register)
            for part, of_part in zip(parts, split(bits, len(parts)), strict=True):
                self._write(part, of_part, f"b{of_part.dtype.itemsize * 8}", active)
            return
        width = self._kernel.register_bits(register)
        bits = extended(bits, ptx_type, width)
        if not self._everywhere:
            bits = np.where(active, bits, self._registers.get(register, undefined(width)))
        self._registers[register] = bits

    def _compute(self, instruction: Instruction, active: Array) -> None:
        if instruction.parts[0] in WITHOUT_EFFECT:
            return
        destination, *operands = instruction.operands
        found = operation(instruction.opcode, len(operands))
        if found is None or len(found.sources) != len(operands):
            raise instruction.unknown()
        values = found.compute(*map(self._read, operands, found.sources))
        register, *opposite = destination.split("|")
        self._write(register, encode(values, found.result), found.result, active)
        for each in opposite:
            self._write(each, ~values, found.result, active)

    def _shuffle(self, instruction: Instruction, active: Array) -> None:
        destination, operand, distance, bounds, *_ = instruction.operands
        mode = instruction.parts[2]
        if "|" in destination or mode not in WHOLE_WARP or (self._read(bounds, "u32") != WHOLE_WARP[mode]).any():
            raise instruction.unknown()
        lane, step = (self._lanes(each, "u32").astype(np.int64) for each in ("%laneid", distance))
        source = {
            "bfly": lambda: lane ^ step,
            "idx": lambda: step % WARP,
            "down": lambda: np.where(lane + step < WARP, lane + step, lane),
            "up": lambda: np.where(lane >= step, lane - step, lane),
        }[mode]()
        of_warp = np.arange(len(lane)) - lane
        self._write(destination, self._lanes(operand, "b32")[of_warp + source], "b32", active)

    # --- memory ----------------------------------------------------------------------------------------------------

    def _access(self, instruction: Instruction, address: str, active: Array, size: int) -> Access:
        base, offset = base_and_offset(address)
        lanes = np.flatnonzero(active)
        return Access(instruction, lanes, self._lanes(base, ADDRESS)[lanes] + np.uint64(offset % 2**64), size)

    def _load(self, instruction: Instruction, active: Array) -> None:
        destination, address, *_ = instruction.operands
        space, ptx_type = instruction.parts[1], instruction.parts[-1]
        if space == "param":
            return self._write(destination, self._parameters[base_and_offset(address)[0]], ptx_type, active)
        registers = elements(destination)
        access = self._access(instruction, address, active, BITS[ptx_type] // 8 * len(registers))
        if space == "global":
            loaded = self._memory.load(self._threads, access)
        elif space == "shared":
            loaded = self._shared.load(access)
        else:
            raise instruction.unknown()
        values: Array = loaded.view(UNSIGNED[BITS[ptx_type]])
        for place, register in enumerate(registers):
            self._write(register, self._scattered(values[:, place], access.lanes), ptx_type, active)

    def _store(self, instruction: Instruction, active: Array) -> None:
        address, source, *_ = instruction.operands
        space, ptx_type = instruction.parts[1], instruction.parts[-1]
        bits = f"b{BITS[ptx_type]}"
        registers = elements(source)
        access = self._access(instruction, address, active, BITS[ptx_type] // 8 * len(registers))
        data = np.stack([self._lanes(register, bits)[access.lanes] for register in registers], 1).view(np.uint8)
        if space == "global":
            self._memory.store(self._threads, access, data)
        elif space == "shared":
            self._shared.store(access, data)
        else:
            raise instruction.unknown()

    def _copy_asynchronously(self, instruction: Instruction, active: Array) -> None:
        _, asynchronous, what, *_ = (*instruction.parts, "")
        if asynchronous != "async" or what not in ("commit_group", "wait_group", "ca", "cg"):
            raise instruction.unknown()
        if what == "commit_group":
            return self._shared.commit_group(active)
        if what == "wait_group":
            return self._shared.wait_group(active, int(instruction.operands[0], 0))
        to, source, size, *source_size = instruction.operands
        into = self._access(instruction, to, active, int(size, 0))
        data = np.zeros((len(into.lanes), into.bytes), np.uint8)
        # The rest is zeros; Triton asks for all or nothing.
        read = self._lanes(source_size[0] if source_size else size, "u32")[into.lanes]
        if not np.isin(read, (0, into.bytes)).all():
            raise instruction.unknown("copies a part")
        reads = np.flatnonzero(read)
        out_of = self._access(instruction, source, active, into.bytes).only(reads)
        data[reads] = self._memory.load(self._threads, out_of)
        self._shared.begin_copy(into, data)

    def _barrier(self, instruction: Instruction, active: Array) -> None:
        if "warp" in instruction.parts:
            return
        if "sync" not in instruction.parts or "cluster" in instruction.parts:
            raise instruction.unknown()
        waiting = np.bincount(self._threads.slot[active], minlength=self._threads.programs)
        if not np.isin(waiting, (0, self._threads.threads)).all():
            raise instruction.unknown("some threads of a program only")
        self._shared.barrier(active)

    def _load_matrix(self, instruction: Instruction, active: Array) -> None:
        destination, address = instruction.operands
        for number, register in enumerate(elements(destination)):
            warps, access = self._matrix(instruction, address, active, number)
            halves = self._shared.load(access).view(np.uint16).reshape(-1, MATRIX_ROWS, MATRIX_ROWS)
            if "trans" in instruction.parts:
                halves = halves.transpose(0, 2, 1)
            values = np.ascontiguousarray(halves).view(np.uint32).reshape(-1)
            self._write(register, self._scattered(values, _lanes_from(warps, WARP)), "b32", active)

    def _store_matrix(self, instruction: Instruction, active: Array) -> None:
        address, source = instruction.operands
        for number, register in enumerate(elements(source)):
            warps, access = self._matrix(instruction, address, active, number)
            values = np.ascontiguousarray(self._lanes(register, "b32")[_lanes_from(warps, WARP)])
            halves = values.view(np.uint16).reshape(-1, MATRIX_ROWS, MATRIX_ROWS)
            if "trans" in instruction.parts:
                halves = halves.transpose(0, 2, 1)
            rows = np.ascontiguousarray(halves).view(np.uint8).reshape(-1, MATRIX_ROW_BYTES)
            self._shared.store(access, rows)

    def _matrix(self, instruction: Instruction, address: str, active: Array, number: int) -> tuple[Array, Access]:
        """First lanes of the warps, and the rows of one matrix of each, at the addresses that eight lanes have."""
        if not {"sync", "aligned", "m8n8", "shared", "b16"} <= {*instruction.parts}:
            raise instruction.unknown()
        warps = np.unique(np.flatnonzero(active) // WARP) * WARP
        lanes = _lanes_from(warps + MATRIX_ROWS * number, MATRIX_ROWS)
        of_all = self._access(instruction, address, np.ones(len(self._threads), bool), MATRIX_ROW_BYTES)
        return warps, of_all.only(lanes)

    def _scattered(self, values: Array, lanes: Array) -> Array:
        """Values of some lanes in the places of all."""
        scattered = np.zeros(len(self._threads), values.dtype)
        scattered[lanes] = values
        return scattered

    _effects: Mapping[str, Callable[[Machine, Instruction, Array], None]] = {
        "ld": _load,
        "st": _store,
        "cp": _copy_asynchronously,
        "bar": _barrier,
        "barrier": _barrier,
        "shfl": _shuffle,
        "ldmatrix": _load_matrix,
        "stmatrix": _store_matrix,
    }


def _lanes_from(first: Array, count: int) -> Array:
    return (first[:, None] + np.arange(count)).ravel()
