"""LayerNorm and AddLayerNorm."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional as F
from ..activation import Activation
from .base import Activated, Added, Normalizing


class _Layers(Normalizing, nn.LayerNorm):
    def _normalize(self, x: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
        return F.layer_norm(
            x,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            residual=residual,
            activation=activation,
        )

    def _add_and_normalize(
        self, x: Tensor, residual: Tensor, activation: Activation | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        return F.add_layer_norm(
            x,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            activation=activation,
            dropout_p=dropout_p,
        )


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
