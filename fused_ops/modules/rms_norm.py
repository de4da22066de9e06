"""RMSNorm and AddRMSNorm."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional as F
from ..activation import Activation
from .base import Activated, Added, Normalizing


class _Rows(Normalizing, nn.RMSNorm):
    def _normalize(self, x: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps, residual=residual, activation=activation)

    def _add_and_normalize(
        self, x: Tensor, residual: Tensor, activation: Activation | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        return F.add_rms_norm(
            x, residual, self.normalized_shape, self.weight, self.eps, activation=activation, dropout_p=dropout_p
        )


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
