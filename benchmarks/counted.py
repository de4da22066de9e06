"""What calls would take of a GPU, ours beside torch eager's: launches, bytes moved, bytes kept. It takes no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import torch

from fused_ops.backend import HAS_TRITON

from . import tables
from .processes import workers
from .records import CountedRow, Counts, Run
from .tables import MIB, Column, call_columns, three_digits
from .traffic import DIRECTIONS
from .workloads import Workload

Table = Callable[[Sequence[Column[CountedRow]], Sequence[CountedRow]], str]

MOST_WORKERS = 4  # each holds torch and Triton, half a GB


def gap() -> str:
    """Why nothing can be counted here, empty where it can."""
    return "" if HAS_TRITON else "counting interprets the kernels, which needs triton, and it is not installed"


def count(cases: Sequence[tuple[Workload, torch.dtype]]) -> Iterator[list[CountedRow]]:
    """The rows of each case, in order, by worker processes that interpret the kernels."""
    processes = max(1, min(MOST_WORKERS, os.cpu_count() or 1, len(cases)))
    with workers(interpret=True, count=processes) as pool:
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


def _mebibytes(read: Callable[[Counts], int | None]) -> Callable[[CountedRow], str]:
    def cell(row: CountedRow) -> str:
        ours, eager = read(row.ours), read(row.eager)
        return "-" if ours is None or eager is None else f"{three_digits(ours / MIB)} / {three_digits(eager / MIB)}"

    return cell


def columns(rows: Sequence[CountedRow]) -> list[Column[CountedRow]]:
    """Launches, bytes moved and bytes kept, ours beside eager's."""
    return [
        *call_columns(rows),
        Column("launches o/e", lambda row: f"{row.ours.launches} / {row.eager.launches}"),
        Column("moved MiB o/e", _mebibytes(lambda counts: counts.moved_bytes)),
        Column("ratio", lambda row: f"{row.ours.moved_bytes / row.eager.moved_bytes:.2f}"),
        Column("kept MiB o/e", _mebibytes(lambda counts: counts.kept_bytes)),
    ]


def paragraphs(run: Run, table: Table = tables.text) -> list[str]:
    """The table between what it is and how to read it, or why there is none; empty where nothing was to be counted."""
    parts = []
    if run.counted:
        dtypes = " and ".join(dict.fromkeys(row.dtype for row in run.counted))
        parts += [
            f"What a GPU would have to launch and move for these calls, at full (GPU) size in {dtypes}; no GPU ran.",
            "counted, not timed",
            table(columns(run.counted), run.counted),
            "o/e: ours / torch eager (the fewest bytes its kernels can move); ratio: of the bytes, which the time of a "
            "large call follows; kept: held for backward.",
        ]
    return [*parts, *missing(run)]


def missing(run: Run) -> list[str]:
    """Why some or all of the table is missing; empty where nothing is."""
    return [f"Not counted: {run.uncounted}"] if run.uncounted else []
