"""RMSNorm and AddRMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from .base import Activated, Added, Normalizing


class _Rows(Normalizing, nn.RMSNorm):
    _fused_norm, _fused_add_norm = staticmethod(F.rms_norm), staticmethod(F.add_rms_norm)

    def _call_fused(self, function: Callable[..., Any], *inputs: Tensor, **keywords: Any) -> Any:
        return function(*inputs, self.normalized_shape, self.weight, self.eps, **keywords)


class RMSNorm(Activated, _Rows):
    """torch.nn.RMSNorm with `residual` and `activation` in the same pass: ``activation(norm(x) + residual)``.

    Same constructor and state_dict as torch's, and the keyword `activation` (see `functional.rms_norm`).

    Example:
        >>> y = RMSNorm(1024, eps=1e-6)(torch.randn(8, 1024))
    """


class AddRMSNorm(Added, _Rows):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    Same constructor and state_dict as torch.nn.RMSNorm, and the keywords `activation` and `dropout_p` (see
    `functional.add_rms_norm`).

    Example:
        >>> y, stream = AddRMSNorm(1024)(torch.randn(8, 1024), torch.randn(8, 1024))
    """
