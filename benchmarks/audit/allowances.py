"""The bytes and launches that the design allows a call: the table of its section 5 for the row norms, as formulas.

S is one pass over x, m a bit an element.

| rows                       | forward                     | backward                                                  |
|----------------------------|-----------------------------|-----------------------------------------------------------|
| whole, or walked within L2 | 2 S, residual 3 S, add_ 4 S | 3 S, residual and activation 5 S (mask 4 S + m), add_ 4 S |
| shared by several programs | 3 S, residual 4 S, add_ 5 S | 5 S, residual and activation 7 S (mask 6 S + m), add_ 6 S |

Beside these: parameters, read by each launch that needs them, and their gradients; partial sums of at most 32 rows a
multiprocessor, written and read; statistics of 8 bytes a row (16 in float64) and, for shared rows, as much for each
chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
class Schedule:
    """What of a call's schedule its bytes depend on: into how many chunks all rows are cut in each direction, 0 where a
    program has whole rows, and how many rows of partial sums there are."""

    forward_chunks: int = 0
    backward_chunks: int = 0
    partial_rows: int = 0

    @classmethod
    def of(cls, launches: Sequence[LaunchTraffic], multiprocessors: int) -> Schedule:
        """The one that these launches follow, with as many partial rows as are allowed."""
        programs = {launch.kernel: launch.programs for launch in launches}
        return cls(
            programs.get("row_moments_kernel", 0),
            programs.get("row_gradient_sums_kernel", 0),
            MOST_PARTIAL_ROWS * multiprocessors,
        )


# A program has whole rows and one sums all parameter gradients: with it an allowance is the least that can be moved.
LEAST = Schedule()


@dataclass(frozen=True)
class Allowance:
    """Bytes of each size of tensor, and launches, that a call may take."""

    bytes: Mapping[Size, float]
    launches: int

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


def allowance(workload: Workload, case: Case, direction: Direction, schedule: Schedule) -> Allowance:
    """What a call on these tensors may take."""
    x = case.inputs["x"]
    span, one_pass, wide = x.shape[-1], x.numel() * x.itemsize, compute_dtype(x.dtype).itemsize
    rows = x.numel() // span
    parameters = sum(case.inputs[name].numel() * case.inputs[name].itemsize for name in case.parameters)

    passes = forward_passes(workload) + bool(schedule.forward_chunks)
    launches = 1 + bool(schedule.forward_chunks)
    parameter = parameters
    statistics = 4 * wide * schedule.forward_chunks  # two sums a chunk, written and read
    mask = partial = 0.0
    if direction == "forward+backward":
        shares = bool(schedule.backward_chunks)
        passes += backward_passes(workload) + 2 * shares
        launches += 2 + shares
        parameter += (2 + shares) * parameters  # read by each launch; the gradients
        partial = 2 * len(case.parameters) * schedule.partial_rows * span * wide
        statistics += 2 * wide * rows * (2 + shares) + 4 * wide * schedule.backward_chunks
        mask = 2 * rows * -(-span // 8) if keeps_mask(workload) else 0.0
        if mask and shares:
            mask *= 1.5  # read by both launches
    sizes: dict[Size, float] = {
        "activation": passes * one_pass,
        "mask": mask,
        "parameter": parameter,
        "partial": partial,
        "statistics": statistics,
    }
    return Allowance(sizes, launches)


def of_call(
    where: str, span: int, launches: Sequence[LaunchTraffic], moved: Mapping[Size, float], allowed: Allowance
) -> list[Finding]:
    """What of the traffic of a call is more than is allowed; `moved` by size of tensor."""
    kernels = " + ".join(dict.fromkeys(launch.kernel for launch in launches))

    def finding(what: str, found: str, most: str) -> Finding:
        return Finding(where, kernels, what, found, most)

    found = []
    if len(launches) > allowed.launches:
        found.append(finding("too many launches", str(len(launches)), str(allowed.launches)))
    for size, count in moved.items():
        if count > TOLERANCE * allowed.bytes[size]:
            found.append(finding(f"moves too many bytes ({size})", f"{count:.0f}", f"{allowed.bytes[size]:.0f}"))
    asked, distinct = (
        sum(count(launch) for launch in launches) for count in (LaunchTraffic.asked, LaunchTraffic.distinct)
    )
    most = MOST_ASKED[span > 8192]
    if asked > most * distinct:
        found.append(finding("asks for too many bytes", f"{asked / distinct:.2f} times the distinct ones", f"{most}"))
    return found
