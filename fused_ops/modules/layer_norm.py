"""LayerNorm and AddLayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from .base import Activated, Added, Normalizing


class _Layers(Normalizing, nn.LayerNorm):
    _fused_norm, _fused_add_norm = staticmethod(F.layer_norm), staticmethod(F.add_layer_norm)

    def _call_fused(self, function: Callable[..., Any], *inputs: Tensor, **keywords: Any) -> Any:
        return function(*inputs, self.normalized_shape, self.weight, self.bias, self.eps, **keywords)


class LayerNorm(Activated, _Layers):
    """torch.nn.LayerNorm with `residual` and `activation` in the same pass: ``activation(norm(x) + residual)``.

    Same constructor and state_dict as torch's, and the keyword `activation`; shapes, types and errors as in
    `functional.layer_norm`.

    Example:
        >>> norm = LayerNorm(1024, activation="gelu")
        >>> y = norm(torch.randn(8, 1024), residual=torch.randn(8, 1024))
    """


class AddLayerNorm(Added, _Layers):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    Same constructor and state_dict as torch.nn.LayerNorm, and the keywords `activation` and `dropout_p` (see
    `functional.add_layer_norm`).

    Example:
        >>> y, stream = AddLayerNorm(1024)(torch.randn(8, 1024), torch.randn(8, 1024))
    """
