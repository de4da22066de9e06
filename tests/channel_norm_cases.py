"""Cases of the channel norms: Group and Instance normalization, statistics over the planes of each sample."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as TF

from tests.layouts import Layout
from tests.norm_cases import Case, drawn

Tensor = torch.Tensor

FUNCTIONS = ("group_norm", "instance_norm", "add_group_norm", "add_instance_norm")
# Every function, without and with a residual where it takes one or not.
PLACES = [*itertools.product(FUNCTIONS[:2], (False, True)), *((name, True) for name in FUNCTIONS[2:])]
ACTIVATION_SIZED = ("x", "residual", "dy", "dtotal")


@dataclass(frozen=True, kw_only=True)
class ChannelCase(Case):
    """`function` is one of FUNCTIONS; groups is the number of channels where it is an instance norm."""

    groups: int

    @property
    def own_arguments(self) -> tuple:
        return (self.groups,) if "group" in self.function else ()

    @property
    def statistics(self) -> int:
        return self.x.shape[0] * self.groups

    @property
    def terms(self) -> int:
        return self.x.shape[0] * math.prod(self.x.shape[2:])

    @property
    def mask_shape(self) -> tuple[int, int]:
        samples, channels, *positions = self.x.shape
        rows, run = samples * channels, math.prod(positions)
        if not self.x.is_contiguous():  # then it is the channels that are neighbours
            rows, run = samples * run, channels
        return rows, -(-run // 8)

    def torch_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None and bias is not None:
            weight = torch.ones_like(bias)  # without one torch's backward fails
        if "instance" in self.function:
            return TF.instance_norm(x, weight=weight, bias=bias, eps=self.eps)
        return TF.group_norm(x, self.groups, weight, bias, self.eps)

    def for_torch(self) -> ChannelCase:
        """In channels_last torch's CPU kernel takes E[x^2] - E[x]^2, and its instance norm of one sample is wrong."""
        given = {name: tensor for name in ACTIVATION_SIZED if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: tensor.contiguous() for name, tensor in given.items()})


def make_case(
    function: str,
    *shape: int,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    residual: bool = False,
    affine: bool = True,
    seed: int = 0,
    **fields: Any,
) -> ChannelCase:
    """A case of normal numbers (see `drawn`). groups is group norm's alone. A field given by name replaces its own."""
    channels = shape[1]
    tensors = drawn(
        function, shape, (channels,), dtype=dtype, parameters=parameters, residual=residual, affine=affine, seed=seed
    )
    groups = groups if "group" in function else channels
    return ChannelCase(function=function, groups=groups, **{**tensors, **fields})


def with_layout(case: ChannelCase, layout: Layout, *names: str) -> ChannelCase:
    """The case with those of its tensors, or with all that have x's shape, lain out anew."""
    given = {name: tensor for name in names or ACTIVATION_SIZED if (tensor := getattr(case, name)) is not None}
    return replace(case, **{name: layout(tensor) for name, tensor in given.items()})
