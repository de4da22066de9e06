"""NVIDIA's Apex: layer and RMS norm, and group norm of channels_last with SiLU."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..workloads import EPS, Call, Tensor, Workload, finish
from .peer import Peer, finishing, library_peer


def _functions() -> Any:
    return importlib.import_module("apex.normalization.fused_layer_norm")


def _layer_norm(workload: Workload) -> Call:
    norm = _functions().fused_layer_norm_affine
    return finishing(workload, lambda x, weight, bias: norm(x, weight, bias, weight.shape, EPS))


def _rms_norm(workload: Workload) -> Call:
    norm = _functions().fused_rms_norm_affine

    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(norm(x, weight, weight.shape, EPS), residual, workload.activation)

    return call


# The module is called, on our parameters, since it alone chooses between its kernels; what it has none for it hands to
# torch without a word, which would be timed under its name.
def _group_norm(workload: Workload) -> Call:
    module = importlib.import_module("apex.contrib.group_norm").GroupNorm
    channels = workload.shape("full")[1]
    if workload.groups not in module.SUPPORTED_GROUPS or channels not in module.SUPPORTED_CHANNELS:
        raise NotImplementedError(f"apex leaves {workload.groups} groups of {channels} channels to torch")
    fused = workload.activation == "silu" and not workload.residual
    norm = module(workload.groups, channels, EPS, act="silu" if fused else "")
    activation = None if fused else workload.activation

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))
        return finish(y, residual, activation)

    return call


def _refusal(workload: Workload) -> str:
    has_kernel = workload.channels_last and len(workload.shape("full")) == 4
    if has_kernel or workload.function != "group_norm":
        return ""
    return "apex's group norm is of images in channels_last, and leaves others to torch"


NAME = "apex"
PEER: Peer = library_peer(
    NAME,
    "apex",
    {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm},
    {
        "instance_norm": "apex's instance norm is made by nvFuser, another library",
        "batch_norm": "apex's batch norm keeps running statistics of its own, and takes float16 (N, H, W, C) alone",
    },
    _refusal,
)
