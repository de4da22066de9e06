"""Norms that other libraries have and `fused_ops.modules` has not, as modules of ours: what a site may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import functional as F
from ..activation import Activation
from ..modules.base import Activated, Normalizing
from ..modules.layer_norm import LayerNorm


class ChannelsFirstLayerNorm(LayerNorm):
    """Layer norm over the channels at each position of an image (N, C, H, W), as ConvNeXt's."""

    def _run_fused(self, x: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
        residual = None if residual is None else residual.movedim(1, -1)
        return super()._run_fused(x.movedim(1, -1), residual, activation).movedim(-1, 1)

    def _add_and_run_fused(
        self, x: Tensor, residual: Tensor, activation: Activation | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        y, total = super()._add_and_run_fused(x.movedim(1, -1), residual.movedim(1, -1), activation, dropout_p)
        return y.movedim(-1, 1), total.movedim(-1, 1)


class FrozenBatchNorm(Activated, Normalizing):
    """Batch norm by stored statistics, whatever `training` is, as detectors have it; everything is a buffer."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float

    _fused_norm, _fused_add_norm = staticmethod(F.batch_norm), staticmethod(F.add_batch_norm)

    def _call_fused(self, function: Callable[..., Any], *inputs: Tensor, **keywords: Any) -> Any:
        stored = self.running_mean, self.running_var, self.weight, self.bias
        return function(*inputs, *stored, eps=self.eps, **keywords)
