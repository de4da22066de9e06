"""A launcher keeps what was compiled for its first launch, so all others must want the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

import triton
import triton.language as tl

from fused_ops.kernels.launcher import Launcher
from tests.norm_cases import DEVICE


@triton.jit
def doubling_kernel(X_ptr, Y_ptr, SIZE: tl.constexpr):
    if Y_ptr is not None:
        tl.store(Y_ptr + tl.arange(0, SIZE), 2 * tl.load(X_ptr + tl.arange(0, SIZE)))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only interpreted launches are looked at")
def test_a_launcher_refuses_other_types_than_its_firsts():
    x = torch.arange(4.0)
    launch, y = Launcher(doubling_kernel, 1, 4), torch.empty(4)
    launch(1, DEVICE, (x,), (y,))
    launch(1, DEVICE, (x + 1,), (y,))
    assert torch.equal(y, 2 * (x + 1))
    with pytest.raises(RuntimeError, match="doubling_kernel must get tensors of one set of types"):
        launch(1, DEVICE, (x,), (None,))
    with pytest.raises(RuntimeError, match=r"float64.*use another launcher"):
        launch(1, DEVICE, (x.double(),), (y,))
