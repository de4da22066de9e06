"""FlagGems: layer, RMS, group, instance and batch norm, which it registers in the place of torch's own operators.

Here its functions are called themselves, since a registration would be torch eager's as well.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

from ..workloads import EPS, Call, Tensor, Workload, finish
from .peer import KernelPair, Peer, finishing, library_peer

Needed = tuple[bool, ...]
Gradients = tuple["Tensor | None", ...]


def _functions(module: str) -> Any:
    return importlib.import_module(f"flag_gems.{module}")


# Its backward takes the first dim for the rows, so that it is right for matrices alone.
def _layer_norm(workload: Workload) -> Call:
    kernels = _functions("ops.layernorm")

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y: tuple[Tensor, ...] = kernels.layer_norm(x, weight.shape, weight, bias, EPS)
        return y

    def backward(
        dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, needed: Needed
    ) -> Gradients:
        gradients: Gradients = kernels.layer_norm_backward(dy, x, weight.shape, mean, rstd, weight, bias, needed)
        return gradients

    return finishing(workload, KernelPair(forward, backward).of_rows)


def _rms_norm(workload: Workload) -> Call:
    norm = _functions("ops.rms_norm").rms_norm

    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(norm(x, weight.shape, weight, EPS), residual, workload.activation)

    return call


def _group_norm(workload: Workload) -> Call:
    kernels = _functions("ops.groupnorm")

    def sizes(x: Tensor) -> tuple[int, ...]:
        return x.shape[0], x.shape[1], math.prod(x.shape[2:]), workload.groups

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y: tuple[Tensor, ...] = kernels.group_norm(x, weight, bias, *sizes(x), EPS)
        return y

    def backward(
        dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, needed: Needed
    ) -> Gradients:
        gradients: Gradients = kernels.group_norm_backward(dy, x, mean, rstd, weight, *sizes(x), needed)
        return gradients

    return finishing(workload, KernelPair(forward, backward))


def _instance_norm(workload: Workload) -> Call:
    return finishing(workload, functools.partial(_functions("fused.instance_norm").instance_norm, eps=EPS))


def _batch_norm(workload: Workload) -> Call:
    kernels = _functions("ops.batch_norm")

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        running = running_mean, running_var

        def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            y: tuple[Tensor, ...] = kernels.batch_norm(x, weight, bias, *running, workload.training, 0.1, EPS)
            return y

        def backward(
            dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, needed: Needed
        ) -> Gradients:
            saved = (weight, *running, mean, rstd)
            gradients: Gradients = kernels.batch_norm_backward(dy, x, *saved, workload.training, EPS, needed)
            return gradients

        return finish(KernelPair(forward, backward)(x, weight, bias), residual, workload.activation)

    return call


NAME = "flag_gems"
PEER: Peer = library_peer(
    NAME,
    "flag_gems",
    {
        "layer_norm": _layer_norm,
        "rms_norm": _rms_norm,
        "group_norm": _group_norm,
        "instance_norm": _instance_norm,
        "batch_norm": _batch_norm,
    },
    {
        "add_layer_norm": "flag_gems' skip_layer_norm returns no sum, and has no backward",
        "add_rms_norm": "flag_gems' fused_add_rms_norm overwrites its inputs, and has no backward",
    },
)
