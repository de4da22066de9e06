"""The contenders, declared as data: how each makes its call of a workload, and why it may be unable to.

A peer that is missing is a stated gap in the table, never a zero.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .workloads import EPS, Call, Tensor, Workload, finish

OURS = "ours"
EAGER = "torch eager"
COMPILED = "torch.compile"
OURS_COMPILED = "ours compiled"
LIGER = "liger"


@dataclass(frozen=True)
class Peer:
    """build: its call of a workload. gap: why it cannot run one on a kind of device, empty where it can."""

    name: str
    build: Callable[[Workload], Call]
    gap: Callable[[Workload, str], str] = lambda workload, device: ""
    compiles: bool = False


def forget_compiled() -> None:
    """Makes torch.compile start over, so that each shape is compiled as if it were the only one.

    Otherwise the second shape of a call is compiled with dynamic sizes, or dropped at the limit of recompilations. It
    forgets every compiled call: to be called between workloads, not between contenders of one.
    """
    torch._dynamo.reset()


def _compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False)


def _gap_of_ours_compiled(workload: Workload, device: str) -> str:
    return "" if device == "cpu" else "compared on a CPU, where the compiler sees through our call"


def _gap_of_liger(workload: Workload, device: str) -> str:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if device != "cuda":
        return "liger's kernels need a GPU"
    return "" if workload.function in _LIGER else f"liger has no {workload.function}"


def _liger() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


def _liger_layer_norm(workload: Workload) -> Call:
    norm = _liger().liger_layer_norm

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(norm(x, weight, bias, EPS), residual, workload.activation)

    return call


# in_place=False: otherwise liger's backward overwrites the gradient that it is given.
def _liger_rms_norm(workload: Workload) -> Call:
    norm = functools.partial(_liger().liger_rms_norm, in_place=False)

    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(norm(x, weight, EPS), residual, workload.activation)

    return call


def _liger_add_rms_norm(workload: Workload) -> Call:
    norm = functools.partial(_liger().liger_fused_add_rms_norm, in_place=False)

    def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = norm(x, residual, weight, EPS)
        return finish(y, None, workload.activation), total

    return call


_LIGER: dict[str, Callable[[Workload], Call]] = {
    "layer_norm": _liger_layer_norm,
    "rms_norm": _liger_rms_norm,
    "add_rms_norm": _liger_add_rms_norm,
}

PEERS: tuple[Peer, ...] = (
    Peer(OURS, Workload.ours),
    Peer(EAGER, Workload.torch_composition),
    Peer(COMPILED, lambda workload: _compiled(workload.torch_composition()), compiles=True),
    Peer(OURS_COMPILED, lambda workload: _compiled(workload.ours()), _gap_of_ours_compiled, compiles=True),
    Peer(LIGER, lambda workload: _LIGER[workload.function](workload), _gap_of_liger),
)

# Which is compared with which: ours with each peer, and compiled with compiled.
COMPARED: tuple[tuple[str, str], ...] = (
    (OURS, EAGER),
    (OURS, COMPILED),
    (OURS_COMPILED, COMPILED),
    (OURS, LIGER),
)
