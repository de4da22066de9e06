"""The fewest bytes a call must move, from which every GB/s of the benchmark follows.

S is one pass over x. Counted are the tensors of x's shape, each read or written once, and the bit mask m of an
activation whose slope takes two values (one bit an element). Left out are weight, bias and their gradients, of which
there is one row, and the statistics, 8 bytes a row: a rate is understated by their share of S, never overstated.

| call                   | forward          | backward                                              |
|------------------------|------------------|-------------------------------------------------------|
| norm(x)                | 2 S: x, y        | 3 S: x, dy, dx                                        |
| norm(x) + residual     | 3 S: + residual  | 3 S: dresidual is dy                                  |
| act(norm(x))           | 2 S              | 3 S: the pre-activation follows from x                |
| act(norm(x) + residual)| 3 S              | 5 S: + residual, dresidual; two-valued slope 4 S + m  |
| add_norm(x, residual)  | 4 S: + total     | 4 S: total, dy, dtotal, and one dx = dresidual        |
| x + residual           | 3 S              | nothing: both gradients are dy                        |
| act(x + residual)      | 3 S              | 4 S: dy, x, residual, dx; two-valued slope 2 S + m    |
| scale * x + residual   | 3 S              | 3 S: dy, x, dx                                        |

The mask is written by a forward that a backward follows, so an inference pass has none.
"""

from __future__ import annotations

from typing import Literal

import torch

from .workloads import Shape, Workload, elements

Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")

# Their slope is one of two numbers, so one bit an element stands for the pre-activation.
TWO_VALUED_SLOPE = frozenset({"relu", "relu6", "leaky_relu"})


def forward_passes(workload: Workload) -> int:
    """How many times S the forward moves."""
    if workload.adds_first:
        return 4
    return 3 if workload.residual else 2


def backward_passes(workload: Workload) -> int:
    """How many times S the backward moves, the mask apart."""
    if not workload.of.norm:
        if workload.activation is None:
            return 3 if workload.of.parameters(workload.shape("tiny")) else 0
        return 2 if workload.activation in TWO_VALUED_SLOPE else 4
    if workload.adds_first:
        return 4
    if not workload.residual or workload.activation is None:
        return 3
    return 4 if workload.activation in TWO_VALUED_SLOPE else 5


def keeps_mask(workload: Workload) -> bool:
    """Whether a forward that a backward follows writes one bit an element for it."""
    return workload.residual and not workload.adds_first and workload.activation in TWO_VALUED_SLOPE


def minimal_bytes(workload: Workload, shape: Shape, dtype: torch.dtype, direction: Direction) -> int:
    """The bytes of one call at a shape and type."""
    one_pass = elements(shape) * dtype.itemsize
    if direction == "forward":
        return forward_passes(workload) * one_pass
    mask = -(-elements(shape) // 8) if keeps_mask(workload) else 0
    return (forward_passes(workload) + backward_passes(workload)) * one_pass + 2 * mask
