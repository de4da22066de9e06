"""Kernels compiled for a GPU that is not there. These tests are a process of their own, with TRITON_INTERPRET=0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

try:
    import triton
except ImportError:
    triton = None

if triton is None or triton.knobs.runtime.interpret:
    collect_ignore_glob = ["test_*.py"]  # there is nothing that compiles in this process
else:
    from benchmarks.audit.inert import Launch, compiling_for
    from benchmarks.audit.targets import TARGETS


@pytest.fixture
def sm_90() -> Iterator[list[Launch]]:
    """Makes an inert sm_90 the active driver and 'triton' the backend; the list fills with the launches."""
    with compiling_for(TARGETS["sm_90"]) as launches:
        yield launches
