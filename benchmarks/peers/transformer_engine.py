"""NVIDIA Transformer Engine: layer and RMS norm, by the two functions that its modules call."""

from __future__ import annotations

import importlib
from typing import Any

from ..workloads import EPS, Call, Tensor, Workload, finish
from .peer import KernelPair, Peer, finishing, library_peer

# Of its kernels: no output given, none quantized; multiprocessors left to others, gamma about 1.
UNQUANTIZED = (None, None)
DEFAULTS = (0, False)


def _kernels() -> Any:
    importlib.import_module("transformer_engine.pytorch")  # which loads what it binds
    return importlib.import_module("transformer_engine_torch")


def _types() -> Any:
    return importlib.import_module("transformer_engine.pytorch.constants").TE_DType


def _layer_norm(workload: Workload) -> Call:
    kernels, types = _kernels(), _types()

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y: tuple[Tensor, ...] = kernels.layernorm_fwd(x, weight, bias, EPS, *UNQUANTIZED, types[x.dtype], *DEFAULTS)
        return y

    def backward(
        dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = kernels.layernorm_bwd(dy.contiguous(), x, mean, rstd, weight, *DEFAULTS)
        return gradients

    return finishing(workload, KernelPair(forward, backward).of_rows)


def _rms_norm(workload: Workload) -> Call:
    kernels, types = _kernels(), _types()

    def forward(x: Tensor, weight: Tensor, bias: None) -> tuple[Tensor, ...]:
        y: tuple[Tensor, ...] = kernels.rmsnorm_fwd(x, weight, EPS, *UNQUANTIZED, types[x.dtype], *DEFAULTS)
        return y

    def backward(
        dy: Tensor, x: Tensor, mean: None, rstd: Tensor, weight: Tensor, bias: None, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        return *kernels.rmsnorm_bwd(dy.contiguous(), x, rstd, weight, *DEFAULTS), None

    norm = KernelPair(forward, backward).of_rows

    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(norm(x, weight, None), residual, workload.activation)

    return call


NAME = "te"
PEER: Peer = library_peer(
    NAME,
    "transformer_engine",
    {"layer_norm": _layer_norm, "rms_norm": _rms_norm},
    {
        name: "Transformer Engine adds before a norm in its backward alone"
        for name in ("add_layer_norm", "add_rms_norm")
    },
)
