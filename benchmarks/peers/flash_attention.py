"""flash-attention's Triton norms: layer and RMS norm, bare or of a sum."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ..workloads import EPS, Call, Tensor, Workload, finish
from .peer import Peer, finishing, library_peer


def _functions() -> Any:
    return importlib.import_module("flash_attn.ops.triton.layer_norm")


# What it calls a residual it adds before the norm: ours behind the norm is torch's to add.
def _layer_norm(workload: Workload) -> Call:
    norm = _functions().layer_norm_fn
    return finishing(workload, lambda x, weight, bias: norm(x, weight, bias, eps=EPS))


def _rms_norm(workload: Workload) -> Call:
    norm = _functions().rms_norm_fn

    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(norm(x, weight, None, eps=EPS), residual, workload.activation)

    return call


def _adding(name: str) -> Callable[[Workload], Call]:
    def build(workload: Workload) -> Call:
        norm = getattr(_functions(), name)

        def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            y, total = norm(x, weight, bias, residual=residual, eps=EPS, prenorm=True)
            return finish(y, None, workload.activation), total

        return call

    return build


NAME = "flash_attn"
PEER: Peer = library_peer(
    NAME,
    "flash_attn",
    {
        "layer_norm": _layer_norm,
        "rms_norm": _rms_norm,
        "add_layer_norm": _adding("layer_norm_fn"),
        "add_rms_norm": _adding("rms_norm_fn"),
    },
)
