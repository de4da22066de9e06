"""The gate before the clock: a contender whose results or gradients are wrong is reported as wrong, and not timed.

The oracle is the torch composition in float64, on the same inputs. What is allowed follows from the arithmetic:

- Each operation of a composition rounds its result once, to half an eps of it. No contender chains more than three
  operations on the way to a result (norm, add, activation; backward the same), and intermediate results may be larger
  than the last: 4 eps of the largest value.
- A sum of n terms of random sign, added one by one, errs by eps sqrt(n) / 5 of its size, where eps is that of the type
  it is made in: sqrt(eps^2 / 12 * (1 + ... + n)) over sqrt(n). 1/2 in place of 1/5 covers the worst of many sums. The
  type is float32 (float64 for float64), but for the gradients of parameters in half types on a CPU, which torch's own
  kernels there add up in the half type.
- At a jump of an activation's slope, a pre-activation that rounding carries across it has the other slope: such a
  gradient is wrong altogether, whichever implementation it is. The pre-activations that close to the jump are a share
  of about 4 eps, so gradients of such activations are compared in the root mean square, where they amount to
  sqrt(4 eps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .traffic import Direction
from .workloads import Call, Case, Workload

Tensor = torch.Tensor

JUMPING_SLOPE = frozenset({"relu", "relu6", "leaky_relu", "selu", "hardswish", "hardsigmoid"})


@dataclass(frozen=True)
class Expected:
    """Outputs, and gradients by the name of their input, in float64."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """error: the largest error as a share of what is allowed. reason: empty where the contender is right."""

    error: float
    reason: str = ""


def run_forward(call: Call, case: Case) -> tuple[Tensor, ...]:
    """The outputs, always as a tuple."""
    outputs = call(**case.arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients(outputs: tuple[Tensor, ...], case: Case) -> tuple[Tensor, ...]:
    """The gradients of all inputs in their order."""
    return torch.autograd.grad(outputs, tuple(case.inputs.values()), case.output_gradients)


def run_forward_backward(call: Call, case: Case) -> tuple[Tensor, ...]:
    """A forward pass and what a backward pass makes of it."""
    return gradients(run_forward(call, case), case)


def expect(workload: Workload, case: Case) -> Expected:
    """What every contender must compute."""
    exact = case.to(torch.float64)
    outputs = run_forward(workload.torch_composition(), exact)
    return Expected(tuple(y.detach() for y in outputs), dict(zip(exact.inputs, gradients(outputs, exact), strict=True)))


def check(workload: Workload, case: Case, call: Call, expected: Expected, direction: Direction) -> Verdict:
    """Calls the contender once in the direction that is to be timed, and compares all that it returns."""
    before = [tensor.detach().clone() for tensor in (*case.inputs.values(), *case.output_gradients)]
    with torch.set_grad_enabled(direction != "forward"):
        outputs = run_forward(call, case)
    if len(outputs) != len(expected.outputs):
        return Verdict(math.inf, f"it returns {len(outputs)} tensors instead of {len(expected.outputs)}")
    found = () if direction == "forward" else gradients(outputs, case)
    after = (*case.inputs.values(), *case.output_gradients)
    if not all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
        return Verdict(math.inf, "it changes its inputs")
    comparisons = [
        _compare(workload, name, got, want, case, jumps=False)
        for name, got, want in zip(("y", "total"), outputs, expected.outputs, strict=False)
    ]
    jumps = workload.activation in JUMPING_SLOPE
    for (name, want), got in zip(expected.gradients.items(), found, strict=False):
        comparisons.append(_compare(workload, f"d{name}", got, want, case, jumps))
    return max(comparisons, key=lambda verdict: verdict.error)


def _compare(workload: Workload, name: str, got: Tensor, want: Tensor, case: Case, jumps: bool) -> Verdict:
    x = case.inputs["x"]
    if got.shape != want.shape or got.dtype != x.dtype:
        came, due = (f"{tuple(shape)} {dtype}" for shape, dtype in ((got.shape, got.dtype), (want.shape, x.dtype)))
        return Verdict(math.inf, f"{name} is {came} instead of {due}")
    eps = torch.finfo(x.dtype).eps
    # Statistics are sums over a row or a group, a parameter's gradient is a sum over the rows.
    of_parameter = got.shape != x.shape
    terms = x.numel() // got.numel() if of_parameter else workload.span(tuple(x.shape))
    summed_as_is = x.dtype == torch.float64 or (of_parameter and x.device.type == "cpu")
    sum_eps = eps if summed_as_is else torch.finfo(torch.float32).eps
    allowed = 4 * eps + sum_eps * math.sqrt(terms) / 2
    difference = got.detach().double() - want
    if jumps:
        allowed += math.sqrt(4 * eps)
        error, scale = difference.square().mean().sqrt().item(), want.square().mean().sqrt().item()
    else:
        error, scale = difference.abs().max().item(), want.abs().max().item()
    share = error / (allowed * scale) if error else 0.0
    if not share <= 1.0:  # a NaN is no more right than a large error
        share = math.inf if math.isnan(share) else share
        return Verdict(share, f"{name} differs from float64 by {error:.2g}; {allowed * scale:.2g} is allowed")
    return Verdict(share)
