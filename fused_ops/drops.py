"""What dropout drops, on the host: a call's seed, and what its elements were multiplied by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import backend
from .kernels.problem import ResidualAdd
from .kernels.residual import residual_add_forward

Tensor = torch.Tensor


def draw_seed(device: torch.device) -> Tensor:
    """A seed of the kernels' own generator from torch's of this device, as a tensor there: a graph that is captured
    draws another with each replay, and a checkpoint the same again."""
    return torch.randint(2**63 - 1, (1,), device=device)


def placeholder(device: torch.device) -> Tensor:
    """What stands for a seed where a call is planned, which depends on there being one."""
    return torch.empty(1, dtype=torch.int64, device=device)


def drop_factor(seed: Tensor, shape: Sequence[int], dropout_p: float, drop_path_p: float, dtype: torch.dtype) -> Tensor:
    """What a call with this seed multiplies each element by: the sum of zeros and of ones that are dropped."""
    ones, zeros = (fill(shape, dtype=dtype, device=seed.device) for fill in (torch.ones, torch.zeros))
    forward: Any = residual_add_forward
    if backend.traced(ones):
        from . import residual_ops

        forward = residual_ops.forward
    return forward(ones, zeros, None, seed, ResidualAdd(dropout_p, drop_path_p)).y
