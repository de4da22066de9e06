"""Liger-Kernel: layer, RMS and group norm, and RMS norm of a sum."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ..workloads import EPS, Call, Tensor, Workload, finish
from .peer import Peer, finishing, library_peer


def _functions() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


def _layer_norm(workload: Workload) -> Call:
    norm = _functions().liger_layer_norm
    return finishing(workload, lambda x, weight, bias: norm(x, weight, bias, EPS))


# in_place=False: otherwise liger's backward overwrites the gradient that it is given.
def _rms_norm(workload: Workload) -> Call:
    norm = functools.partial(_functions().liger_rms_norm, in_place=False)

    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(norm(x, weight, EPS), residual, workload.activation)

    return call


def _add_rms_norm(workload: Workload) -> Call:
    norm = functools.partial(_functions().liger_fused_add_rms_norm, in_place=False)

    def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = norm(x, residual, weight, EPS)
        return finish(y, None, workload.activation), total

    return call


def _group_norm(workload: Workload) -> Call:
    norm = _functions().liger_group_norm
    return finishing(workload, lambda x, weight, bias: norm(x, weight, bias, x.shape[1], workload.groups, EPS))


NAME = "liger"
PEER: Peer = library_peer(
    NAME,
    "liger_kernel",
    {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm, "group_norm": _group_norm},
)
