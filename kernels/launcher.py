"""The launcher: a kernel with its constants fixed, and what Triton compiled of it."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from .launch import THREADS_PER_WARP, is_gpu, more_registers
from .views import Tensors as Tensors

Tensor = torch.Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # read by @triton.jit at the same time as here

_HIP = torch.version.hip is not None
_hooks = triton.knobs.runtime
_drivers = triton.runtime.driver


def _somebody_watches() -> bool:
    """Whether a profiler has hooked itself into launches, and wants to be told of each."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Launcher:
    """A kernel with its constants fixed, for calls whose tensors have one set of types and are None in the same places.

    A call through Triton costs 7 us, one of what it compiled 1 us: so that is kept, by driver, device and the tensors'
    16-byte alignment (on AMD their size, too). No run-time number is one that Triton specializes on.

    most_registers: of a thread, at first. ptxas, left alone or with too few, keeps some values in memory, often so that
    one more program fits: it is asked again, with a bound for fewer programs, until it keeps none there. may_halve: at
    last for half of num_warps, by which what a program sums is summed in another order.
    """

    def __init__(
        self,
        kernel: Any,
        num_warps: int,
        *constants: Any,
        most_registers: int | None = None,
        may_halve: bool = False,
    ) -> None:
        self.kernel = kernel
        self.num_warps = num_warps
        self.most_registers = most_registers
        self.may_halve = may_halve
        self.constants = constants
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._types: tuple[torch.dtype | None, ...] | None = None
        self._compiles = isinstance(kernel, JITFunction)

    def __call__(
        self, programs: int, device: torch.device, given: Tensors, allocated: Tensors, *scalars: float
    ) -> None:
        """Launches `programs` programs on the device, with both groups of tensors in this order and then the scalars.

        `given` are tensors from outside, at any address; `allocated` come from torch's allocators, which align them.
        """
        arguments = (*given, *allocated, *scalars, *self.constants)
        if not self._compiles:
            self._require_types_of_before(given + allocated)
            self._first_launch(programs, arguments)
            return
        driver = _drivers.active
        index = driver.get_current_device()
        if device.index != index and is_gpu(device):
            with torch.cuda.device(device):
                self._launch(programs, driver, device.index, given, allocated, arguments)
        else:
            self._launch(programs, driver, index, given, allocated, arguments)

    def _launch(
        self, programs: int, driver: Any, index: int, given: Tensors, allocated: Tensors, arguments: tuple[Any, ...]
    ) -> None:
        """On the driver's current device, which has this index."""
        addresses = 0
        for tensor in given:
            if tensor is not None:
                addresses |= tensor.data_ptr()
        aligned: Any = True
        if addresses & 15:
            aligned = tuple([tensor is None or tensor.data_ptr() & 15 == 0 for tensor in given])
        if _HIP:  # AMD's compiler addresses a tensor under 2 GB with 32 bits
            aligned = (aligned, *[t is None or t.untyped_storage().nbytes() < 2**31 for t in (*given, *allocated)])
        key = (driver, index, aligned)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._first_launch(programs, arguments)
        elif _somebody_watches():
            compiled[(programs, 1, 1)](*arguments)
        else:
            stream, function, metadata = driver.get_current_stream(index), compiled.function, compiled.packed_metadata
            compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)

    def _require_types_of_before(self, tensors: Tensors) -> None:
        """RuntimeError where a second launch would need another binary than the first: interpreted kernels take
        anything, compiled ones are kept and run on whatever comes."""
        types = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
        if self._types not in (None, types):
            raise RuntimeError(
                f"a launcher of {self.kernel.__name__} must get tensors of one set of types, None in the same places, "
                f"but got {types} after {self._types}; use another launcher"
            )
        self._types = types

    def _first_launch(self, programs: int, arguments: tuple[Any, ...]) -> Any:
        """Launches, and returns what was compiled for it."""
        # fp fusion: its default changes in Triton 3.10, and with it the bits.
        options: dict[str, Any] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if not self._compiles:
            return self.kernel[(programs,)](*arguments, **options)
        target = _drivers.active.get_current_target()
        options["num_warps"] = max(1, self.num_warps * THREADS_PER_WARP // target.warp_size)
        if target.backend == "cuda":  # others know no such bound
            self._bound_registers(programs, arguments, options)
        return self.kernel[(programs,)](*arguments, **options)

    def _bound_registers(self, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Puts what keeps the fewest values in memory into the options: a bound, and if none is enough perhaps half the
        warps, whose threads have twice the registers. Found by compiling with each."""
        num_warps = options["num_warps"]
        fewest_warps = num_warps // 2 if self.may_halve and num_warps > 1 else num_warps
        bound, fewest, best = self.most_registers, math.inf, options
        while fewest:
            tried = {**options, "num_warps": num_warps, **({} if bound is None else {"maxnreg": bound})}
            compiled = self.kernel.warmup(*arguments, grid=(programs,), **tried)
            compiled = compiled.result() if hasattr(compiled, "result") else compiled  # of Triton's asynchronous mode
            if compiled is None:  # a hook of Triton's wants none
                return
            compiled[(programs, 1, 1)]  # loads it, by which Triton learns what it takes
            if compiled.n_spills < fewest:
                best, fewest = tried, compiled.n_spills
            bound = more_registers(num_warps, max(compiled.n_regs, bound or 0))
            if bound is None:
                if num_warps == fewest_warps:
                    break
                num_warps = fewest_warps
        options.update(best)
