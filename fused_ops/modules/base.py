"""What every module adds to its torch.nn class: an activation, shown in the repr; the Add modules a drop rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import validation
from ..activation import Activation, ActivationLike, resolve


class Activated(nn.Module):
    """Mixin before a torch.nn norm: keyword `activation`, the rest of the constructor unchanged."""

    activation: Activation | None

    def __init__(self, *args: Any, activation: ActivationLike = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = resolve(activation)

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

    @property
    def _rate_of_call(self) -> float:
        """The rate of dropout as it is now; a norm may go by the statistics of its input in evaluation as well."""
        return self.dropout_p if self.training else 0.0

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return f"{shown}, dropout_p={self.dropout_p}" if self.dropout_p else shown
