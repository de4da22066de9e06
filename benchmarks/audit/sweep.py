"""Every entry of the launch tables x type x activation x residual x target, compiled, to see that none spills.

An entry is told apart by what the tables of fused_ops.kernels.launch return; it is compiled at the longest aligned span
that gets it and, where rows may begin between 16-byte boundaries, at the longest odd one. What else a call may vary
(LayerNorm or RMSNorm, parameters absent, of x's type or wider, float16 or bfloat16) goes round from call to call.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton

from fused_ops import functional as F
from fused_ops.kernels import launch as tables
from fused_ops.kernels.activations import ACTIVATIONS

from .binary import resources
from .inert import compiling_for
from .targets import TARGETS

Tensor = torch.Tensor
Residual = Literal["none", "after", "before"]
Parameters = Literal["same type", "float32", "none"]

RESIDUALS: tuple[Residual, ...] = ("none", "after", "before")
PARAMETERS: tuple[Parameters, ...] = ("same type", "float32", "none")
HALF = (torch.bfloat16, torch.float16)
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

    @property
    def function(self) -> str:
        """Its name in fused_ops.functional."""
        return ("add_" if self.residual == "before" else "") + ("layer_norm" if self.subtract_mean else "rms_norm")

    def __str__(self) -> str:
        named = {
            "": f"{self.function}, span {self.span}, {str(self.dtype).removeprefix('torch.')}",
            "activation": self.activation,
            "residual": self.residual if self.residual == "after" else None,
            "parameters": None if self.parameters == "same type" else self.parameters,
        }
        return ", ".join(f"{name} {value}".strip() for name, value in named.items() if value)

    def run(self) -> None:
        """Forward and backward on tensors with nothing in them."""
        x = torch.empty(ROWS, self.span, dtype=self.dtype, requires_grad=True)
        residual = None if self.residual == "none" else torch.empty_like(x, requires_grad=True)
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


def _table_key(span: int, itemsize: int) -> tuple:
    """What the tables say of a span, for every number of operands."""
    ragged = span % (16 // itemsize) != 0
    forward = tuple(
        tables.row_forward_config(span, itemsize, operands, wide, activation)
        for operands, wide, activation in itertools.product((1, 2, 3, 4), (0, itemsize, 4), (False, True))
    )
    backward = tuple(tables.row_backward_config(span, itemsize, operands, 3) for operands in range(6))
    chunks = (tables.chunk_config(span, itemsize, loaded) for loaded in (itemsize, 2 * itemsize, itemsize + 4))
    long = (*chunks, tables.backward_chunk_config(span, itemsize))
    column = tables.column_block_config(span, itemsize), tables.column_sum_config(span)
    return ragged, forward, backward, *(long if None in forward + backward else ()), *column


def spans(itemsize: int) -> list[int]:
    """The longest span, aligned and odd, of each entry of the tables."""
    longest = {}
    for span in (*WHOLE_ROWS, *LONG_ROWS):
        longest[_table_key(span, itemsize)] = span
        longest[_table_key(span - 1, itemsize)] = span - 1
    return sorted(longest.values())


def calls() -> Iterator[Call]:
    """All of them; each kind of parameter, norm and half type comes round with every other choice."""
    rounds = itertools.cycle(range(2 * 3 * 2))
    for itemsize, activation, residual in itertools.product((2, 4, 8), ACTIVATIONS, RESIDUALS):
        for span in spans(itemsize):
            turn = next(rounds)
            dtype = HALF[turn % 2] if itemsize == 2 else torch.float32 if itemsize == 4 else torch.float64
            yield Call(span, dtype, activation, residual, PARAMETERS[turn // 2 % 3], turn // 6 % 2 == 0)
        next(rounds)  # so that a span does not meet the same turn again


def spills(some_calls: Sequence[Call], target_name: str) -> list[Spill]:
    """Those of some calls on one target. What is compiled is not kept: all entries are some gigabytes."""
    target = TARGETS[target_name]
    found = []
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), compiling_for(target) as launches:
        triton.knobs.cache.dir = folder
        for call in some_calls:
            launches.clear()
            call.run()
            for launch in launches:
                registers, spilled = resources(launch, target)
                if spilled:
                    found.append(Spill(str(call), target_name, launch.kernel, registers, spilled))
    return found
