"""What a run measures: which workloads, curves and models, and in which types."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .whole_models import WHOLE_MODELS, WholeModel
from .workloads import WORKLOADS, Workload
from .workloads.series import SERIES

FIRST_CURVE = next(iter(SERIES))


def chosen(device: torch.device, full: bool, filters: Sequence[str]) -> list[Workload]:
    """Calls, then points of curves. What is bound by launches says something on a GPU: elsewhere --full has it."""
    points = [point for curve in SERIES.values() for point in curve]
    if filters:
        return [workload for workload in (*WORKLOADS.values(), *points) if _fits(workload.name, filters)]
    calls = [
        workload
        for workload in WORKLOADS.values()
        if full or (workload.in_default_run and not (workload.launch_bound and device.type == "cpu"))
    ]
    return [*calls, *(point for point in points if full or point.series == FIRST_CURVE)]


def chosen_models(device: torch.device, full: bool, filters: Sequence[str]) -> list[WholeModel]:
    """Whole models, of which a default run on a CPU has those that it has the time for."""
    if filters:
        return [model for model in WHOLE_MODELS.values() if _fits(model.name, filters)]
    return [model for model in WHOLE_MODELS.values() if full or device.type == "cuda" or model.in_default_run_on_cpu]


def dtypes(device: torch.device, full: bool) -> tuple[torch.dtype, ...]:
    """What people train in: bfloat16 on a GPU, float32 on a CPU; with --full the others that they use there."""
    if device.type == "cuda":
        return (torch.bfloat16, torch.float16, torch.float32) if full else (torch.bfloat16,)
    return (torch.float32, torch.bfloat16) if full else (torch.float32,)


def _fits(name: str, filters: Sequence[str]) -> bool:
    return any(text in name for text in filters)
