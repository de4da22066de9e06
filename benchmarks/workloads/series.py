"""Calls of one kind from a few KiB to more than a cache holds: where a launch takes the time, and where the memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .workload import Shape, Shapes, Workload

# Powers of four, so that a curve has few points; the largest is that of the workloads for a GPU, or for a CPU.
FULL_ELEMENTS = tuple(4**power for power in range(7, 14))
REDUCED_ELEMENTS = tuple(4**power for power in range(5, 12))
TINY_ELEMENTS = (1024, 1024, 1024, 1024, 1024, 2048, 4096)


def _curve(name: str, function: str, shaped: Callable[[int], Shape], **options: Any) -> tuple[Workload, ...]:
    """A point for each size; shaped: the shape of so many elements."""
    sizes = zip(FULL_ELEMENTS, REDUCED_ELEMENTS, TINY_ELEMENTS, strict=True)
    return tuple(
        Workload(f"{name}/{index}", function, Shapes(*map(shaped, of_point)), series=name, **options)
        for index, of_point in enumerate(sizes)
    )


def _rows(elements: int) -> Shape:
    return max(1, elements // 1024), 1024


def _images(elements: int) -> Shape:
    return max(1, elements // 8192), 32, 16, 16


SERIES: Mapping[str, tuple[Workload, ...]] = {
    "layer_norm + gelu": _curve("layer_norm + gelu", "layer_norm", _rows, activation="gelu"),
    "add_rms_norm": _curve("add_rms_norm", "add_rms_norm", _rows),
    "group_norm + silu": _curve("group_norm + silu", "group_norm", _images, activation="silu", groups=8),
    "batch_norm + residual + relu": _curve(
        "batch_norm + residual + relu", "batch_norm", _images, activation="relu", residual=True
    ),
}
