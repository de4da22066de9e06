"""Cases of the row norms: Layer and RMS normalization over the last dims."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as TF

from tests.norm_cases import Case, drawn

Tensor = torch.Tensor

FUNCTIONS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
# Every function, without and with a residual where it takes one or not.
PLACES = [*itertools.product(FUNCTIONS[:2], (False, True)), *((name, True) for name in FUNCTIONS[2:])]


@dataclass(frozen=True, kw_only=True)
class RowCase(Case):
    """`function` is one of FUNCTIONS."""

    normalized_shape: tuple[int, ...]

    @property
    def own_arguments(self) -> tuple:
        return (self.normalized_shape,)

    @property
    def rows(self) -> int:
        return self.x.numel() // max(1, torch.Size(self.normalized_shape).numel())

    statistics = terms = rows

    @property
    def mask_shape(self) -> tuple[int, int]:
        return self.rows, -(-math.prod(self.normalized_shape) // 8)

    def torch_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if "layer" in self.function:
            return TF.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return TF.rms_norm(x, self.normalized_shape, weight, self.eps)


def make_case(
    function: str,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    dims: int = 1,
    residual: bool = False,
    affine: bool = True,
    seed: int = 0,
    **fields: Any,
) -> RowCase:
    """A case of normal numbers (see `drawn`). A field given by name replaces its own."""
    trailing = shape[len(shape) - dims :]
    tensors = drawn(
        function, shape, trailing, dtype=dtype, parameters=parameters, residual=residual, affine=affine, seed=seed
    )
    return RowCase(function=function, normalized_shape=trailing, **{**tensors, **fields})
