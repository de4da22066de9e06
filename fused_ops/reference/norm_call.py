"""What the calls of all norms have in common: checked arguments, forward, backward, and the add_ forms' total."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .activations import ActivationLike
from .arrays import Array, checked, float64
from .drops import dropout_factor
from .epilogue import epilogue, epilogue_backward

Gradients = dict[str, Array]


class NormCall:
    """One call of a norm: its arguments, checked and in float64, and what forward and backward share.

    A subclass checks what is its own, calls this __init__, and then sets x_hat. weight and bias must come with
    `parameter_shape`, and are held as they broadcast to x: `position_dims` dimensions of x follow theirs. What else
    the norm learns goes into `learned`, and its gradients come from `learned_backward`.
    """

    x_hat: Array

    def __init__(
        self,
        function: str,
        x: Array,
        parameter_shape: tuple[int, ...],
        position_dims: int,
        weight: ArrayLike | None,
        bias: ArrayLike | None,
        residual: ArrayLike | None,
        activation: ActivationLike,
    ) -> None:
        self.function, self.activation = function, activation
        self.parameter_shape = parameter_shape
        broadcast = parameter_shape + (1,) * position_dims
        given = {"weight": weight, "bias": bias}
        self.parameters = {
            name: checked(function, name, values, parameter_shape).reshape(broadcast)
            for name, values in given.items()
            if values is not None
        }
        self.learned: dict[str, Array] = {}
        self.residual = None if residual is None else checked(function, "residual", residual, x.shape)

    def dx(self, dx_hat: Array) -> Array:
        raise NotImplementedError

    def learned_backward(self, dx_hat: Array) -> Gradients:
        return {}

    def forward(self) -> Array:
        weight, bias = self.parameters.get("weight"), self.parameters.get("bias")
        return epilogue(self.x_hat, weight, bias, self.residual, self.activation)

    def backward(self, dy: ArrayLike) -> Gradients:
        weight, bias = self.parameters.get("weight"), self.parameters.get("bias")
        dy = checked(self.function, "dy", dy, self.x_hat.shape)
        dx_hat, gradients = epilogue_backward(dy, self.x_hat, weight, bias, self.residual, self.activation)
        for name in self.parameters:
            gradients[f"d{name}"] = gradients[f"d{name}"].reshape(self.parameter_shape)
        return {"dx": self.dx(dx_hat), **gradients, **self.learned_backward(dx_hat)}

    def add_backward(self, dy: ArrayLike | None, dtotal: ArrayLike | None, factor: Array) -> Gradients:
        """The gradients of an add_ form, whose norm this is the call of; `factor` as `total_of` returned it.

        total = residual + x * factor feeds both outputs, so dresidual = dtotal + the norm's own dx.
        """
        # Not the same as a dy of zeros: without y, a NaN in total does not reach dx (nor does it in torch).
        if dy is None:
            gradients = {f"d{name}": np.zeros(self.parameter_shape) for name in self.parameters}
            gradients |= {f"d{name}": np.zeros_like(values) for name, values in self.learned.items()}
            dresidual = np.zeros_like(self.x_hat)
        else:
            gradients = self.backward(dy)
            dresidual = gradients.pop("dx")
        if dtotal is not None:
            dresidual = dresidual + checked(self.function, "dtotal", dtotal, dresidual.shape)
        return {"dx": dresidual * factor, "dresidual": dresidual, **gradients}


class ChannelNormCall(NormCall):
    """One call of a norm whose parameters have one element a channel."""

    least_dims = 2

    def __init__(
        self,
        function: str,
        x: Array,
        weight: ArrayLike | None,
        bias: ArrayLike | None,
        residual: ArrayLike | None,
        activation: ActivationLike,
    ) -> None:
        if x.ndim < self.least_dims:
            raise ValueError(
                f"{function}: x must have {self.least_dims} dimensions at least, (N, C, *positions), "
                f"but has shape {x.shape}"
            )
        super().__init__(function, x, x.shape[1:2], x.ndim - 2, weight, bias, residual, activation)


def total_of(
    function: str, x: ArrayLike, residual: ArrayLike, dropout_p: float, training: bool, keep: ArrayLike | None
) -> tuple[Array, Array]:
    """(total, factor): total = residual + x * factor, the factor that of dropout."""
    x = float64(x)
    factor = dropout_factor(function, keep, x.shape, dropout_p, training)
    return checked(function, "residual", residual, x.shape) + x * factor, factor
