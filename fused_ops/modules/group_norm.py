"""GroupNorm and AddGroupNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from .. import validation
from .base import Activated, Added, Normalizing


class _Groups(Normalizing, nn.GroupNorm):
    _fused_norm, _fused_add_norm = staticmethod(F.group_norm), staticmethod(F.add_group_norm)

    def __init__(self, num_groups: int, *args: Any, **kwargs: Any) -> None:
        # torch.nn.GroupNorm divides by a number of 0 and takes one below.
        super().__init__(validation.num_groups(type(self).__name__, num_groups), *args, **kwargs)

    def _call_fused(self, function: Callable[..., Any], *inputs: Tensor, **keywords: Any) -> Any:
        return function(*inputs, self.num_groups, self.weight, self.bias, self.eps, **keywords)


class GroupNorm(Activated, _Groups):
    """torch.nn.GroupNorm with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    Same constructor and state_dict as torch's, and the keyword `activation`; shapes, types and errors as in
    `functional.group_norm`.

    Example:
        >>> norm = GroupNorm(32, 320, activation="silu")
        >>> y = norm(torch.randn(2, 320, 64, 64))
    """


class AddGroupNorm(Added, _Groups):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    Same constructor and state_dict as torch.nn.GroupNorm, and the keywords `activation` and `dropout_p` (see
    `functional.add_group_norm`).

    Example:
        >>> y, stream = AddGroupNorm(32, 256)(torch.randn(2, 256, 8, 8), torch.randn(2, 256, 8, 8))
    """
