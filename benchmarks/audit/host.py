"""What a call costs on the host: microseconds of Python, its launches costing nothing, beside torch eager's chain.

For a process with TRITON_INTERPRET=0. Ours runs under an inert driver on one row. The chain runs on the CPU on one row
of eight elements, so that its arithmetic takes next to nothing: what is left is the dispatcher's and autograd's work,
as of ours. On a GPU each of the chain's launches costs the host some microseconds more, and so does each of ours.

torch's rms_norm is one op on CUDA, and a dozen on a CPU; there its layer_norm, which is one, stands for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as TF

from ..timing import cpu_turn, interleave
from ..traffic import Direction
from ..workloads import Shape, Workload
from .calls import run, unfilled_case
from .inert import compiling_for
from .targets import TARGETS

CHAIN_SPAN, CHAIN_PLANE = 8, (2, 2)
SECONDS = 0.15


@dataclass(frozen=True)
class HostTime:
    """Median seconds of one call."""

    ours: float
    eager: float

    @property
    def ratio(self) -> float:
        return self.ours / self.eager


def _one_op(x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor, eps: float) -> torch.Tensor:
    return TF.layer_norm(x, shape, weight, None, eps)


def _smallest(workload: Workload) -> Shape:
    """A shape that the chain takes, of next to no elements."""
    if workload.of.over_last_dim:
        return 1, CHAIN_SPAN
    return 1, max(workload.groups, 2), *CHAIN_PLANE


def host_time(workload: Workload, direction: Direction, seconds: float = SECONDS) -> HostTime:
    """Measures both in turn, in one thread, for so many seconds."""
    calls = {
        "ours": (workload.ours(), unfilled_case(workload, workload.of_samples(2), torch.float32)),
        "eager": (workload.torch_composition(), workload.case_of(_smallest(workload), lambda own, *_: torch.ones(own))),
    }
    runs = {name: functools.partial(run, call, case, direction) for name, (call, case) in calls.items()}
    with compiling_for(TARGETS["sm_90"], record=False), mock.patch.object(TF, "rms_norm", _one_op):
        for once in runs.values():
            once()  # compiles
        samples = interleave({name: cpu_turn(once) for name, once in runs.items()}, seconds)
    return HostTime(*(sorted(taken)[len(taken) // 2] for taken in (samples["ours"], samples["eager"])))
