"""Worker processes in which kernels are either compiled or interpreted: Triton decides that as it defines them.

Nothing heavy is imported here: a worker's environment must be set before it imports torch and Triton.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def _prepare(interpret: bool) -> None:
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    os.environ["OMP_NUM_THREADS"] = "1"  # as many workers as cores


def workers(*, interpret: bool, count: int | None = None) -> ProcessPoolExecutor:
    """A pool whose processes interpret kernels, or compile them; by default half of the cores each."""
    count = count or max(1, (os.cpu_count() or 2) // 2)
    context = multiprocessing.get_context("spawn")  # a fork would inherit what is imported
    return ProcessPoolExecutor(count, context, _prepare, (interpret,))
