"""Which backend runs a call: the three names, the environment, and machines where one of the two is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_ops
from fused_ops import backend
from fused_ops import functional as F
from tests.norm_cases import DEVICE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def backend_as_before() -> Iterator[None]:
    before = fused_ops.get_backend()
    yield
    fused_ops.set_backend(before)


def test_a_name_is_set_and_read():
    for name in ("torch", "triton", "auto"):
        fused_ops.set_backend(name)
        assert fused_ops.get_backend() == name


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_another_name_is_refused_and_changes_nothing(name):
    fused_ops.set_backend("torch")
    with pytest.raises(ValueError, match=rf"auto, triton, torch, but is {name!r}"):
        fused_ops.set_backend(name)
    with pytest.raises(ValueError, match=repr(name)), fused_ops.use_backend(name):
        pytest.fail("the block ran")
    assert fused_ops.get_backend() == "torch"


def test_use_backend_nests_and_restores_after_an_exception():
    fused_ops.set_backend("auto")
    with fused_ops.use_backend("triton"):
        with pytest.raises(KeyError), fused_ops.use_backend("torch"):
            assert fused_ops.get_backend() == "torch"
            raise KeyError
        assert fused_ops.get_backend() == "triton"
        fused_ops.set_backend("torch")
    assert fused_ops.get_backend() == "auto"


def test_use_backend_decorates_a_function():
    fused_ops.set_backend("auto")

    @fused_ops.use_backend("torch")
    def inside() -> str:
        return fused_ops.get_backend()

    assert (inside(), inside(), fused_ops.get_backend()) == ("torch", "torch", "auto")


@pytest.mark.parametrize("name", ["auto", "triton", "torch"])
def test_the_backend_decides_what_launches(name, launches):
    """'auto' launches on a GPU alone, although the interpreter could run the kernels here."""
    x = torch.ones(2, 4, device=DEVICE, requires_grad=True)
    module = fused_ops.AddRMSNorm(4, device=DEVICE)
    with fused_ops.use_backend(name):
        F.layer_norm(x, (4,)).sum().backward()
        module(x, x)
        chosen = backend.explain(x.device)
    if name == "triton" or (name == "auto" and DEVICE.type == "cuda"):
        assert launches == ["row_norm_forward_kernel", "row_norm_backward_kernel", "row_norm_forward_kernel"]
        assert chosen.startswith("triton: ")
    else:
        assert launches == []
        assert chosen.startswith("torch: ")


def test_backward_runs_where_forward_ran(launches):
    x = torch.ones(2, 4, device=DEVICE, requires_grad=True)
    with fused_ops.use_backend("triton"):
        y = F.layer_norm(x, (4,))
    with fused_ops.use_backend("torch"):
        y.sum().backward()
    assert launches == ["row_norm_forward_kernel", "row_norm_backward_kernel"]


# --- other machines, in processes of their own ---------------------------------------------------------------------


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code without a GPU, an interpreter, or a backend that this process was told to use."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_OPS_BACKEND")}
    environment = {**inherited, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


CALL_IN_EACH_BACKEND = """
import torch, fused_ops
from fused_ops import functional as F, backend
x, residual = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
weight, bias = torch.randn(8), torch.randn(8)
expected = torch.nn.functional.silu(torch.nn.functional.layer_norm(x, (8,), weight, bias) + residual)
(expected_dx,) = torch.autograd.grad(expected.sum(), x)
print(fused_ops.get_backend())
for name in ("auto", "torch"):
    with fused_ops.use_backend(name):
        y = F.layer_norm(x, (8,), weight, bias, residual=residual, activation="silu")
        assert torch.equal(y, expected), name
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, expected_dx)
        assert backend.explain(x.device).startswith("torch: ")
fused_ops.LayerNorm(8)(x)
with fused_ops.use_backend("triton"):
    for call in (lambda: F.layer_norm(x, (8,)), lambda: fused_ops.AddRMSNorm(8)(x, x)):
        try:
            call()
        except RuntimeError as error:
            print(error)
"""


def test_the_environment_names_the_backend_and_triton_without_a_device_says_what_to_do():
    pytest.importorskip("triton")
    ran = run_python(CALL_IN_EACH_BACKEND, FUSED_OPS_BACKEND="torch")
    assert ran.returncode == 0, ran.stderr
    name, *errors = ran.stdout.splitlines()
    assert name == "torch"
    assert len(errors) == 2
    for error in errors:
        assert "no GPU driver is active for a tensor on cpu" in error
        assert "TRITON_INTERPRET=1" in error and "'torch'" in error


def test_without_triton_the_package_runs_on_torch():
    ran = run_python("import sys; sys.modules['triton'] = None\n" + CALL_IN_EACH_BACKEND)
    assert ran.returncode == 0, ran.stderr
    name, *errors = ran.stdout.splitlines()
    assert name == "auto"
    assert len(errors) == 2
    assert all("Triton is not installed; install triton, or use" in error for error in errors)


def test_an_unknown_backend_in_the_environment_is_refused_on_import():
    ran = run_python("import fused_ops", FUSED_OPS_BACKEND="cuda")
    assert ran.returncode != 0
    assert "ValueError: environment variable FUSED_OPS_BACKEND must be one of auto, triton, torch" in ran.stderr
    assert "'cuda'" in ran.stderr
