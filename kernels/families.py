"""The kernel families as one interface: which launchers a norm has."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .channel_norm import backward as channel_backward
from .channel_norm import batch_backward, batch_forward
from .channel_norm import forward as channel_forward
from .problem import BatchNorm, Forward, Gradients, GroupNorm, Norm, RowNorm, Tensor
from .row_norm import backward as row_backward
from .row_norm import forward as row_forward


class Family(NamedTuple):
    """The launchers of a norm, and what allocates all that they return but the gradients of parameters.

    What plans a direction decides all of it for tensors that lie as those it is given, and returns a function of a seed
    and of these (in a batch norm's forward of its running statistics and the momentum, too).
    """

    name: str
    forward: Callable[..., Forward]
    backward: Callable[..., Gradients]
    allocate: Callable[..., Forward]
    allocate_gradients: Callable[..., tuple[Tensor | None, Tensor | None]]
    plan_forward: Callable[..., Callable[..., Forward]]
    plan_backward: Callable[..., Callable[..., Gradients]]


ROW_NORM = Family(
    "row_norm",
    row_forward.row_norm_forward,
    row_backward.row_norm_backward,
    row_forward.allocate,
    row_backward.allocate_gradients,
    row_forward.plan_forward,
    row_backward.plan_backward,
)
GROUP_NORM = Family(
    "group_norm",
    channel_forward.group_norm_forward,
    channel_backward.group_norm_backward,
    channel_forward.allocate,
    channel_backward.allocate_gradients,
    channel_forward.plan_forward,
    channel_backward.plan_backward,
)

BATCH_NORM = Family(
    "batch_norm",
    batch_forward.batch_norm_forward,
    batch_backward.batch_norm_backward,
    batch_forward.allocate,
    channel_backward.allocate_gradients,
    batch_forward.plan_forward,
    batch_backward.plan_backward,
)
_FAMILIES: dict[type, Family] = {RowNorm: ROW_NORM, GroupNorm: GROUP_NORM, BatchNorm: BATCH_NORM}


def family_of(norm: Norm) -> Family:
    """The launchers that compute a norm."""
    return _FAMILIES[type(norm)]
