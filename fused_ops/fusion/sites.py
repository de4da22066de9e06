"""What a module of a fused model is: its own class with ours before it, so that it can be taken back."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from ..activation import Activation
from ..fallback import activate
from ..modules.base import Normalizing

F = TypeVar("F", bound=Callable[..., Any])


def cache(make: F) -> F:
    """functools.cache, whose stubs take no class for hashable."""
    return functools.cache(make)  # type: ignore[return-value]


class Replaced(nn.Module):
    """Mixin of every class that fusing gives a module; the module's own class, and what else it got, stay known.

    The class is changed, and not the object: whoever holds the module, its parameters or its hooks still does, and a
    deep copy, which copies the class along, depends on nothing of the original's.
    """

    _class_before: type[nn.Module]  # of the class
    _made_by: tuple[Any, ...]  # of the class: the function that made it, and its arguments
    _attributes_added: tuple[str, ...]  # of the module

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class that is made here cannot be found by its name."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, *rest = reduced
        if getattr(make, "__name__", "") == "__newobj__" and rest[0] == (type(self),):
            return (_new, self._made_by, *rest[1:])
        return (make, *rest)


def _new(make: Callable[..., type], *arguments: Any) -> Any:
    cls = make(*arguments)
    return cls.__new__(cls)  # type: ignore[call-overload]


def replace(module: nn.Module, cls: type[Replaced], attributes: Mapping[str, Any]) -> None:
    """Gives the module another class, made from its own, and these attributes where it lacks them."""
    new = {name: value for name, value in attributes.items() if not hasattr(module, name)}
    module.__class__ = cls
    module.__dict__.update(new, _attributes_added=tuple(new))


def restore(module: Replaced) -> None:
    """The class and the attributes that the module had."""
    if "_class_before" not in vars(type(module)):
        raise ValueError(
            f"unfuse: since it was fused, a {module._class_before.__name__} got the class {type(module).__name__} "
            "(a parametrization, fully_shard); undo that first"
        )
    for name in module.__dict__.pop("_attributes_added", ()):  # none, of a slice of a Sequential
        del module.__dict__[name]
    module.__class__ = module._class_before  # type: ignore[assignment]


def path_of(name: str) -> tuple[str, ...]:
    """The names on the way to a module."""
    return tuple(name.split("."))


def submodule(module: nn.Module, path: Sequence[str]) -> nn.Module | None:
    """`get_submodule`, in a tenth of its time, for what runs in each call; None where there is none."""
    found: nn.Module | None = module
    for part in path:
        found = None if found is None else found._modules.get(part)
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the module's calls, and so to what it takes and returns, or has replaced them."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def joins(x: Any, residual: Any) -> bool:
    """Whether a sum is one that kernels add: of two tensors of one shape, type and device."""
    return (
        isinstance(x, Tensor)
        and isinstance(residual, Tensor)
        and x.shape == residual.shape
        and x.dtype == residual.dtype
        and x.device == residual.device
        and x.is_floating_point()
    )


def summed(x: Any, residual: Any, into: str | None) -> Any:
    """``x + residual``; an add in place, `into` either ("x", "residual"), keeps that one's type."""
    if into is None:
        return x + residual
    target, other = (x, residual) if into == "x" else (residual, x)
    return target.clone().add_(other)  # which refuses what it refused


class NormSite(Replaced, Normalizing):
    """Mixin before one of our norms: a call may bring the add and the activation beside it along.

    Called with x alone it is the norm that it was, so that the forward it stands in may call it either way.
    """

    _own_activation: Activation | None = None

    def forward(
        self,
        x: Tensor,
        residual: Any = None,
        *,
        activation: Activation | None = None,
        add_first: bool = False,
        into: str | None = None,
    ) -> Any:
        """``activation(norm(x) + residual)``, or with `add_first` ``(activation(norm(total)), total)``. into: what an
        add in place writes into, "residual", or "x": the norm's result, or x itself with `add_first`."""
        if not self._takes(x) or not (residual is None or joins(x, residual)):
            return self._composed(x, residual, activation, add_first, into)
        activation = self._own_activation if activation is None else activation
        if add_first:
            return self._add_and_run_fused(x, residual, activation, 0.0)
        return self._run_fused(x, residual, activation)

    def _composed(
        self, x: Tensor, residual: Any, activation: Activation | None, add_first: bool, into: str | None
    ) -> Any:
        """The same in steps: what is added may broadcast, have a type of its own, or be a number."""
        total = summed(x, residual, into) if add_first else x
        y = self._alone(total)
        if add_first:
            return activate(y, activation), total
        return activate(y if residual is None else summed(y, residual, into), activation)

    def _takes(self, x: Tensor) -> bool:
        return True

    def _alone(self, x: Tensor) -> Tensor:
        return self._run_fused(x, None, self._own_activation)


class ForeignNormSite(NormSite):
    """Mixin before one of our norms and a class that was seen to compute it for an input of its weight's type."""

    _dims_seen: Sequence[int] = ()
    weight: Tensor | None

    def _takes(self, x: Tensor) -> bool:
        weight = self.weight
        return x.dim() in self._dims_seen and (weight is None or weight.dtype == x.dtype)

    def _alone(self, x: Tensor) -> Tensor:
        return self._run_fused(x, None, self._own_activation) if self._takes(x) else self._class_before.forward(self, x)


@cache
def norm_site(ours: type[Normalizing], before: type[nn.Module], mixin: type[NormSite] = NormSite) -> type[Replaced]:
    """The class of a module of class `before` that computes what `ours` does."""
    bases = (mixin, ours) if issubclass(ours, before) else (mixin, ours, before)
    members: dict[str, Any] = {}
    if issubclass(before, Normalizing):  # which may be given another
        members["_own_activation"] = property(operator.attrgetter("activation"))
    return _made(before, bases, norm_site, ours, before, mixin, **members)


@cache
def convolution_site(ours: type[nn.Module], before: type[nn.Module]) -> type[Replaced]:
    """The class of a convolution of class `before` whose weight is standardized by `ours`."""
    return _made(before, (Replaced, ours, before), convolution_site, ours, before)


class FusedForward(Replaced):
    """Mixin before a module's own class: calls that a plan was made for run it, all others run as they did."""

    _plans: tuple[Any, ...] = ()  # of a slice of a Sequential, which is made by this class, none


@cache
def fused_forward(before: type[nn.Module]) -> type[Replaced]:
    """The class of a module of class `before` whose forward has plans."""

    @functools.wraps(before.forward)
    def forward(self: FusedForward, *args: Any, **kwargs: Any) -> Any:
        for plan in self._plans:
            values = plan.match(self, args, kwargs)
            if values is not None:
                return plan.run(self, *values)
        return before.forward(self, *args, **kwargs)

    return _made(before, (FusedForward, before), fused_forward, before, forward=forward)


def _made(before: type, bases: tuple[type, ...], make: Callable[..., type], *arguments: Any, **members: Any) -> Any:
    members |= {"__module__": __name__, "__qualname__": before.__qualname__, "__doc__": before.__doc__}
    members |= {"_class_before": before, "_made_by": (make, *arguments)}
    return type(before.__name__, bases, members)
