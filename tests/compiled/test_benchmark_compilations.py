"""What the benchmark counts of compilations."""

from __future__ import annotations

import functools

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
        call = functools.partial(F.layer_norm, normalized_shape=(64,), activation="gelu")
        counts = [compilations.first_call(functools.partial(call, x[:rows]), x.device)[1] for rows in (4, 3, 4)]
    assert counts == [1, 0, 0]
