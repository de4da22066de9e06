"""One call of a workload, forward alone or with its backward, on tensors whose contents do not matter."""

from __future__ import annotations

import torch

from ..traffic import Direction
from ..workloads import Call, Case, Shape, Workload


def run(call: Call, case: Case, direction: Direction) -> None:
    """Forward without gradients, or forward and the gradients of every input."""
    if direction == "forward":
        with torch.no_grad():
            call(**case.arguments)
        return
    outputs = call(**case.arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, list(case.inputs.values()), case.output_gradients)


def unfilled_case(
    workload: Workload, shape: Shape, dtype: torch.dtype, device: torch.device | str | None = None
) -> Case:
    """The tensors of a call with nothing in them: of what nobody touches, no memory is taken."""
    return workload.case_of(shape, lambda own_shape, *_: torch.empty(own_shape, dtype=dtype, device=device))
