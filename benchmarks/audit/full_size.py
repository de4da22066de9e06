"""What our call of a workload takes of a GPU at its full size: the traffic that a slice counts, grown to it.

For a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch

import fused_ops
from fused_ops.kernels.launch import H200, DeviceFacts

from ..memory import kept_bytes
from ..records import Counts
from ..traffic import Direction
from ..workloads import Workload
from . import slices
from .calls import unfilled_case
from .planned import planning


def count(workload: Workload, dtype: torch.dtype, direction: Direction, facts: DeviceFacts = H200) -> Counts:
    """Of one call at the full size on a device with these facts."""
    counted = slices.count(workload, dtype, direction, facts)
    # How many programs are resident only a compiler knows. Nothing is read twice but by a walk, which `walks_rows` of
    # the launch tables chooses only where the rows of all of them stay in the L2.
    moved = sum(counted.full_moved(index, resident_programs=1) for index in range(len(counted.launches)))
    kept = _kept(workload, dtype) if direction == "forward+backward" else None
    return Counts(len(counted.launches), round(moved), kept)


def _kept(workload: Workload, dtype: torch.dtype) -> int:
    with fused_ops.use_backend("triton"), planning():
        return kept_bytes(workload.ours(), unfilled_case(workload, workload.shape("full"), dtype))
