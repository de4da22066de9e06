"""Instance norm with running statistics, by kernels where it takes the input's, by composition where it takes these."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as TF

import fused_ops
from fused_ops import functional as F
from tests.layouts import Layout, channels_last, every_other_column
from tests.norm_cases import DEVICE, normal, same_bits

pytestmark = pytest.mark.usefixtures("triton_backend", "memory_checked")

Tensor = torch.Tensor

each_function = pytest.mark.parametrize("function", ["instance_norm", "add_instance_norm"])
each_layout = pytest.mark.parametrize(
    "layout", [torch.clone, channels_last, every_other_column], ids=["contiguous", "channels_last", "strided"]
)


def statistics(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return normal(4, dtype=dtype, seed=7), normal(4, dtype=dtype, seed=8).square()


def call(function: str, x: Tensor, residual: Tensor, *running: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """(y, what was normalized)."""
    if function == "add_instance_norm":
        return F.add_instance_norm(x, residual, *running, **keywords)
    return F.instance_norm(x, *running, **keywords), x


@each_layout
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
@each_function
def test_they_are_torchs_after_every_call(function: str, momentum: float, layout: Layout, launches: list[str]) -> None:
    ours, torchs = statistics(), statistics()
    for seed in range(3):
        x, residual = (normal(3, 4, 5, 6, dtype=torch.float64, seed=seed + i) for i in range(2))
        y, _ = call(function, layout(x), residual, *ours, momentum=momentum)
        expected = TF.instance_norm(x + residual if function.startswith("add") else x, *torchs, momentum=momentum)
        torch.testing.assert_close((y, *ours), (expected, *torchs), rtol=1e-12, atol=1e-12)
    assert launches


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_they_keep_their_type(function: str, dtype: torch.dtype) -> None:
    ours, exact = statistics(torch.float32), statistics()
    x, residual = normal(3, 4, 5, 6, dtype=dtype), normal(3, 4, 5, 6, dtype=dtype, seed=1)
    y, normalized = call(function, x, residual, *ours)
    TF.instance_norm(normalized.double(), *exact)
    assert y.dtype == dtype and ours[0].dtype == ours[1].dtype == torch.float32
    torch.testing.assert_close(ours, tuple(t.float() for t in exact))


@each_function
def test_they_are_used_and_left_alone(function: str, launches: list[str]) -> None:
    """Without the input's statistics there is nothing to reduce: torch's own functions do it, backward as well."""
    running = statistics()
    before = [tensor.clone() for tensor in running]
    leaves = [normal(3, 4, 5, 6, dtype=torch.float64, seed=seed).requires_grad_() for seed in range(2)]
    y, _ = call(function, *leaves, *running, use_input_stats=False)
    x = leaves[0] + leaves[1] if function.startswith("add") else leaves[0]
    expected = TF.instance_norm(x, *running, use_input_stats=False)
    torch.testing.assert_close(y, expected)
    dy = normal(3, 4, 5, 6, dtype=torch.float64, seed=3)
    found, of_torch = (torch.autograd.grad(out, leaves[0], dy, retain_graph=True) for out in (y, expected))
    torch.testing.assert_close(found, of_torch)
    assert all(same_bits(tensor, copy) for tensor, copy in zip(running, before, strict=True))
    assert not launches


@each_layout
def test_gradients_are_those_without_them(layout: Layout) -> None:
    x, dy = layout(normal(2, 4, 5, 6)).requires_grad_(), normal(2, 4, 5, 6, seed=1)
    plain, tracked = (
        torch.autograd.grad(F.instance_norm(x, *running, activation="gelu"), x, dy)[0]
        for running in ((), statistics(torch.float32))
    )
    assert same_bits(plain.contiguous(), tracked.contiguous())


def test_they_change_only_if_the_call_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_ops.kernels.launcher import Launcher

    def failing(*args: Any) -> None:
        raise RuntimeError("no launch")

    monkeypatch.setattr(Launcher, "__call__", failing)
    running = statistics()
    before = [tensor.clone() for tensor in running]
    for x, message in ((normal(2, 4, 5), "no launch"), (normal(2, 5, 5), "running_mean must have shape")):
        with pytest.raises(RuntimeError, match=message):
            F.instance_norm(x, *running)
    assert all(same_bits(tensor, copy) for tensor, copy in zip(running, before, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, as it first compiles
def test_they_are_updated_by_a_compiled_function() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *running: F.instance_norm(x, *running), backend="aot_eager", fullgraph=True)
    ours, eager = statistics(torch.float32), statistics(torch.float32)
    for seed in range(2):
        x = normal(2, 4, 5, 6, seed=seed).to(DEVICE)
        torch.testing.assert_close(compiled(x, *ours), F.instance_norm(x, *eager))
    torch.testing.assert_close(ours, eager)
    torch._dynamo.reset()


@each_function
def test_a_backward_comes_after_they_have_moved_on(function: str) -> None:
    """With their values at the time of the forward, as torch's."""
    leaves = [normal(3, 4, 5, 6, seed=seed).requires_grad_() for seed in range(2)]
    weight = normal(4, seed=2).requires_grad_()
    running = statistics(torch.float32)
    gradients = []
    for moves in (False, True):
        y, _ = call(function, *leaves, *running, weight=weight, use_input_stats=False)
        if moves:
            call(function, *(leaf.detach() for leaf in leaves), *running)
        gradients.append(torch.autograd.grad(y, (leaves[0], weight), normal(3, 4, 5, 6, seed=3)))
    assert all(same_bits(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")  # torch's own
def test_a_trace_of_them_can_be_saved() -> None:
    norm = fused_ops.InstanceNorm2d(4, affine=True, track_running_stats=True).to(DEVICE).eval()
    torch.jit.save(torch.jit.trace(norm, normal(3, 4, 5, 6)), io.BytesIO())
