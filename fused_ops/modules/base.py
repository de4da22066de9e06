"""What every module adds to its torch.nn class: an activation, shown in the repr; the Add modules a drop rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import validation
from ..activation import Activation, ActivationLike, resolve


class Normalizing(nn.Module):
    """What the modules of one norm, plain and Add, have in common: both functions, with this module's arguments."""

    # Of `functional`, as staticmethods.
    _norm: Callable[..., Tensor]
    _add_norm: Callable[..., tuple[Tensor, Tensor]]

    def _call(self, function: Callable[..., Any], *inputs: Tensor, **keywords: Any) -> Any:
        """One of the two, of x, or x and the residual, with what the module holds for it."""
        raise NotImplementedError

    def _normalize(self, x: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
        """``activation(norm(x) + residual)``"""
        return self._call(self._norm, x, residual=residual, activation=activation)

    def _add_and_normalize(
        self, x: Tensor, residual: Tensor, activation: Activation | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """``(activation(norm(total)), total)`` with ``total = residual + dropout(x)``, whatever `training` is."""
        return self._call(self._add_norm, x, residual, activation=activation, dropout_p=dropout_p)


class Activated(Normalizing):
    """Mixin before a torch.nn norm: keyword `activation`, the rest of the constructor unchanged."""

    activation: Activation | None

    def __init__(self, *args: Any, activation: ActivationLike = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = resolve(activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._normalize(x, residual, self.activation)

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return shown if self.activation is None else f"{shown}, activation={self.activation}"


class Added(Activated):
    """Mixin before a torch.nn norm whose input is added to a residual first: keywords `activation` and `dropout_p`."""

    dropout_p: float

    def __init__(self, *args: Any, activation: ActivationLike = None, dropout_p: float = 0.0, **kwargs: Any) -> None:
        p = validation.rate(type(self).__name__, "dropout_p", dropout_p)
        super().__init__(*args, activation=activation, **kwargs)
        self.dropout_p = p

    if TYPE_CHECKING:
        forward: Callable[..., Any]  # torch.nn's norms, which this is mixed with, take no residual
    else:

        def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return self._add_and_normalize(x, residual, self.activation, self.dropout_p if self.training else 0.0)

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return f"{shown}, dropout_p={self.dropout_p}" if self.dropout_p else shown
