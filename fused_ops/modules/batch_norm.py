"""BatchNorm1d, 2d and 3d, and AddBatchNorm1d, 2d and 3d."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional as F
from .base import Activated, Added, Normalizing


class Batches(Normalizing, _BatchNorm):
    """What torch.nn's batch norms check before a call, what they hold for it, and what they count after it."""

    _fused_norm: Callable[..., Tensor] = staticmethod(F.batch_norm)
    _fused_add_norm: Callable[..., tuple[Tensor, Tensor]] = staticmethod(F.add_batch_norm)

    def _call_fused(self, function: Callable[..., Any], *inputs: Tensor, **keywords: Any) -> Any:
        self._check_input_dim(inputs[0])
        counter = self.num_batches_tracked if self.training and self.track_running_stats else None
        momentum = self.momentum
        if momentum is None:  # a cumulative average: each batch counts as much as any before
            momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
        follows = self.track_running_stats or not self.training
        mean, var = self.running_mean, self.running_var
        training = self.training or (mean is None and var is None)
        given = (mean, var) if follows else (None, None)
        out = function(*inputs, *given, self.weight, self.bias, training, momentum, self.eps, **keywords)
        if counter is not None:  # torch counts first, and so counts calls that fail
            counter.add_(1)
        return out


class BatchNorm1d(Activated, Batches, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    x, and a residual like it, has shape ``(N, C)`` or ``(N, C, L)``. Same constructor, state_dict and running
    statistics as torch's, and the keyword `activation`; types and errors as in `functional.batch_norm`. A call that
    fails is not counted in `num_batches_tracked`.

    Example:
        >>> y = BatchNorm1d(256, activation="relu")(torch.randn(32, 256))
    """


class BatchNorm2d(Activated, Batches, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    x, and a residual like it, has shape ``(N, C, H, W)``. Same constructor, state_dict and running statistics as
    torch's, and the keyword `activation`; types and errors as in `functional.batch_norm`. A call that fails is not
    counted in `num_batches_tracked`.

    Example:
        >>> norm = BatchNorm2d(64, activation="relu")
        >>> y = norm(torch.randn(2, 64, 16, 16), residual=torch.randn(2, 64, 16, 16))
    """


class BatchNorm3d(Activated, Batches, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    x, and a residual like it, has shape ``(N, C, D, H, W)``. Same constructor, state_dict and running statistics as
    torch's, and the keyword `activation`; types and errors as in `functional.batch_norm`. A call that fails is not
    counted in `num_batches_tracked`.

    Example:
        >>> y = BatchNorm3d(32, activation="leaky_relu")(torch.randn(2, 32, 8, 8, 8))
    """


class AddBatchNorm1d(Added, Batches, nn.BatchNorm1d):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    x and residual have shape ``(N, C)`` or ``(N, C, L)``. Same constructor and state_dict as torch.nn.BatchNorm1d, and
    the keywords `activation` and `dropout_p` (see `functional.add_batch_norm`).
    """


class AddBatchNorm2d(Added, Batches, nn.BatchNorm2d):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    x and residual have shape ``(N, C, H, W)``. Same constructor and state_dict as torch.nn.BatchNorm2d, and the
    keywords `activation` and `dropout_p` (see `functional.add_batch_norm`).

    Example:
        >>> x, stream = torch.randn(2, 64, 8, 8), torch.randn(2, 64, 8, 8)
        >>> y, stream = AddBatchNorm2d(64, activation="relu")(x, stream)
    """


class AddBatchNorm3d(Added, Batches, nn.BatchNorm3d):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    x and residual have shape ``(N, C, D, H, W)``. Same constructor and state_dict as torch.nn.BatchNorm3d, and the
    keywords `activation` and `dropout_p` (see `functional.add_batch_norm`).
    """
