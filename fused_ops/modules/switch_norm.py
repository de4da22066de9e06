"""SwitchNorm1d, 2d and 3d, and AddSwitchNorm1d, 2d and 3d."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .base import Activated, Added, Normalizing


class _Switchable(Normalizing):
    """What the switchable norms hold and check, in the manner of torch.nn's batch norms."""

    _fused_norm, _fused_add_norm = staticmethod(F.switch_norm), staticmethod(F.add_switch_norm)

    input_dims: tuple[int, ...]

    num_features: int
    eps: float
    momentum: float | None
    last_gamma: bool
    weight: nn.Parameter
    bias: nn.Parameter
    mean_weight: nn.Parameter
    var_weight: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        last_gamma: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum, self.last_gamma = num_features, eps, momentum, last_gamma
        for name, count in (("weight", num_features), ("bias", num_features), ("mean_weight", 3), ("var_weight", 3)):
            self.register_parameter(name, nn.Parameter(torch.empty(count, device=device, dtype=dtype)))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype))
        # A count is for the cumulative average alone.
        counter = torch.empty((), dtype=torch.long, device=device) if momentum is None else None
        self.register_buffer("num_batches_tracked", counter)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Back to a mean of 0 and a variance of 1, before any batch."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Back to equal shares, a weight of 1 (0 where `last_gamma`), a bias of 0, and no running statistics."""
        self.reset_running_stats()
        nn.init.constant_(self.weight, 0.0 if self.last_gamma else 1.0)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.mean_weight)
        nn.init.ones_(self.var_weight)

    def extra_repr(self) -> str:
        shown = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
        return f"{shown}, last_gamma=True" if self.last_gamma else shown

    def _call_fused(self, function: Callable[..., Any], *inputs: Tensor, **keywords: Any) -> Any:
        x = inputs[0]
        if x.dim() not in self.input_dims:
            expected = " or ".join(f"{dims}D" for dims in self.input_dims)
            raise ValueError(f"expected {expected} input (got {x.dim()}D input)")
        counter = self.num_batches_tracked if self.training else None
        momentum = self.momentum
        if not self.training:  # nothing moves
            momentum = 0.0
        elif momentum is None and counter is not None:  # a cumulative average: each batch counts as any before
            momentum = 1.0 / (float(counter) + 1.0)
        kinds = slice(1, None) if x.dim() == 2 else slice(None)
        out = function(
            *inputs,
            running_mean=self.running_mean,
            running_var=self.running_var,
            weight=self.weight,
            bias=self.bias,
            mean_weight=self.mean_weight[kinds],
            var_weight=self.var_weight[kinds],
            training=self.training,
            momentum=momentum,
            eps=self.eps,
            **keywords,
        )
        if counter is not None:
            counter.add_(1)
        return out


class SwitchNorm1d(Activated, _Switchable):
    """Switchable norm with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    x, and a residual like it, has shape ``(N, C)`` or ``(N, C, L)``. `mean_weight` and `var_weight` have three entries
    in the order Instance, Layer, Batch. On ``(N, C)`` the last two are mixed, and the first has a gradient of zero, so
    that one module takes both, as torch.nn.BatchNorm1d does.

    Args:
        num_features: C.
        eps: added to the mixed variance.
        momentum: of the running statistics; None is a cumulative average, as in torch.nn.BatchNorm1d, and adds its
            buffer `num_batches_tracked` to the state.
        last_gamma: whether weight starts as zeros, as in the last norm of a residual branch.
        activation: as in `functional.switch_norm`, as are types and errors.

    Example:
        >>> y = SwitchNorm1d(64, activation="relu")(torch.randn(32, 64))
    """

    input_dims = (2, 3)


class SwitchNorm2d(Activated, _Switchable):
    """Switchable norm with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    x, and a residual like it, has shape ``(N, C, H, W)``; arguments as in `SwitchNorm1d`. `mean_weight` and
    `var_weight` have three entries in the order Instance, Layer, Batch.

    Example:
        >>> norm = SwitchNorm2d(64, last_gamma=True, activation="relu")
        >>> y = norm(torch.randn(2, 64, 16, 16), residual=torch.randn(2, 64, 16, 16))
    """

    input_dims = (4,)


class SwitchNorm3d(Activated, _Switchable):
    """Switchable norm with `residual` and `activation` in the same call: ``activation(norm(x) + residual)``.

    x, and a residual like it, has shape ``(N, C, D, H, W)``; arguments as in `SwitchNorm1d`. `mean_weight` and
    `var_weight` have three entries in the order Instance, Layer, Batch.

    Example:
        >>> y = SwitchNorm3d(32, activation="leaky_relu")(torch.randn(2, 32, 8, 8, 8))
    """

    input_dims = (5,)


class AddSwitchNorm1d(Added, _Switchable):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    x and residual have shape ``(N, C)`` or ``(N, C, L)``. Same constructor and state_dict as `SwitchNorm1d`, and the
    keyword `dropout_p` (see `functional.add_switch_norm`).
    """

    input_dims = (2, 3)


class AddSwitchNorm2d(Added, _Switchable):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    x and residual have shape ``(N, C, H, W)``. Same constructor and state_dict as `SwitchNorm2d`, and the keyword
    `dropout_p` (see `functional.add_switch_norm`).

    Example:
        >>> x, stream = torch.randn(2, 64, 8, 8), torch.randn(2, 64, 8, 8)
        >>> y, stream = AddSwitchNorm2d(64, activation="relu")(x, stream)
    """

    input_dims = (4,)


class AddSwitchNorm3d(Added, _Switchable):
    """``total = residual + dropout(x), y = activation(norm(total))``; returns ``(y, total)``.

    x and residual have shape ``(N, C, D, H, W)``. Same constructor and state_dict as `SwitchNorm3d`, and the keyword
    `dropout_p` (see `functional.add_switch_norm`).
    """

    input_dims = (5,)
