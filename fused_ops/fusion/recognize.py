"""What a module computes: which of our norms, if any, and which activation, seen on a probe and never by name alone."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from .. import modules as m
from ..activation import KNOWN, Activation, resolve
from ..backend import use_backend
from ..fallback import activate
from ..modules.base import Added, Normalizing
from .kinds import ChannelsFirstLayerNorm, FrozenBatchNorm
from .sites import ForeignNormSite, Replaced, convolution_site, norm_site, replace

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
    scales = weight is not None and weight.dim() == 1 and module._parameters.keys() <= {"weight", "bias"}
    of_torch = type(module).__module__.startswith("torch.")
    return scales and not of_torch and not module._modules


def is_standardizing(module: Any) -> bool:
    """Whether a report names the module as a convolution that standardizes its weight."""
    return may_standardize(module) and (hasattr(module, "eps") or isinstance(module, Replaced))


def may_standardize(module: nn.Module) -> bool:
    """Whether the module is a convolution that does something of its own with a weight of its own."""
    weight = module._parameters.get("weight")
    own = isinstance(module, tuple(_CONVOLUTIONS)) and _forward_of(type(module)) not in _CONVOLUTIONS
    return own and weight is not None and weight.is_floating_point()


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
        activation: Any = module.activation
        return _site(norm_site(type(module), type(module)), activation, {})
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
    key = _configuration(module)
    known = _known.get(key)
    if known is None:
        known = _known[key] = _tried(module)
        if len(_known) > 4096:
            _known.clear()
    return known


_known: dict[Any, Recognized] = {}


def _configuration(module: nn.Module) -> Any:
    """What modules have in common that compute the same from their parameters, as far as can be told."""
    held = tuple((name, repr(value)) for name, value in vars(module).items() if not name.startswith("_"))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors)
    return type(module), held, shapes, repr(list(module.children()))


def _tried(module: nn.Module) -> Recognized:
    tried = False
    own = functools.cache(functools.partial(_result, module, None, {}))  # the same beside each candidate
    for candidate, shape in _candidates(module):
        tried = True
        if _agree(module, candidate, shape, own):
            return candidate
    name = type(module).__name__
    if not tried:
        return Recognized(reason=f"a {name} holds something else than a norm of fused_ops does")
    return Recognized(reason=f"a {name} computes something else than any norm of fused_ops")


def _candidates(module: Any) -> Iterator[tuple[Recognized, tuple[int, ...]]]:
    """What the module may be, by what it holds, and the shape of an input to try it on."""
    before = type(module)
    if may_standardize(module):
        for base, ours in _CONVOLUTIONS.items():
            if isinstance(module, base):
                kernel: Any = module.kernel_size
                image = (1, module.in_channels, *(size + 1 for size in kernel))
                possible: list[dict[str, Any]] = [{"eps": eps} for eps in _possible_eps(module)]
                for attributes in [{}] if hasattr(module, "eps") else possible:
                    yield Recognized(convolution_site(ours, before), attributes), image
        return
    activations = [found for child in module.children() if (found := activation_of(child)) is not None]
    activation = activations[0] if len(activations) == 1 else None
    weight = getattr(module, "weight", None)
    for base, ours in _TORCH_NORMS.items():
        if isinstance(module, base):
            yield _foreign(norm_site(ours, before, ForeignNormSite), activation, {}, None), _usual_shape(module)
    if not (isinstance(weight, Tensor) and weight.dim() == 1):
        return
    channels = weight.numel()
    if {"running_mean", "running_var"} <= dict(module.named_buffers()).keys():
        for eps in _possible_eps(module):
            frozen = _foreign(norm_site(FrozenBatchNorm, before, ForeignNormSite), activation, {"eps": eps}, (4,))
            yield frozen, (2, channels, 3, 5)
        return
    biased = isinstance(getattr(module, "bias", None), Tensor)
    row = {"normalized_shape": (channels,), "elementwise_affine": True}
    for eps in _possible_eps(module):
        held = {**row, "eps": eps, "bias": None}
        image = (2, channels, 3, 5)
        first = _foreign(norm_site(ChannelsFirstLayerNorm, before, ForeignNormSite), activation, held, (4,))
        if not biased:
            yield _foreign(norm_site(m.RMSNorm, before, ForeignNormSite), activation, held, None), (2, 3, channels)
        yield _foreign(norm_site(m.LayerNorm, before, ForeignNormSite), activation, held, None), (2, 3, channels)
        yield first, image


def _foreign(
    cls: type[Replaced], activation: Activation | None, attributes: dict[str, Any], dims: tuple[int, ...] | None
) -> Recognized:
    return _site(cls, activation, {**attributes, "_dims_seen": range(1, 99) if dims is None else dims})


def _usual_shape(module: Any) -> tuple[int, ...]:
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return (2, 3, *module.normalized_shape)
    channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
    dims = (
        1 if isinstance(module, nn.BatchNorm1d | nn.InstanceNorm1d) else 3 if isinstance(module, nn.BatchNorm3d) else 2
    )
    return (2, channels, *(5, 4, 3)[:dims])


def _possible_eps(module: nn.Module) -> list[float]:
    held = [value for value in vars(module).values() if isinstance(value, float) and 0.0 < value < 0.1]
    return [*dict.fromkeys(held or _USUAL_EPS)]


def _agree(module: nn.Module, candidate: Recognized, shape: tuple[int, ...], own: Callable[..., Tensor | None]) -> bool:
    """Whether ours returns what the module does, to float32's rounding, and of 16 bits is as near to the truth. own:
    what the module itself computes, as `_result` tells."""
    for training, scale, dtype in itertools.product((False, True), _SCALES, _TYPES):
        with use_backend("torch"):  # a probe lies on the CPU
            found = _result(module, candidate.cls, candidate.attributes, shape, dtype, dtype, training, scale)
            given = own(shape, dtype, dtype, training, scale)
            truth = given if dtype == torch.float32 else own(shape, dtype, torch.float64, training, scale)
        if found is None or given is None or found.dtype != given.dtype or found.shape != given.shape:
            return False
        truth = given if truth is None else truth
        if _apart(found, truth) > max(_TYPES[dtype] * (1.0 + float(truth.abs().max())), 2 * _apart(given, truth)):
            return False
    return True


_TYPES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# At the second a variance is of the size of what is added to it, which a module may hold nowhere but in its forward.
_SCALES = (1.0, 1e-5)


def _apart(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def _result(
    module: nn.Module,
    cls: type[Replaced] | None,
    attributes: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    compute: torch.dtype,
    training: bool,
    scale: float,
) -> Tensor | None:
    """What a copy of the module, with other numbers of a type in it, computes from a probe; None where it does not.

    scale: of what a norm is taken of, be it the probe or a weight, and the squares of its running statistics.
    """
    try:
        tried: Any = copy.deepcopy(module).to("cpu", dtype).train(training)
        for hooks in (tried._forward_hooks, tried._forward_pre_hooks):
            hooks.clear()
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator) + 0.5).to(dtype)

        if cls is not None:
            replace(tried, cls, attributes)
        with torch.no_grad():
            for tensor in itertools.chain(tried.parameters(), tried.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(drawn(*tensor.shape))
            for buffer in tried.buffers():
                if buffer.is_floating_point():
                    buffer.mul_(scale**2)
            if may_standardize(tried):
                tried.weight.mul_(scale)
                scale = 1.0
            out = tried.to(compute)((scale * (3.0 * drawn(*shape) - 2.5)).to(compute))
    except Exception:  # somebody's module, of any kind, copied and given what it may not expect
        return None
    return out if isinstance(out, Tensor) else None


# --- activations ---------------------------------------------------------------------------------------------------

_LINE = torch.cat([torch.linspace(-40, 40, 161), torch.linspace(-4, 4, 97)]).double()


@functools.cache
def _curve(name: str) -> Tensor:
    return activate(_LINE, Activation(name))


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes, torch.nn's or another library's under a name of its own."""
    try:
        return resolve(module)
    except ValueError:
        pass
    if type(module).__module__.startswith("torch.nn") or next(iter(module.state_dict()), None) is not None:
        return None  # torch.nn's others, and what learns
    if any(module.children()) or isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        return None
    curves = []
    for training in (False, True):
        tried = copy.deepcopy(module).train(training)
        try:
            with torch.no_grad():
                curves.append(tried(_LINE.clone()))
        except Exception:  # somebody's module, of any kind, given what it may not expect
            return None
    for name in KNOWN:
        if all(_same_curve(curve, _curve(name)) for curve in curves):
            return Activation(name)
    return None


def _same_curve(curve: Any, known: Tensor) -> bool:
    return isinstance(curve, Tensor) and curve.shape == known.shape and torch.allclose(curve.to(known), known, 0, 1e-6)
