"""What the calls of norms with running statistics have in common: checking, using and moving those."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from .activations import ActivationLike
from .arrays import Array, checked, mean_over
from .norm_call import ChannelNormCall
from .normalize import center, normalize, normalize_backward


class RunningNormCall(ChannelNormCall):
    """One call of a norm that takes a channel's statistics from x, or the running ones, as the argument `flag` says.

    `running` is running_mean and running_var as they are after the call, or nothing where they were not given;
    `move` moves them. A subclass that normalizes by these statistics alone sets `axes`, over which x has them, and
    calls `normalize`.
    """

    flag: str
    axes: tuple[int, ...]
    rstd: Array

    def __init__(
        self,
        function: str,
        x: Array,
        running_mean: ArrayLike | None,
        running_var: ArrayLike | None,
        weight: ArrayLike | None,
        bias: ArrayLike | None,
        use_input_stats: bool,
        residual: ArrayLike | None,
        activation: ActivationLike,
    ) -> None:
        super().__init__(function, x, weight, bias, residual, activation)
        self.use_input_stats = use_input_stats
        self.running = self._given(running_mean, running_var, x.shape[1:2])
        if not use_input_stats and not self.running:
            raise ValueError(
                f"{function}: running_mean and running_var must be given where {self.flag} is False, but are None"
            )

    def _given(
        self, running_mean: ArrayLike | None, running_var: ArrayLike | None, shape: tuple[int, ...]
    ) -> tuple[Array, ...]:
        if running_mean is None and running_var is None:
            return ()
        if running_mean is None or running_var is None:
            raise ValueError(
                f"{self.function}: running_mean and running_var must both be given or both be None, "
                f"but {'running_mean' if running_mean is None else 'running_var'} alone is None"
            )
        mean = checked(self.function, "running_mean", running_mean, shape)
        var = checked(self.function, "running_var", running_var, shape)
        return mean.copy(), var.copy()

    def refuse_single_values(self, x: Array) -> None:
        """torch's rule for statistics of a batch, whose unbiased variance would be 0 / 0."""
        if self.use_input_stats and len(x) * math.prod(x.shape[2:]) == 1:
            raise ValueError(
                f"{self.function}: Expected more than 1 value per channel when {self.flag}, but x has shape {x.shape}"
            )

    def running_moments(self, x: Array) -> list[Array]:
        """The running mean and variance as they broadcast to x."""
        return [values.reshape(-1, *(1,) * (x.ndim - 2)) for values in self.running]

    def move(self, x: Array, axes: tuple[int, ...], momentum: float) -> None:
        """Towards mean and unbiased variance over `axes`; where each sample has its own, towards their mean."""
        if not self.running:
            return
        count = math.prod(x.shape[axis] for axis in axes)
        unbiased = mean_over(center(x, axes) ** 2, axes) * (count / (count - 1))
        new = (mean_over(values, (0,)).reshape(-1) for values in (mean_over(x, axes), unbiased))
        self.running = tuple((1.0 - momentum) * old + momentum * to for old, to in zip(self.running, new, strict=True))

    def normalize(self, x: Array, eps: float) -> None:
        """Sets x_hat and rstd."""
        if self.use_input_stats:
            self.x_hat, self.rstd = normalize(x, self.axes, eps)
        else:
            mean, var = self.running_moments(x)
            self.rstd = 1.0 / np.sqrt(var + eps)
            self.x_hat = (x - mean) * self.rstd

    def dx(self, dx_hat: Array) -> Array:
        if not self.use_input_stats:
            return dx_hat * self.rstd
        return normalize_backward(dx_hat, self.x_hat, self.rstd, self.axes)
