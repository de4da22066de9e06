"""InstanceNorm1d, 2d and 3d, and AddInstanceNorm1d, 2d and 3d."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from .. import functional as F
from .. import validation
from ..activation import Activation
from .base import Activated, Added, Normalizing


class _Planes(Normalizing, _InstanceNorm):
    """What torch.nn's instance norms check before a call, and what they hold for it."""

    def _is_one_sample(self, x: Tensor) -> bool:
        """Whether x has no batch dim. torch's errors, and its warning, where x's dims or channels are not this layer's.

        The norm itself leaves the number of channels to the parameters, and knows nothing of one sample.
        """
        self._check_input_dim(x)
        channel_dim = x.dim() - self._get_no_batch_dim()
        channels = x.size(channel_dim)
        if channels != self.num_features:
            if self.affine:
                raise ValueError(
                    f"expected input's size at dim={channel_dim} to match num_features ({self.num_features}), but got: "
                    f"{channels}."
                )
            warnings.warn(
                f"input's size at dim={channel_dim} does not match num_features. You can silence this warning by not "
                "passing in num_features, which is not used because affine=False",
                stacklevel=3,
            )
        return channel_dim == 0

    def _statistics(self) -> dict[str, Any]:
        return {
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "use_input_stats": self.training or not self.track_running_stats,
            "momentum": 0.0 if self.momentum is None else self.momentum,
        }

    def _run_fused(self, x: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
        one_sample = self._is_one_sample(x)
        if one_sample:
            validation.operands(type(self).__name__, x, (), None, None, residual)
            x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
        y = F.instance_norm(
            x,
            weight=self.weight,
            bias=self.bias,
            eps=self.eps,
            residual=residual,
            activation=activation,
            **self._statistics(),
        )
        return y.squeeze(0) if one_sample else y

    def _add_and_run_fused(
        self, x: Tensor, residual: Tensor, activation: Activation | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        one_sample = self._is_one_sample(x)
        if one_sample:
            validation.operands(type(self).__name__, x, (), None, None, residual, added_first=True)
            x, residual = x.unsqueeze(0), residual.unsqueeze(0)
        y, total = F.add_instance_norm(
            x,
            residual,
            weight=self.weight,
            bias=self.bias,
            eps=self.eps,
            activation=activation,
            dropout_p=dropout_p,
            **self._statistics(),
        )
        return (y.squeeze(0), total.squeeze(0)) if one_sample else (y, total)


class InstanceNorm1d(Activated, _Planes, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    x, and a residual like it, has shape ``(N, C, L)`` or ``(C, L)``. Same constructor, state_dict and running
    statistics as torch's, and the keyword `activation`; types and errors as in `functional.instance_norm`.

    Example:
        >>> y = InstanceNorm1d(8)(torch.randn(2, 8, 100))
    """


class InstanceNorm2d(Activated, _Planes, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    x, and a residual like it, has shape ``(N, C, H, W)`` or ``(C, H, W)``. Same constructor, state_dict and running
    statistics as torch's, and the keyword `activation`; types and errors as in `functional.instance_norm`.

    Example:
        >>> y = InstanceNorm2d(256, activation="relu")(torch.randn(1, 256, 64, 64))
    """


class InstanceNorm3d(Activated, _Planes, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    x, and a residual like it, has shape ``(N, C, D, H, W)`` or ``(C, D, H, W)``. Same constructor, state_dict and
    running statistics as torch's, and the keyword `activation`; types and errors as in `functional.instance_norm`.

    Example:
        >>> y = InstanceNorm3d(32, affine=True, activation="leaky_relu")(torch.randn(1, 32, 16, 16, 16))
    """


class AddInstanceNorm1d(Added, _Planes, nn.InstanceNorm1d):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    x and residual have shape ``(N, C, L)`` or ``(C, L)``. Same constructor and state_dict as torch.nn.InstanceNorm1d,
    and the keywords `activation` and `dropout_p` (see `functional.add_instance_norm`).
    """


class AddInstanceNorm2d(Added, _Planes, nn.InstanceNorm2d):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    x and residual have shape ``(N, C, H, W)`` or ``(C, H, W)``. Same constructor and state_dict as
    torch.nn.InstanceNorm2d, and the keywords `activation` and `dropout_p` (see `functional.add_instance_norm`).
    """


class AddInstanceNorm3d(Added, _Planes, nn.InstanceNorm3d):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    x and residual have shape ``(N, C, D, H, W)`` or ``(C, D, H, W)``. Same constructor and state_dict as
    torch.nn.InstanceNorm3d, and the keywords `activation` and `dropout_p` (see `functional.add_instance_norm`).
    """
