"""The bytes and launches that the design allows a call: the table of its section 5 for the row norms, as formulas.

S is one pass over x, m a bit an element.

| rows                       | forward                     | backward                                                  |
|----------------------------|-----------------------------|-----------------------------------------------------------|
| whole, or walked within L2 | 2 S, residual 3 S, add_ 4 S | 3 S, residual and activation 5 S (mask 4 S + m), add_ 4 S |
| shared by several programs | 3 S, residual 4 S, add_ 5 S | 5 S, residual and activation 7 S (mask 6 S + m), add_ 6 S |

Beside these: parameters, read by each launch that needs them; partial sums of at most 32 rows a multiprocessor, written
and read; statistics of 8 bytes a row (16 in float64) and, for shared rows, as much for each chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_ops.kernels.row_norm import compute_dtype

from ..traffic import Direction, backward_passes, forward_passes, keeps_mask
from ..workloads import Case, Workload
from .counts import LaunchTraffic, Size
from .findings import Finding

MOST_PARTIAL_ROWS = 32  # a multiprocessor
TOLERANCE = 1.05
# Of bytes asked for over distinct ones, for spans up to 8192 and above.
MOST_ASKED = (2.0, 3.0)


@dataclass(frozen=True)
class Allowance:
    """Bytes of each size of tensor, and launches, that a call may take."""

    activation: float
    mask: float
    parameter: float
    statistics: float
    launches: int

    def bytes(self, size: Size) -> float:
        """By the name that the counter gives a size."""
        return float(getattr(self, size))

    @property
    def total(self) -> float:
        return self.activation + self.mask + self.parameter + self.statistics


def allowance(
    workload: Workload, case: Case, direction: Direction, multiprocessors: int, launches: list[LaunchTraffic]
) -> Allowance:
    """What a call may take; of its launches is used only which of the two schedules they follow."""
    x = case.inputs["x"]
    span, one_pass = x.shape[-1], x.numel() * x.itemsize
    rows, wide = x.numel() // span, compute_dtype(x.dtype).itemsize
    parameters = sum(case.inputs[name].numel() * case.inputs[name].itemsize for name in case.parameters)
    programs = {launch.kernel: launch.programs for launch in launches}

    shares = "row_moments_kernel" in programs
    passes, most_launches = forward_passes(workload) + shares, 1 + shares
    parameter, mask = parameters, 0.0
    statistics = 4 * wide * programs.get("row_moments_kernel", 0)  # two sums a chunk, written and read
    if direction == "forward+backward":
        shares = "row_gradient_sums_kernel" in programs
        passes += backward_passes(workload) + 2 * shares
        most_launches += 2 + shares
        partials = 2 * len(case.parameters) * MOST_PARTIAL_ROWS * multiprocessors * span * wide
        parameter += (2 + shares) * parameters + partials  # read by each launch, and the gradients
        statistics += 2 * wide * rows * (2 + shares) + 4 * wide * programs.get("row_gradient_sums_kernel", 0)
        mask = 2 * rows * -(-span // 8) if keeps_mask(workload) else 0.0
    return Allowance(passes * one_pass, mask, parameter, statistics, most_launches)


def of_call(
    workload: Workload, span: int, launches: list[LaunchTraffic], moved: dict[Size, int], allowed: Allowance, where: str
) -> list[Finding]:
    """What of the traffic of a call is more than is allowed; `moved` by size of tensor."""
    kernels = " + ".join(dict.fromkeys(launch.kernel for launch in launches))

    def finding(what: str, found: str, most: str) -> Finding:
        return Finding(where, kernels, what, found, most)

    found = []
    if len(launches) > allowed.launches:
        found.append(finding("too many launches", str(len(launches)), str(allowed.launches)))
    for size, count in moved.items():
        if count > TOLERANCE * allowed.bytes(size):
            found.append(finding(f"moves too many bytes ({size})", f"{count}", f"{allowed.bytes(size):.0f}"))
    asked, distinct = sum(launch.asked() for launch in launches), sum(launch.distinct() for launch in launches)
    most = MOST_ASKED[span > 8192]
    if asked > most * distinct:
        found.append(finding("asks for too many bytes", f"{asked / distinct:.2f} times the distinct ones", f"{most}"))
    return found
