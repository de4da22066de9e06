"""What a GPU would have to launch, move and keep for these calls, ours beside torch eager's: counts that take no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch

from fused_ops.backend import HAS_TRITON

from . import tables
from .audit.processes import workers
from .records import CountedRow, Counts, Run
from .tables import Column, call_columns, three_digits
from .traffic import DIRECTIONS
from .workloads import Workload

MOST_WORKERS = 4  # each holds torch and Triton, half a GB


def gap() -> str:
    """Why nothing can be counted here, empty where it can."""
    return "" if HAS_TRITON else "counting interprets the Triton kernels, so it needs triton, which is not installed here"


def count(cases: Sequence[tuple[Workload, torch.dtype]]) -> Iterator[list[CountedRow]]:
    """The rows of each case, in order, by worker processes that interpret the kernels."""
    processes = max(1, min(MOST_WORKERS, os.cpu_count() or 1, len(cases)))
    # A worker imports the main module, and the kernels with it, before it could be told to interpret them: so it is born
    # with the environment that says so.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), workers(interpret=True, count=processes) as pool:
        yield from pool.map(count_case, *zip(*cases, strict=True))


def count_case(workload: Workload, dtype: torch.dtype) -> list[CountedRow]:
    """Both directions of a workload at its full size, in a process that interprets the kernels."""
    from .audit import eager, full_size  # these need triton

    return [
        CountedRow(
            workload.name,
            workload.function,
            workload.shape("full"),
            str(dtype).removeprefix("torch."),
            direction,
            full_size.count(workload, dtype, direction),
            eager.count(workload, dtype, direction),
        )
        for direction in DIRECTIONS
    ]


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else three_digits(count / tables.MIB)


def _pair(show: Callable[[Counts], str]) -> Callable[[CountedRow], str]:
    return lambda row: f"{show(row.ours)} / {show(row.eager)}"


def columns(rows: Sequence[CountedRow]) -> list[Column[CountedRow]]:
    """Launches, bytes moved and bytes kept, ours beside eager's."""
    return [
        *call_columns(rows),
        Column("launches o/e", _pair(lambda counts: str(counts.launches))),
        Column("moved MiB o/e", _pair(lambda counts: _mebibytes(counts.moved_bytes))),
        Column("ours/eager", lambda row: f"{row.ours.moved_bytes / row.eager.moved_bytes:.2f}"),
        Column("kept MiB o/e", _pair(lambda counts: _mebibytes(counts.kept_bytes))),
    ]


def summary(run: Run, table: Callable[[Sequence[Column[CountedRow]], Sequence[CountedRow]], str] = tables.text) -> str:
    """The table and how to read it, or why there is none; empty where nothing was to be counted."""
    parts = []
    if run.counted:
        dtypes = " and ".join(dict.fromkeys(row.dtype for row in run.counted))
        parts += [
            f"What a GPU would have to launch and move for the same calls at their full (GPU) size in {dtypes}; no GPU ran.",
            "counted, not timed",
            table(columns(run.counted), run.counted),
            "o/e: ours / torch eager; ours/eager: of the bytes moved, under 1 ours moves less, and large calls take as long "
            "as their bytes; kept: held for backward.",
        ]
    if run.uncounted:
        parts.append(f"Not counted: {run.uncounted}")
    return "\n".join(parts)
