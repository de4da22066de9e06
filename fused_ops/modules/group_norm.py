"""GroupNorm and AddGroupNorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import functional as F
from .. import validation
from .base import Activated, Added


class _AtLeastOneGroup(nn.Module):
    """Mixin before torch.nn.GroupNorm, which divides by a number of groups of 0 and takes one below."""

    def __init__(self, num_groups: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(validation.num_groups(type(self).__name__, num_groups), *args, **kwargs)


class GroupNorm(_AtLeastOneGroup, Activated, nn.GroupNorm):
    """torch.nn.GroupNorm with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    Same constructor and state_dict as torch's, and the keyword `activation`; shapes, types and errors as in
    `functional.group_norm`.

    Example:
        >>> norm = GroupNorm(32, 320, activation="silu")
        >>> y = norm(torch.randn(2, 320, 64, 64))
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.group_norm(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            residual=residual,
            activation=self.activation,
        )


class AddGroupNorm(_AtLeastOneGroup, Added, nn.GroupNorm):
    """``total = residual + x, y = activation(norm(total))``; returns ``(y, total)``.

    Same constructor and state_dict as torch.nn.GroupNorm, and the keywords `activation` and `dropout_p` (see
    `functional.add_group_norm`).

    Example:
        >>> y, stream = AddGroupNorm(32, 256)(torch.randn(2, 256, 8, 8), torch.randn(2, 256, 8, 8))
    """

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.add_group_norm(
            x,
            residual,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            dropout_p=self.dropout_p,
            training=self.training,
        )
