"""Worker processes in which kernels are either compiled or interpreted: Triton decides that as it defines them.

A new process imports the main module, and with it perhaps the kernels, before a pool could tell it anything; so it is
born into the environment that decides.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess  # a fork would inherit what is imported
from typing import Any
from unittest import mock


class _Worker(SpawnProcess):
    environment: Mapping[str, str]

    def start(self) -> None:
        with mock.patch.dict(os.environ, self.environment):
            super().start()


class _Context(SpawnContext):
    """Makes processes with these variables in their environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__()
        self.environment = environment

    def Process(self, *args: Any, **kwargs: Any) -> _Worker:  # type: ignore[override]
        worker = _Worker(*args, **kwargs)
        worker.environment = self.environment
        return worker


def workers(*, interpret: bool, count: int) -> ProcessPoolExecutor:
    """A pool of so many processes that interpret kernels, or compile them."""
    # One thread each: there are as many workers as cores.
    return ProcessPoolExecutor(count, _Context({"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}))
