"""The residual stream as a composition of torch's functions (see `fallback`). Arguments have been validated."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import fallback
from .activation import Activation

Tensor = torch.Tensor


def dropout(x: Tensor, residual: Tensor, p: float) -> Tensor:
    """x as torch's dropout leaves it, to be added to the residual; x itself where nothing is dropped."""
    return fallback.dropout(_widened(x, residual), p) if p > 0.0 else x


def _widened(branch: Tensor, residual: Tensor) -> Tensor:
    """A half branch of a float32 stream in float32, so that its products are not rounded to half before the sum."""
    dtype = torch.promote_types(branch.dtype, residual.dtype)
    return branch if branch.dtype == dtype else branch.to(dtype)


def residual_add(
    x: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    dropout_p: float,
    drop_path_p: float,
    activation: Activation | None,
) -> Tensor:
    """activation(residual + drop_path(scale * dropout(x))) in the residual's type and x's layout."""
    branch = dropout(x, residual, dropout_p)
    if scale is not None:
        branch = _widened(branch, residual) * scale
    if drop_path_p > 0.0:
        branch = _widened(branch, residual)
        branch = branch * F.dropout(branch.new_ones(branch.shape[0], *(1,) * (branch.dim() - 1)), drop_path_p)
    if branch is not x and branch.dtype == residual.dtype:
        return fallback.finish(branch, residual, activation)
    total = branch + residual  # in this order, for x's layout
    if total.dtype != residual.dtype:  # of a scale that has a wider type
        total = total.to(residual.dtype)
    return fallback.finish(total, None, activation)
