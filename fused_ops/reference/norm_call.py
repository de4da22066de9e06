"""What the calls of all norms have in common: checked arguments, forward, backward, and the add_ forms' total."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .activations import ActivationLike
from .arrays import Array, float64
from .epilogue import epilogue, epilogue_backward

Gradients = dict[str, Array]


def checked(function: str, argument: str, values: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = float64(values)
    if array.shape != shape:
        raise ValueError(f"{function}: {argument} must have shape {shape}, but has shape {array.shape}")
    return array


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

    def add_backward(self, dy: ArrayLike | None, dtotal: ArrayLike | None) -> Gradients:
        """The gradients of an add_ form, whose norm this is the call of.

        total = residual + x feeds both outputs, so dx = dresidual = dtotal + the norm's own dx.
        """
        # Not the same as a dy of zeros: without y, a NaN in total does not reach dx (nor does it in torch).
        if dy is None:
            gradients = {f"d{name}": np.zeros(self.parameter_shape) for name in self.parameters}
            gradients |= {f"d{name}": np.zeros_like(values) for name, values in self.learned.items()}
            dx = np.zeros_like(self.x_hat)
        else:
            gradients = self.backward(dy)
            dx = gradients.pop("dx")
        if dtotal is not None:
            dx = dx + checked(self.function, "dtotal", dtotal, dx.shape)
        return {"dx": dx, "dresidual": dx.copy(), **gradients}


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


def total_of(function: str, x: ArrayLike, residual: ArrayLike, dropout_p: float, training: bool) -> Array:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{function}: dropout_p must lie between 0 and 1, but is {dropout_p}")
    if dropout_p and training:
        raise NotImplementedError(
            f"{function}: dropout_p={dropout_p} while training is not implemented yet; pass dropout_p=0.0"
        )
    x = float64(x)
    return checked(function, "residual", residual, x.shape) + x
