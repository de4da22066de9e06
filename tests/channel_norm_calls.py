"""Calls of the group and instance norms as functions of their tensors, and their modules by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fused_ops
from fused_ops import functional as F
from tests.calls import as_tuple, scalar
from tests.norm_cases import DEVICE, normal, torch_activate

Tensor = torch.Tensor

FUNCTIONS = ("group_norm", "instance_norm", "add_group_norm", "add_instance_norm")


def adds_first(function: str) -> bool:
    return function.startswith("add_")


def call(function: str, groups: int = 3, activation: Any = None, **keywords: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The function of x, residual, weight and bias, any of the last three None, that always returns a tuple."""
    keywords |= {"num_groups": groups} if "group" in function else {}

    def run(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        residual, weight, bias = (*others, None, None, None)[:3]
        given = {"residual": residual, "weight": weight, "bias": bias, "activation": activation, **keywords}
        return as_tuple(getattr(F, function)(x, **given))

    return run


def composed(function: str, groups: int = 3, activation: Any = None) -> Callable[..., tuple[Tensor, ...]]:
    """The same as `call`, in elementary operations, in the type that kernels compute in."""

    def run(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        residual, weight, bias = (*others, None, None, None)[:3]
        total = residual + x if adds_first(function) else x
        dtype = torch.promote_types(total.dtype, torch.float32)
        rows = total.to(dtype).reshape(x.shape[0], groups if "group" in function else x.shape[1], -1)
        deviation = rows - rows.mean(-1, keepdim=True)
        y = (deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + 1e-5)).reshape(x.shape)
        by_channel = (-1, *(1,) * (x.dim() - 2))
        y = y if weight is None else y * weight.to(dtype).view(by_channel)
        y = y if bias is None else y + bias.to(dtype).view(by_channel)
        if residual is not None and not adds_first(function):
            y = y + residual
        y = torch_activate(y, activation).to(x.dtype)
        return (y, total) if adds_first(function) else (y,)

    return run


def tensors(*shape: int, dtype: torch.dtype = torch.float64, affine: bool = True, seed: int = 0) -> list[Tensor | None]:
    """x, residual, weight and bias as new leaves."""
    x, residual = (normal(*shape, dtype=dtype, seed=seed + i).requires_grad_() for i in range(2))
    parameters = (normal(shape[1], dtype=dtype, seed=seed + i).requires_grad_() for i in (2, 3))
    return [x, residual, *(parameters if affine else (None, None))]


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor | None], **keywords: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar(outputs), [leaf for leaf in leaves if leaf is not None], **keywords)


# --- layouts -------------------------------------------------------------------------------------------------------


def strided(x: Tensor) -> Tensor:
    """Every other element of the last dim of a tensor twice as long."""
    return torch.stack([x, x.flip(-1)], -1).flatten(-2)[..., ::2]


def reversed_dims(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def channels_of_a_channels_last(x: Tensor) -> Tensor:
    """Not dense, and still in that order."""
    return channels_last(torch.cat([x, x], 1))[:, : x.shape[1]]


def unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def order(x: Tensor) -> list[int]:
    """The strides of the dims that have more than one element."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "channels of a channels_last": channels_of_a_channels_last,
    "strided": strided,
    "reversed dims": reversed_dims,
    "unaligned": unaligned,
    "expanded over samples": lambda x: x[:1].expand_as(x),
    "expanded over channels": lambda x: x[:, :1].expand_as(x),
    "expanded over space": lambda x: x[..., :1].expand_as(x),
}


# --- modules -------------------------------------------------------------------------------------------------------

CHANNELS = 6
PLAIN = ("GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
INSTANCE = tuple(name for added in ("", "Add") for name in (f"{added}InstanceNorm{dims}d" for dims in (1, 2, 3)))
NAMES = (*PLAIN, *(f"Add{name}" for name in PLAIN))


def torchs_class(name: str) -> type[nn.Module]:
    return getattr(nn, name.removeprefix("Add"))


def sizes(name: str) -> tuple[int, ...]:
    """The constructor's own positional arguments."""
    return (3, CHANNELS) if "Group" in name else (CHANNELS,)


def spatial(name: str) -> tuple[int, ...]:
    return (4, 3, 2)[: 2 if "Group" in name else int(name[-2])]


def inputs(name: str, batch: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """x, and the residual that an Add module needs."""
    shape = (*batch, CHANNELS, *spatial(name))
    return tuple(normal(*shape, dtype=dtype, seed=seed + i) for i in range(1 + name.startswith("Add")))


def made(name: str, cls: type | None = None, **kwargs: Any) -> Any:
    """A module whose parameters are no longer ones and zeros."""
    kwargs = {"device": DEVICE, "dtype": torch.float64, "affine": True} | kwargs
    module = (cls or getattr(fused_ops, name))(*sizes(name), **kwargs)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, dtype=torch.float64, seed=seed + 10))
    return module


def made_by_torch(name: str, **kwargs: Any) -> nn.Module:
    return made(name, torchs_class(name), **kwargs)
