"""The bytes and launches that the design allows a call: the table of its section 5 as formulas.

S is one pass over x, m a bit an element.

| rows, or groups of planes  | forward                     | backward                                                  |
|----------------------------|-----------------------------|-----------------------------------------------------------|
| whole, or walked within L2 | 2 S, residual 3 S, add_ 4 S | 3 S, residual and activation 5 S (mask 4 S + m), add_ 4 S |
| shared by several programs | 3 S, residual 4 S, add_ 5 S | 5 S, residual and activation 7 S (mask 6 S + m), add_ 6 S |

Groups are shared, in one launch more each way, where they do not fit the chip or lie channels_last. Channels of a
batch norm likewise; whole, their backward is one launch, and by running statistics nothing is read twice, in two.
Switchable norm is always shared; it has statistics of each plane. The residual add is a row without statistics: 3 S,
and backward nothing, 2 S + m or 4 S with an activation, 3 S with a scale.

Beside these: parameters, read by each launch that needs them, and their gradients; partial sums of at most 32 rows a
multiprocessor, written and read; statistics of 8 bytes a row (16 in float64) and, for shared rows, as much for each
chunk; for shared groups a share of the activations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import triton

from fused_ops.kernels.launch import DeviceFacts
from fused_ops.kernels.problem import compute_dtype

from ..traffic import Direction, backward_passes, forward_passes, keeps_mask
from ..workloads import Case, Workload, elements
from .counts import LaunchTraffic, Size
from .findings import Finding

MOST_PARTIAL_ROWS = 32  # a multiprocessor
TOLERANCE = 1.05
# Of bytes asked for over distinct ones, for spans up to 8192 and above.
MOST_ASKED = (2.0, 3.0)


# Spans, by the size of an element, up to which a program has to read a row from memory once, held on chip or walked
# within the L2: section 5 of the design. Crowded: where z is computed again, with weight and bias beside their sums.
HELD_FORWARD = {2: 16384, 4: 8192, 8: 2048}
HELD_BACKWARD = {2: 8192, 4: 8192, 8: 1024}
HELD_BACKWARD_CROWDED = {2: 4096, 4: 4096, 8: 1024}
# Of a device, which walks rows in 3 S faster than all of it moves the 5 S of shared ones.
WALKED_SHARE = 0.6
# Padded elements of a group, as far as a program has to hold it.
HELD_GROUP_FORWARD = {2: 16384, 4: 8192, 8: 2048}
HELD_GROUP_BACKWARD = {2: 8192, 4: 8192, 8: 1024}
HELD_GROUP_BACKWARD_CROWDED = {2: 8192, 4: 4096, 8: 1024}
# Padded elements of the channels of a batch norm that a program has at least.
HELD_CHANNELS_FORWARD = {2: 16384, 4: 16384, 8: 2048}
HELD_CHANNELS_BACKWARD = {2: 8192, 4: 8192, 8: 1024}
SHORT_POOLED = 256  # positions of a plane: below, it is columns of a matrix, one row a sample
# Of the activations' bytes, what partial results of shared groups may add.
PARTIAL_SHARE = 0.04


@dataclass(frozen=True)
class Schedule:
    """What of a call's schedule its bytes depend on: into how many chunks all rows are cut in each direction, 0 where a
    program has whole rows, or whether groups are cut at all; and how many rows of partial sums there are."""

    forward_chunks: int = 0
    backward_chunks: int = 0
    partial_rows: int = 0

    @classmethod
    def allowed(cls, workload: Workload, case: Case, launches: Sequence[LaunchTraffic], facts: DeviceFacts) -> Schedule:
        """The one that these launches follow, where the call may be cut into chunks; otherwise that of whole rows. With
        as many partial rows as are allowed."""
        if workload.of.by_channel == "batch":
            return _channels_allowed(workload, case)
        if workload.of.by_channel == "mixed":
            return Schedule(1, 1)
        if workload.of.by_channel:
            return _groups_allowed(workload, case)
        programs = {launch.kernel: launch.programs for launch in launches}
        forward = programs.get("row_moments_kernel", 0) if _may_share_forward(workload, case, facts) else 0
        backward = programs.get("row_gradient_sums_kernel", 0) if _may_share_backward(workload, case, facts) else 0
        return cls(forward, backward, MOST_PARTIAL_ROWS * facts.multiprocessors)


def _groups_allowed(workload: Workload, case: Case) -> Schedule:
    """A sum a sample and channel; groups cut where they are padded to more elements than a program has to hold."""
    x = case.inputs["x"]
    plane = elements(tuple(x.shape[2:]))
    planes = workload.span(tuple(x.shape)) // plane
    padded = triton.next_power_of_2(planes) * triton.next_power_of_2(plane)
    crowded = backward_passes(workload) == 5
    held_backward = HELD_GROUP_BACKWARD_CROWDED if crowded else HELD_GROUP_BACKWARD
    forward, backward = (
        workload.channels_last or padded > held[x.itemsize] for held in (HELD_GROUP_FORWARD, held_backward)
    )
    return Schedule(int(forward), int(backward), x.shape[0])


def _channels_allowed(workload: Workload, case: Case) -> Schedule:
    """Channels cut where no program has to hold the fewest of them whose run in memory is one of whole bytes of bits;
    not where nothing is computed of them."""
    x = case.inputs["x"]
    samples, _, *positions = x.shape
    plane = elements(tuple(positions))
    if not workload.training:
        return Schedule()
    lies_last = plane == 1 or workload.channels_last
    if lies_last:
        rows, columns = samples * plane, max(8, 32 // x.itemsize)
    else:
        rows, columns = samples, 8 // math.gcd(8, plane) * plane
    padded = triton.next_power_of_2(rows) * triton.next_power_of_2(columns)
    # Waiting in registers beside x, a residual takes as many; and z is computed again.
    waits = 2 if workload.residual and not workload.adds_first and x.itemsize > 2 else 1
    crowded = 2 if backward_passes(workload) == 5 and x.itemsize == 4 else 1
    cut = plane >= SHORT_POOLED and not lies_last
    return Schedule(
        int(cut or waits * padded > HELD_CHANNELS_FORWARD[x.itemsize]),
        int(cut or crowded * padded > HELD_CHANNELS_BACKWARD[x.itemsize]),
    )


def _may_share_forward(workload: Workload, case: Case, facts: DeviceFacts) -> bool:
    """Whether rows are too long for the chip, and too few, or too long for the L2, to be walked."""
    x = case.inputs["x"]
    span = workload.span(tuple(x.shape))
    if span <= HELD_FORWARD[x.itemsize]:
        return False
    row_bytes = span * (x.itemsize + (case.inputs["residual"].itemsize if workload.adds_first else 0))
    if row_bytes <= 65536 and x.itemsize < 8 and span * x.itemsize % 16 == 0:
        return False  # one chunk, always walked
    # Rows over 64 KB have a multiprocessor for themselves; three of the others, float64 or ragged, share one.
    resident = facts.multiprocessors * (1 if row_bytes > 65536 else 3)
    return x.numel() // span < facts.multiprocessors or resident * row_bytes > facts.l2_bytes // 2


def _may_share_backward(workload: Workload, case: Case, facts: DeviceFacts) -> bool:
    """Whether rows are too long for the chip, and have parameter gradients, or are too few, or too long for the L2, to
    be walked."""
    x = case.inputs["x"]
    span = workload.span(tuple(x.shape))
    crowded = workload.activation is not None and len(case.parameters) > 1
    if span <= (HELD_BACKWARD_CROWDED if crowded else HELD_BACKWARD)[x.itemsize]:
        return False
    walked = 3 if backward_passes(workload) > 3 else 2  # tensors: dy, x, a residual or dtotal
    fits = facts.multiprocessors * span * walked * x.itemsize <= facts.l2_bytes // 2
    return bool(case.parameters) or x.numel() // span < WALKED_SHARE * facts.multiprocessors or not fits


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
    if workload.of.by_channel:
        return _allowance_of_groups(workload, case, direction, schedule)
    span = workload.span(tuple(x.shape))
    one_pass, wide = x.numel() * x.itemsize, compute_dtype(x.dtype).itemsize
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
        launches += (backward_passes(workload) > 0) + shares + bool(case.parameters)
        # A channel that is every few elements has as many partial sums, which two launches add up.
        launches += bool(case.parameters) and not workload.of.norm and workload.channels_last
        parameter += (2 + shares) * parameters  # read by each launch; the gradients
        partial = 2 * len(case.parameters) * schedule.partial_rows * span * wide
        if workload.of.norm:
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


def _allowance_of_groups(workload: Workload, case: Case, direction: Direction, schedule: Schedule) -> Allowance:
    x = case.inputs["x"]
    channels, wide = x.shape[1], compute_dtype(x.dtype).itemsize
    groups = x.numel() // workload.span(tuple(x.shape))
    parameters = sum(case.inputs[name].numel() * case.inputs[name].itemsize for name in case.parameters)
    of_batch = workload.of.by_channel in ("batch", "mixed")
    frozen = of_batch and not workload.training  # what is summed is for the parameters alone
    cut = bool(schedule.forward_chunks), bool(schedule.backward_chunks)
    passes, launches = forward_passes(workload) + cut[0], 3 if cut[0] else 1
    reads, statistics = 1, 2 * wide * groups * cut[0] * 2
    if of_batch:
        statistics += 2 * sum(statistic.nbytes for statistic in case.state.values())  # read, and moved
    mask = partial = 0.0
    if direction == "forward+backward":
        passes += backward_passes(workload) + 2 * cut[1]
        launches += 3 if cut[1] else 1 if of_batch and not frozen else 2
        reads += 4
        statistics += 2 * wide * groups * (2 + 3 * cut[1])
        if not cut[1] and not of_batch:
            partial = 2 * len(case.parameters) * schedule.partial_rows * channels * wide
        bits = elements(tuple(x.shape)) / 8
        mask = 2 * bits if keeps_mask(workload) else 0.0
    if workload.of.by_channel == "mixed":  # moments of each plane's pieces, what is mixed, and what x is normalized by
        planes = elements(tuple(x.shape[:2]))
        statistics += wide * planes * (12 if direction == "forward" else 12 + 20)
    one_pass = x.numel() * x.itemsize
    sizes: dict[Size, float] = {
        "activation": passes * one_pass,
        "mask": mask + 8 * groups,
        "parameter": reads * parameters,
        "partial": partial,
        "statistics": statistics + (PARTIAL_SHARE * passes * one_pass if any(cut) or frozen else 0.0),
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
