"""Cases of batch norm: statistics over a channel of the whole batch, or running ones; and the ways in which it runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import fused_ops.kernels.channel_norm.batch_backward as backward_module
import fused_ops.kernels.channel_norm.batch_forward as forward_module
from fused_ops.kernels.views import pooled_planes
from tests.channel_norm_cases import with_layout
from tests.channel_norm_ways import in_pieces
from tests.layouts import channels_last
from tests.norm_cases import Case, drawn, normal
from tests.schedules import forget_schedules

Tensor = torch.Tensor

FUNCTIONS = ("batch_norm", "add_batch_norm")
# Every function, without and with a residual where it takes one or not.
PLACES = [("batch_norm", False), ("batch_norm", True), ("add_batch_norm", True)]


@dataclass(frozen=True, kw_only=True)
class BatchCase(Case):
    """`function` is one of FUNCTIONS. A call gets copies of the running statistics, which it may move."""

    training: bool = True
    running_mean: Tensor | None = None
    running_var: Tensor | None = None

    def running(self) -> tuple[Tensor | None, Tensor | None]:
        mean, var = self.running_mean, self.running_var
        return None if mean is None else mean.clone(), None if var is None else var.clone()

    @property
    def own_arguments(self) -> tuple:
        return self.running()

    def arguments(self, leaves: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = super().arguments(leaves)
        if isinstance(leaves["x"], np.ndarray):  # the reference's
            args = tuple(arg.double().numpy(force=True) if isinstance(arg, Tensor) else arg for arg in args)
        return args, {**kwargs, "training": self.training}

    @property
    def statistics(self) -> int:
        return self.x.shape[1]

    @property
    def terms(self) -> int:
        return self.x.numel() // self.x.shape[1]

    @property
    def mask_shape(self) -> tuple[int, int]:
        lies_last = math.prod(self.x.shape[2:]) == 1 or not self.x.is_contiguous()
        runs, length = pooled_planes(self.x.shape, lies_last).runs
        return runs, -(-length // 8)

    def torch_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        kind = x.dtype if weight is None and bias is None else (bias if weight is None else weight).dtype
        running = [None if statistic is None else statistic.to(kind) for statistic in self.running()]
        if weight is None and bias is not None:
            weight = torch.ones_like(bias)
        return TF.batch_norm(x, *running, weight, bias, self.training, 0.1, self.eps)


def make_case(
    function: str,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    residual: bool = False,
    affine: bool = True,
    training: bool = True,
    seed: int = 0,
    **fields: Any,
) -> BatchCase:
    """A case of normal numbers (see `drawn`), with running statistics that are no fixed point."""
    channels = shape[1:2]
    tensors = drawn(
        function, shape, channels, dtype=dtype, parameters=parameters, residual=residual, affine=affine, seed=seed
    )
    kind = parameters or dtype
    tensors["running_mean"] = normal(*channels, dtype=kind, seed=seed + 7)
    tensors["running_var"] = normal(*channels, dtype=torch.float64, seed=seed + 8).square().add(0.5).to(kind)
    return BatchCase(function=function, training=training, **{**tensors, **fields})


# --- ways ----------------------------------------------------------------------------------------------------------

# Shapes of which hardly a size is a power of two.
SHAPES = {
    # A program holds all of some channels: planes as columns of a matrix, channels as columns, and an (N, C) input.
    "whole": (7, 11, 5, 3),
    "whole channels_last": (3, 19, 5, 3),
    "whole matrix": (37, 19),
    # The same, and planes too long for columns, in pieces so small that a test's few elements are many of them.
    "columns in small pieces": (11, 3, 5, 3),
    "planes in small pieces": (3, 3, 17, 16),
    "channels_last in small pieces": (3, 19, 5, 3),
}
WAYS = tuple(SHAPES)


@dataclass(frozen=True)
class Way:
    """One of WAYS, and cases for it."""

    name: str

    def case(self, function: str, **fields: Any) -> BatchCase:
        case = make_case(function, *SHAPES[self.name], **fields)
        return with_layout(case, channels_last) if "channels_last" in self.name else case


@contextlib.contextmanager
def running(name: str) -> Iterator[Way]:
    """Runs batch norm in that way of WAYS until it ends."""
    with contextlib.ExitStack() as stack:
        if "pieces" in name:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(forward_module, "batch_forward_tile", lambda *sizes: None)
            patch.setattr(backward_module, "batch_backward_tile", lambda *sizes: None)
            # Bits fill whole bytes along the neighbours in memory.
            stack.enter_context(in_pieces(*((2, 64, 2) if "planes" in name else (8, 8, 2))))
            forget_schedules()
            stack.callback(forget_schedules)
        yield Way(name)
