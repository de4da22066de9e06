"""RMSNorm and AddRMSNorm."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional as F
from .base import Activated, Added


class RMSNorm(Activated, nn.RMSNorm):
    """torch.nn.RMSNorm with `residual` and `activation` in the same pass: ``activation(norm(x) + residual)``.

    Same constructor and state_dict as torch's, and the keyword `activation` (see `functional.rms_norm`).

    Example:
        >>> y = RMSNorm(1024, eps=1e-6)(torch.randn(8, 1024))
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, residual=residual, activation=self.activation
        )


class AddRMSNorm(Added, nn.RMSNorm):
    """``total = residual + x, y = activation(norm(total))``; returns ``(y, total)``.

    Same constructor and state_dict as torch.nn.RMSNorm, and the keywords `activation` and `dropout_p` (see
    `functional.add_rms_norm`).

    Example:
        >>> y, stream = AddRMSNorm(1024)(torch.randn(8, 1024), torch.randn(8, 1024))
    """

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.add_rms_norm(
            x,
            residual,
            self.normalized_shape,
            self.weight,
            self.eps,
            activation=self.activation,
            dropout_p=self.dropout_p,
            training=self.training,
        )
