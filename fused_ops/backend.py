"""Which of the two runs a call: the Triton kernels, or the composition of torch functions in `fallback`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

try:
    import triton
except ImportError:  # Triton exists for Linux; elsewhere the package runs on torch alone
    triton = None

if triton is not None:
    from .kernels.launcher import INTERPRETED

NAMES = ("auto", "triton", "torch")
HAS_TRITON = triton is not None
TRITON_VERSION: str | None = triton.__version__ if HAS_TRITON else None


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, but is {name!r}")
    return name


_current = _checked(os.environ.get("FUSED_OPS_BACKEND", "auto"), "environment variable FUSED_OPS_BACKEND")


def get_backend() -> str:
    """The backend in force: 'auto', 'triton' or 'torch'."""
    return _current


def set_backend(name: str) -> None:
    """Sets the backend for the whole process.

    'auto' runs the Triton kernels where the tensor's device has a Triton driver and torch elsewhere; 'triton' launches
    for whatever tensor it is given; 'torch' never launches. Raises ValueError for another name.
    """
    global _current
    _current = _checked(name, "the backend")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs a block under another backend: ``with use_backend("torch"): ...``"""
    previous = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def interpreted() -> bool:
    """Whether the kernels were defined under TRITON_INTERPRET=1, and so run on CPU tensors."""
    return HAS_TRITON and INTERPRETED


def has_driver() -> bool:
    """Whether Triton has an active driver: a GPU's, or one that somebody set."""
    try:
        return triton.runtime.driver.active is not None
    except Exception:  # whatever Triton raises where it finds no driver, and looks for one: no libcuda, no ldconfig
        return False


@torch.compiler.assume_constant_result
def can_launch() -> bool:
    """Whether a kernel can run at all; a constant to a compiler, which need not look inside."""
    return interpreted() or (HAS_TRITON and has_driver())


def chooses_triton(x: torch.Tensor) -> bool:
    """Whether a call on x runs the Triton kernels. RuntimeError where 'triton' is asked for and cannot run at all."""
    if _current == "torch":
        return False
    if _current == "auto":
        return x.is_cuda and can_launch()
    if can_launch():
        return True
    if not HAS_TRITON:
        raise RuntimeError(
            "backend 'triton': Triton is not installed; install triton, or use backend 'auto' or 'torch'"
        )
    raise RuntimeError(
        f"backend 'triton': no GPU driver is active for a tensor on {x.device}; set TRITON_INTERPRET=1 before "
        "importing fused_ops to interpret the kernels, or use backend 'auto' or 'torch'"
    )


def traced(x: torch.Tensor) -> bool:
    """Whether a compiler, a FakeTensor or another dispatch mode looks at a call on x, and needs an op to see."""
    return (
        torch.compiler.is_compiling()
        or isinstance(x, torch._subclasses.FakeTensor)
        or torch._C._len_torch_dispatch_stack() > 0
        or x.is_meta
    )


def explain(device: torch.device) -> str:
    """Which backend a tensor on `device` gets, and why, in one sentence."""
    if _current == "torch":
        return "torch: backend 'torch' is set"
    if _current == "triton":
        return "triton: backend 'triton' is set" + (", interpreted" if interpreted() else "")
    if not HAS_TRITON:
        return "torch: Triton is not installed"
    if device.type != "cuda":
        return f"torch: Triton has no driver for {device.type}"
    return "triton: a driver is active" if has_driver() else "torch: Triton finds no driver for this GPU"
