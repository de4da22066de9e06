"""Numbers that are hard to normalize: each function makes them of normal ones, whose last dim is what is normalized."""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor


def large_mean(x: Tensor) -> Tensor:
    return (1e4 + 1e-2 * x.double()).to(x.dtype)


def constant_rows(x: Tensor) -> Tensor:
    return x[..., :1].repeat_interleave(x.shape[-1], -1)


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def tiny(x: Tensor) -> Tensor:
    return (x.double() * math.sqrt(torch.finfo(x.dtype).tiny)).to(x.dtype)


def huge(x: Tensor) -> Tensor:
    """As large as the type holds, or as its squares do where all arithmetic is in it: torch overflows beyond."""
    info = torch.finfo(x.dtype)
    largest = info.max if x.dtype == torch.float16 else math.sqrt(info.max / x.shape[-1])
    return (x.double().tanh() * 0.5 * largest).to(x.dtype)


def huge_and_alike(x: Tensor) -> Tensor:
    return (huge(x).abs().max() * (1 + 2.0**-5 * x.double().tanh())).to(x.dtype)


def outlier(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 3] = 1e4
    return x


HARD = [large_mean, constant_rows, zeros, tiny, huge, huge_and_alike, outlier]
