"""Every entry of the launch tables x type x activation x residual x target, compiled, to see that none spills.

An entry is what tells one compiled kernel from another apart from its span: warps, registers, tile, stages, access
width, norm. Which entry a call gets is seen by making it and launching nothing. Each is compiled at the longest span,
aligned or ragged, and with the most operands that get it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import triton

from fused_ops import functional as F
from fused_ops.kernels.activations import ACTIVATIONS
from fused_ops.kernels.launcher import Launcher

from .binary import resources
from .inert import compiling_for
from .targets import TARGETS

Tensor = torch.Tensor
Residual = Literal["none", "after", "before"]
Parameters = Literal["float32", "same type", "none"]
Entry = tuple[str, int, int | None, tuple[int, ...]]  # kernel, warps, registers, what else is constant

RESIDUALS: tuple[Residual, ...] = ("none", "after", "before")
PARAMETERS: tuple[Parameters, ...] = ("float32", "same type", "none")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32, torch.float64)
# Above, chunks of a row only get more steps of the same tile: 2^20 has the most chunks, 2^23 several steps.
WHOLE_ROWS = tuple(2**k for k in range(3, 16))
LONG_ROWS = (40_960, 2**16, 2**20, 2**23)
ROWS = 8  # the tables do not look at their number


@dataclass(frozen=True)
class Call:
    """A call of the row norms, forward and backward, whose kernels are to be compiled."""

    span: int
    dtype: torch.dtype
    activation: str | None
    residual: Residual
    parameters: Parameters
    subtract_mean: bool
    wide_residual: bool = False  # float32, with half x

    @property
    def function(self) -> str:
        """Its name in fused_ops.functional."""
        return ("add_" if self.residual == "before" else "") + ("layer_norm" if self.subtract_mean else "rms_norm")

    def __str__(self) -> str:
        named = {
            "": f"{self.function}, span {self.span}, {str(self.dtype).removeprefix('torch.')}",
            "activation": self.activation,
            "residual": "after" if self.residual == "after" else "float32" if self.wide_residual else None,
            "parameters": None if self.parameters == "same type" else self.parameters,
        }
        return ", ".join(f"{name} {value}".strip() for name, value in named.items() if value)

    def run(self) -> None:
        """Forward and backward on tensors with nothing in them."""
        x = torch.empty(ROWS, self.span, dtype=self.dtype, requires_grad=True)
        residual = None
        if self.residual != "none":
            residual = torch.empty_like(x, dtype=torch.float32 if self.wide_residual else None, requires_grad=True)
        weight = bias = None
        if self.parameters != "none":
            wide = torch.float32 if self.parameters == "float32" and self.dtype in HALF else self.dtype
            weight = torch.empty(self.span, dtype=wide, requires_grad=True)
            bias = torch.empty_like(weight, requires_grad=True) if self.subtract_mean else None
        norm: Callable[..., Any] = getattr(F, self.function)
        parameters = (weight, bias) if self.subtract_mean else (weight,)
        if self.residual == "before":
            outputs = norm(x, residual, (self.span,), *parameters, activation=self.activation)
        else:
            outputs = (norm(x, (self.span,), *parameters, residual=residual, activation=self.activation),)
        inputs = [tensor for tensor in (x, residual, weight, bias) if tensor is not None]
        torch.autograd.grad(outputs, inputs, [torch.empty_like(output) for output in outputs])


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


def _candidates(dtype: torch.dtype, activation: str | None, residual: Residual, wide_residual: bool) -> Iterator[Call]:
    """Those with the most operands and the longest spans first."""
    parameters = PARAMETERS if dtype in HALF else PARAMETERS[1:]
    spans = sorted({span - odd for span in (*WHOLE_ROWS, *LONG_ROWS) for odd in (0, 1)}, reverse=True)
    for own, span, subtract_mean in itertools.product(parameters, spans, (True, False)):
        yield Call(span, dtype, activation, residual, own, subtract_mean, wide_residual)


def calls(target_name: str) -> list[Call]:
    """Calls that together get every entry on a target, for each type, activation and residual."""
    kinds = (
        (dtype, residual, wide)
        for dtype, residual, wide in itertools.product(DTYPES, RESIDUALS, (False, True))
        if not wide or (dtype in HALF and residual == "before")
    )
    found = []
    with compiling_for(TARGETS[target_name]):
        for (dtype, residual, wide), activation in itertools.product(kinds, ACTIVATIONS):
            seen: set[Entry] = set()
            for call in _candidates(dtype, activation, residual, wide):
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
    _, *constants = launcher.constants  # without the span
    tile = tuple(constant for constant in constants if isinstance(constant, int))
    return launcher.kernel.__name__, launcher.num_warps, launcher.most_registers, tile


def by_kind(some_calls: Iterable[Call]) -> list[list[Call]]:
    """Neighbouring calls of one type, activation and residual together: among these no entry is compiled twice."""
    return [list(group) for _, group in itertools.groupby(some_calls, key=_kind)]


def _kind(call: Call) -> tuple[Any, ...]:
    return call.dtype, call.activation, call.residual, call.wide_residual


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
