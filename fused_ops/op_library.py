"""The torch.library that every op is in, and how ops pass what is absent: as an empty tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor

LIBRARY = torch.library.Library("fused_ops", "DEF")


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An op, what it runs on any device, and what it returns of tensors without memory."""
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_ops::{name}", fake, lib=LIBRARY)


def or_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def or_none(*tensors: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(tensor if tensor.numel() else None for tensor in tensors)
