"""What `activation=` takes: None, a name, a torch.nn activation module, or an `Activation` with its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

# Every name, and its parameters with torch's defaults.
KNOWN: Mapping[str, Mapping[str, float]] = {
    "relu": {},
    "relu6": {},
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "selu": {},
    "gelu": {},
    "gelu_tanh": {},
    "silu": {},
    "sigmoid": {},
    "tanh": {},
    "mish": {},
    "hardswish": {},
    "hardsigmoid": {},
    "softplus": {"beta": 1.0, "threshold": 20.0},
}


class Activation:
    """An activation by name, with its parameters: ``Activation("leaky_relu", negative_slope=0.2)``.

    Names and parameters are those of torch.nn.functional; `gelu_tanh` is gelu with ``approximate="tanh"``. Immutable,
    hashable, comparable. Raises ValueError for an unknown name or parameter, naming the known ones.
    """

    __slots__ = ("_hash", "name", "parameters", "scalars")

    name: str
    parameters: Mapping[str, float]
    _hash: int
    scalars: tuple[float, float]  # the parameters in their order, as a kernel takes them; 0 where there is none

    def __init__(self, name: str, **parameters: float) -> None:
        if not isinstance(name, str) or name not in KNOWN:
            raise ValueError(f"unknown activation {name!r}; known are {', '.join(KNOWN)}")
        defaults = KNOWN[name]
        for key in parameters:
            if key not in defaults:
                known = ", ".join(defaults) or "none"
                raise ValueError(f"activation {name!r} has no parameter {key!r}; its parameters: {known}")
        values = {key: float(parameters.get(key, default)) for key, default in defaults.items()}
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "parameters", MappingProxyType(values))
        alpha, beta, *_ = (*values.values(), 0.0, 0.0)
        object.__setattr__(self, "scalars", (alpha, beta))
        object.__setattr__(self, "_hash", hash((name, *values.values())))  # each call asks for it

    @classmethod
    def from_scalars(cls, name: str, alpha: float, beta: float) -> Activation:
        """The inverse of `scalars`."""
        return cls(name, **dict(zip(KNOWN[name], (alpha, beta), strict=False)))

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"Activation is immutable; make a new one to change {key}")

    def __delattr__(self, key: str) -> None:
        raise AttributeError(f"Activation is immutable; {key} cannot be deleted")

    def __reduce__(self) -> tuple[Callable[..., Activation], tuple[str, dict[str, float]]]:
        return _rebuild, (self.name, dict(self.parameters))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Activation):
            return NotImplemented
        return self.name == other.name and self.parameters == other.parameters

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        arguments = [repr(self.name), *(f"{key}={value}" for key, value in self.parameters.items())]
        return f"Activation({', '.join(arguments)})"


def _rebuild(name: str, parameters: dict[str, float]) -> Activation:
    return Activation(name, **parameters)


ActivationLike = str | nn.Module | Activation | None

_BY_NAME = {name: Activation(name) for name in KNOWN}

# Exact types only: a subclass may compute something else.
_BY_MODULE: Mapping[type, Callable[[Any], Activation]] = {
    nn.ReLU: lambda module: _BY_NAME["relu"],
    nn.ReLU6: lambda module: _BY_NAME["relu6"],
    nn.LeakyReLU: lambda module: Activation("leaky_relu", negative_slope=module.negative_slope),
    nn.ELU: lambda module: Activation("elu", alpha=module.alpha),
    nn.SELU: lambda module: _BY_NAME["selu"],
    nn.GELU: lambda module: _BY_NAME["gelu" if module.approximate == "none" else "gelu_tanh"],
    nn.SiLU: lambda module: _BY_NAME["silu"],
    nn.Sigmoid: lambda module: _BY_NAME["sigmoid"],
    nn.Tanh: lambda module: _BY_NAME["tanh"],
    nn.Mish: lambda module: _BY_NAME["mish"],
    nn.Hardswish: lambda module: _BY_NAME["hardswish"],
    nn.Hardsigmoid: lambda module: _BY_NAME["hardsigmoid"],
    nn.Softplus: lambda module: Activation("softplus", beta=module.beta, threshold=module.threshold),
}


def resolve(activation: ActivationLike) -> Activation | None:
    """The `Activation` that is meant, or None; ValueError, naming the known ones, where it is none of them."""
    if activation is None or isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        found = _BY_NAME.get(activation)
        if found is not None:
            return found
    convert = _BY_MODULE.get(type(activation))
    if convert is not None:
        return convert(activation)
    raise ValueError(
        f"unknown activation {activation!r}; pass None, a fused_ops.Activation, one of the names {', '.join(KNOWN)}, "
        f"or a module of {', '.join('nn.' + module.__name__ for module in _BY_MODULE)}"
    )
