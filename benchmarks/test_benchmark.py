"""The workloads under pytest-benchmark: `make bench-pytest`. One group a workload and direction, ours beside torch.

pytest-benchmark times each contender on its own, so these figures follow changes of our own from run to run
(--benchmark-autosave, --benchmark-compare); for ratios to others `python -m benchmarks.run` interleaves them.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch

from . import correctness, timing
from .peers import EAGER, OURS, PEERS, Peer
from .traffic import DIRECTIONS, Direction
from .workloads import WORKLOADS, Case, Size, Workload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE: Size = "full" if DEVICE.type == "cuda" else "reduced"
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CONTENDERS = [peer for peer in PEERS if peer.name in (OURS, EAGER)]
CHOSEN = [workload for workload in WORKLOADS.values() if workload.in_default_run]


@pytest.fixture(scope="module", autouse=True)
def _allocator_as_in_a_run() -> None:
    timing.keep_freed_memory()


@functools.lru_cache(maxsize=1)
def prepared(workload: Workload) -> tuple[Case, correctness.Expected]:
    """Inputs and what is to come of them, once for all tests of a workload, which follow each other."""
    case = workload.case(SIZE, DTYPE, DEVICE)
    return case, correctness.expect(workload, case)


def until_done(run: timing.Run) -> timing.Run:
    """A call that lasts until the device is done with it."""

    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize(DEVICE)

    return run if DEVICE.type == "cpu" else run_and_wait


# The uppermost varies fastest.
@pytest.mark.parametrize("peer", CONTENDERS, ids=lambda peer: peer.name.replace(" ", "_"))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", CHOSEN, ids=lambda workload: workload.name)
def test_call(benchmark: Any, workload: Workload, direction: Direction, peer: Peer) -> None:
    case, expected = prepared(workload)
    call = peer.build(workload)
    forward = direction == "forward"
    with torch.no_grad() if forward else contextlib.nullcontext():
        verdict = correctness.check(workload, case, call, expected, direction)
        assert not verdict.reason, f"{peer.name} is wrong and not worth timing: {verdict.reason}"
        benchmark.group = f"{workload.name} {direction}"
        run = functools.partial(correctness.run_forward if forward else correctness.run_forward_backward, call, case)
        benchmark.pedantic(until_done(run), warmup_rounds=2, rounds=15)
