"""What a module computes: which of our norms, if any, and which activation, seen on a probe and never by name alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from .. import modules as m
from ..activation import Activation
from ..modules.base import Added, Normalizing
from .kinds import ChannelsFirstLayerNorm, FrozenBatchNorm
from .probe import Tried, activation_of
from .sites import ForeignNormSite, Replaced, convolution_site, norm_site
from .state import own_fields

# Exactly these compute what ours of that name does.
_TORCH_NORMS: dict[type[nn.Module], type[Normalizing]] = {
    nn.BatchNorm1d: m.BatchNorm1d,
    nn.BatchNorm2d: m.BatchNorm2d,
    nn.BatchNorm3d: m.BatchNorm3d,
    nn.SyncBatchNorm: m.SyncBatchNorm,
    nn.LayerNorm: m.LayerNorm,
    nn.RMSNorm: m.RMSNorm,
    nn.GroupNorm: m.GroupNorm,
    nn.InstanceNorm1d: m.InstanceNorm1d,
    nn.InstanceNorm2d: m.InstanceNorm2d,
    nn.InstanceNorm3d: m.InstanceNorm3d,
}
_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: m.WSConv1d,
    nn.Conv2d: m.WSConv2d,
    nn.Conv3d: m.WSConv3d,
}
_NORM_CLASSES = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, Normalizing)
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-10, 1e-12)


Shape = tuple[int, ...]


class Recognized(NamedTuple):
    """What replaces a module's class, and the attributes that it needs there; or why nothing does."""

    cls: type[Replaced] | None = None
    attributes: Mapping[str, Any] = MappingProxyType({})
    reason: str = ""


def is_norm(module: nn.Module) -> bool:
    """Whether a report names the module: torch's norms, and what is called one and does its own work."""
    if isinstance(module, _NORM_CLASSES):
        return True
    cls = type(module)
    called = "norm" in cls.__name__.lower() and cls.forward is not nn.Module.forward
    if cls.__module__.startswith("torch."):  # a parametrization
        return False
    return called and all(_is_beside_a_norm(child) for child in module.children())


def _is_beside_a_norm(child: nn.Module) -> bool:
    return isinstance(child, nn.Identity) or activation_of(child) is not None


def may_be_norm(module: nn.Module) -> bool:
    """Whether a module holds what a norm does, whatever it is called."""
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.dim() != 1 or type(module).__module__.startswith("torch."):
        return False
    return module._parameters.keys() <= {"weight", "bias"} and not module._modules


def is_standardizing(module: Any) -> bool:
    """Whether a report names the module as a convolution that standardizes its weight."""
    try:
        return may_standardize(module) and (isinstance(module, Replaced) or hasattr(module, "eps"))
    except Exception:  # of a property of somebody's own
        return False


def may_standardize(module: nn.Module) -> bool:
    """Whether the module is a convolution that does something of its own with a weight of its own."""
    weight = module._parameters.get("weight")
    own = isinstance(module, tuple(_CONVOLUTIONS)) and _forward_of(type(module)) not in _CONVOLUTIONS
    return own and weight is not None and not is_lazy(weight) and weight.is_floating_point()


def recognize(module: nn.Module) -> Recognized:
    """What to make of a norm, or of a convolution that standardizes its weight."""
    if isinstance(module, torch.jit.ScriptModule):
        return Recognized(reason="it is compiled by TorchScript")
    if "forward" in vars(module):
        return Recognized(reason="its forward was replaced")
    if any(map(is_lazy, itertools.chain(module.parameters(), module.buffers()))):
        return Recognized(reason="it does not know its sizes yet; run the model once")
    if isinstance(module, Added):
        return Recognized(reason="it is one of fused_ops' already, and adds by itself")
    if isinstance(module, Normalizing):
        return Recognized(norm_site(type(module), type(module)))
    for base, ours in _TORCH_NORMS.items():
        if isinstance(module, base) and _forward_of(type(module)) is _forward_of(base):
            return _site(norm_site(ours, type(module)), None, {})
    if isinstance(module, m.WSConv1d | m.WSConv2d | m.WSConv3d):
        return Recognized(reason="it is one of fused_ops' already")
    return _probed(module)


def _forward_of(cls: type[nn.Module]) -> type[nn.Module]:
    """The class whose forward its modules run."""
    return next(base for base in cls.__mro__ if "forward" in vars(base))


def _site(cls: type[Replaced], activation: Activation | None, attributes: dict[str, Any]) -> Recognized:
    needed = {"activation": activation, "_own_activation": activation, **attributes}
    return Recognized(cls, needed)


# --- classes of other libraries ------------------------------------------------------------------------------------


def _probed(module: nn.Module) -> Recognized:
    """The first of our norms whose result is the module's, in training and in evaluation."""
    if any(tensor.is_meta for tensor in itertools.chain(module.parameters(), module.buffers())):
        return Recognized(reason=f"a {type(module).__name__} on the meta device cannot be tried")
    try:
        key = _configuration(module)
    except Exception:  # of what somebody's module holds, which may not say what it is
        return _tried(module)
    known = _known.get(key)
    if known is None:
        known = _known[key] = _tried(module)
        if len(_known) > 4096:
            _known.clear()
    return known


_known: dict[Any, Recognized] = {}


def _configuration(module: nn.Module) -> Any:
    """What modules have in common that compute the same from their parameters, as far as can be told."""
    held = tuple((name, _text(value)) for name, value in own_fields(module).items())
    tensors = [*module.named_parameters(), *module.named_buffers()]
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors)
    flags = tuple(
        (name, repr(buffer.tolist()))
        for name, buffer in module.named_buffers()
        if not buffer.is_floating_point() and not name.endswith("num_batches_tracked")
    )
    return type(module), held, shapes, flags, repr(list(module.children()))


def _text(value: Any) -> str:
    """Of a tensor or an array all of it, of which repr leaves out the middle."""
    return repr(value.tolist()) if hasattr(value, "tolist") else repr(value)


def _tried(module: nn.Module) -> Recognized:
    tried = None
    for candidate, shapes in _candidates(module):
        tried = tried or Tried(module, may_standardize(module))
        cls, attributes = candidate.cls, candidate.attributes
        assert cls is not None
        if tried.agrees(cls, attributes, shapes[0]):
            if "_dims_seen" in attributes:
                others = [shape for shape in shapes[1:] if tried.agrees_at_a_glance(cls, attributes, shape)]
                attributes = {**attributes, "_dims_seen": tuple(map(len, (shapes[0], *others)))}
            return Recognized(cls, attributes)
    name = type(module).__name__
    if tried is None:
        return Recognized(reason=f"a {name} holds something else than a norm of fused_ops does")
    return Recognized(reason=f"a {name} computes something else than any norm of fused_ops")


def _candidates(module: Any) -> Iterator[tuple[Recognized, list[Shape]]]:
    """What the module may be, by what it holds, and shapes of an input to try it on: the usual one, and others of as
    many dims as it may take besides."""
    before = type(module)
    if may_standardize(module):
        for base, ours in _CONVOLUTIONS.items():
            if isinstance(module, base):
                kernel: Any = module.kernel_size
                image = (1, module.in_channels, *(size + 1 for size in kernel))
                possible: list[dict[str, Any]] = [{"eps": eps} for eps in _possible_eps(module)]
                for attributes in [{}] if hasattr(module, "eps") else possible:
                    yield Recognized(convolution_site(ours, before), attributes), [image]
        return
    activations = [found for child in module.children() if (found := activation_of(child)) is not None]
    activation = activations[0] if len(activations) == 1 else None
    weight = getattr(module, "weight", None)
    for base, ours in _TORCH_NORMS.items():
        if isinstance(module, base):
            yield _foreign(norm_site(ours, before, ForeignNormSite), activation, {}), _shapes(module)
    if not (isinstance(weight, Tensor) and weight.dim() == 1):
        return
    channels = weight.numel()
    if {"running_mean", "running_var"} <= dict(module.named_buffers()).keys():
        for eps in _possible_eps(module):
            frozen = _foreign(norm_site(FrozenBatchNorm, before, ForeignNormSite), activation, {"eps": eps})
            yield frozen, [(2, channels, 3, 5)]
        return
    biased = isinstance(getattr(module, "bias", None), Tensor)
    row = {"normalized_shape": (channels,), "elementwise_affine": True}
    for eps in _possible_eps(module):
        held = {**row, "eps": eps, "bias": None}
        if not biased:
            yield _foreign(norm_site(m.RMSNorm, before, ForeignNormSite), activation, held), _rows((channels,))
        yield _foreign(norm_site(m.LayerNorm, before, ForeignNormSite), activation, held), _rows((channels,))
        first = _foreign(norm_site(ChannelsFirstLayerNorm, before, ForeignNormSite), activation, held)
        yield first, [(2, channels, 3, 5)]


def _foreign(cls: type[Replaced], activation: Activation | None, attributes: dict[str, Any]) -> Recognized:
    return _site(cls, activation, {**attributes, "_dims_seen": range(99)})  # until it is known which


def _shapes(module: Any) -> list[Shape]:
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return _rows(module.normalized_shape)
    channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
    dims = (
        1 if isinstance(module, nn.BatchNorm1d | nn.InstanceNorm1d) else 3 if isinstance(module, nn.BatchNorm3d) else 2
    )
    return [(2, channels, *(5, 4, 3)[:count]) for count in sorted(range(4), key=lambda count: count != dims)]


def _rows(shape: Shape) -> list[Shape]:
    """Of inputs whose last dims these are."""
    return [(*rows, *shape) for rows in ((2, 3), (3,), (2, 3, 2), (2, 1, 3, 2))]


def _possible_eps(module: nn.Module) -> list[float]:
    held = [value for value in vars(module).values() if isinstance(value, float) and 0.0 < value < 0.1]
    return [*dict.fromkeys(held or _USUAL_EPS)]
