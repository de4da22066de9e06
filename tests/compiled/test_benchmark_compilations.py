"""What the benchmark counts of compilations."""

from __future__ import annotations

import pytest
import torch
from triton import knobs

from benchmarks import compilations
from benchmarks.audit.inert import compiling_for
from benchmarks.audit.targets import TARGETS
from fused_ops import functional as F


def test_kernels_are_counted_whose_constants_are_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.compilation, "listener", None)
    compilations.listen()
    x = torch.zeros(4, 64)
    with compiling_for(TARGETS["sm_90"]), torch.no_grad():
        counts = [
            compilations.first_call(lambda: F.layer_norm(x[:rows], (64,), activation="gelu"), x.device)[1]
            for rows in (4, 3, 4)
        ]
    assert counts == [1, 0, 0]
