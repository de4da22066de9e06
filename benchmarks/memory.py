"""Memory of one call: what it allocates at its peak, and what it holds for the backward pass."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.autograd.graph import saved_tensors_hooks

from .workloads import Call, Case

Tensor = torch.Tensor

HOW = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "running sum of the allocations and releases that torch's profiler records",
}


def is_exhausted(error: RuntimeError) -> bool:
    """Whether an error says that memory has run out; on a CPU torch has no class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def storage_id(tensor: Tensor) -> int:
    """Tells the storages that are alive apart, also those of meta tensors, which have no data."""
    return int(tensor.untyped_storage()._cdata)


def kept_bytes(call: Call, case: Case) -> int:
    """Bytes that autograd holds between forward and backward of a call, its parameters apart."""
    return held_bytes(functools.partial(call, **case.arguments), [case.inputs[name] for name in case.parameters])


def held_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd holds behind a forward, the parameters' apart.

    An input that is held counts, since whoever made it could otherwise let it go.
    """
    of_model = {storage_id(parameter) for parameter in parameters}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_id(tensor) not in of_model:
            held[storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # alive until counted, so that no storage's id is used again
    total = sum(held.values())
    del outputs
    return total


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that is allocated at any moment of `run`, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _profiler_silenced(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        result = run()
    del result
    # The profiler's tables add allocations up by operation; its raw events have them in order of time.
    events = profiled.profiler.kineto_results.events()
    allocations = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in allocations:
        live += change
        peak = max(peak, live)
    return peak


@contextlib.contextmanager
def _profiler_silenced() -> Iterator[None]:
    """Without the lines that the profiler's C++ part writes to the error stream at every start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
