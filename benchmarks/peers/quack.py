"""Quack: layer and RMS norm, and RMS norm of a sum, in CuTe DSL."""

from __future__ import annotations

import importlib
from typing import Any

from ..workloads import EPS, Call, Tensor, Workload, finish
from .peer import KernelPair, Peer, finishing, library_peer


def _kernels() -> Any:
    return importlib.import_module("quack.rmsnorm")


# Quack's layer norm takes matrices, and parameters in float32 alone: others are cast in each call, as a user would.
def _layer_norm(workload: Workload) -> Call:
    kernels = _kernels()

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        parameters = weight.float(), bias.float()
        y, rstd, mean = kernels.layernorm_fwd(x, *parameters, EPS, return_rstd=True, return_mean=True)
        return y, mean, rstd

    def backward(
        dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor, ...]:
        dx, dweight, dbias = kernels.layernorm_bwd(x, weight.float(), dy.contiguous(), rstd, mean)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)

    return finishing(workload, KernelPair(forward, backward).of_rows)


def _rms_norm(workload: Workload) -> Call:
    norm = _kernels().rmsnorm

    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(norm(x, weight, eps=EPS), residual, workload.activation)

    return call


def _add_rms_norm(workload: Workload) -> Call:
    norm = _kernels().rmsnorm

    def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = norm(x, weight, residual=residual, eps=EPS, prenorm=True)
        return finish(y, None, workload.activation), total

    return call


NAME = "quack"
PEER: Peer = library_peer(
    NAME, "quack", {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm}
)
