"""What every module adds to its torch.nn class: an activation, shown in the repr; the Add modules a drop rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import validation
from ..activation import Activation, ActivationLike, resolve


class Normalizing(nn.Module):
    """What the modules of one norm, plain and Add, have in common: both functions, with this module's arguments."""

    # Of `functional`, as staticmethods.
    _fused_norm: Callable[..., Tensor]
    _fused_add_norm: Callable[..., tuple[Tensor, Tensor]]

    def _call_fused(self, function: Callable[..., Any], *inputs: Tensor, **keywords: Any) -> Any:
        """One of the two, of x, or x and the residual, with what the module holds for it."""
        raise NotImplementedError

    def _run_fused(self, x: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
        """``activation(norm(x) + residual)``"""
        return self._call_fused(self._fused_norm, x, residual=residual, activation=activation)

    def _add_and_run_fused(
        self, x: Tensor, residual: Tensor, activation: Activation | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """``(activation(norm(total)), total)`` with ``total = residual + dropout(x)``, whatever `training` is."""
        return self._call_fused(self._fused_add_norm, x, residual, activation=activation, dropout_p=dropout_p)


class _Signature:
    """What our classes take, whose constructors hand on what they do not know: tools ask whether there is a `device`.
    Of classes made from them AttributeError: they say it themselves."""

    def __get__(self, module: nn.Module | None, cls: type[nn.Module]) -> inspect.Signature:
        if cls.__module__.rpartition(".")[0] != __package__:
            raise AttributeError("__signature__")
        positional: list[inspect.Parameter] = []
        keywords: dict[str, inspect.Parameter] = {}
        for base in cls.__mro__:
            if "__init__" in vars(base):
                _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
                named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
                positional = [each for each in named if each.kind is not each.KEYWORD_ONLY]
                keywords |= {each.name: each for each in named if each.kind is each.KEYWORD_ONLY}
                if len(named) == len(parameters):
                    break
        return inspect.Signature([*positional, *keywords.values()])


class Extending(nn.Module):
    """Mixin before a torch.nn class: a constructor that takes keywords of its own, and hands on all else."""

    __signature__ = _Signature()


class Activated(Extending, Normalizing):
    """Mixin before a torch.nn norm: keyword `activation`, the rest of the constructor unchanged."""

    activation: Activation | None

    def __init__(self, *args: Any, activation: ActivationLike = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = resolve(activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._run_fused(x, residual, self.activation)

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
            return self._add_and_run_fused(x, residual, self.activation, self.dropout_p if self.training else 0.0)

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return f"{shown}, dropout_p={self.dropout_p}" if self.dropout_p else shown
