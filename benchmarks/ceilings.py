"""What no call can beat on this device, measured in the run itself: the rate of a copy, and the time of a launch."""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import timing
from .records import Spread

# More than any cache holds, and little beside the memory of a machine that runs the workloads.
COPIED_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
SECONDS = 0.5


def measure(device: torch.device) -> dict[str, Any]:
    """copy_bytes_per_second: read plus written by torch's copy. launch_seconds: of an empty kernel in a CUDA graph."""
    found: dict[str, Any] = {"copy_bytes_per_second": copy_rate(device)}
    if device.type == "cuda":
        found["launch_seconds"] = launch_seconds(device)
    return found


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy from one tensor into another."""
    source = torch.zeros(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    turn = timing.cpu_turn(copy) if device.type == "cpu" else timing.event_turn(copy, timing.CacheFlush(device))
    return 2 * source.numel() * source.itemsize / _median(turn)


def launch_seconds(device: torch.device) -> float:
    """Of a kernel of one element: what any launch takes, however little it moves."""
    one = torch.zeros(1, device=device)
    return _median(timing.graph_turn(one.neg_, timing.CacheFlush(device)))


def _median(turn: timing.Turn) -> float:
    (samples,) = timing.interleave({"ceiling": turn}, SECONDS).values()
    return Spread.of(samples).median
