"""Copies of somebody's module, tried on a probe: whether one of ours computes the same, and which activation it is."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activation import KNOWN, Activation, resolve
from ..backend import use_backend
from ..fallback import activate
from .sites import Replaced, replace
from .state import own_fields, same_fields

Shape = tuple[int, ...]


class Probe(NamedTuple):
    """An input to try a module on, and how. compute: the type of it and of the parameters, which hold numbers of
    `dtype`; scale: of what a norm is taken of, be it the probe or a weight, and the squares of its running statistics;
    scales_weight: whether that is the weight."""

    shape: Shape
    dtype: torch.dtype
    compute: torch.dtype
    training: bool
    scale: float
    scales_weight: bool

    @property
    def learns(self) -> bool:
        """Whether gradients are compared: of rounded numbers they would differ by more than a mistake does."""
        return self.dtype == torch.float32 and self.scale == 1.0


_TYPES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# At the second a variance is of the size of what is added to it, which a module may hold nowhere but in its forward.
_SCALES = (1.0, 1e-5)


class Tried:
    """A module that ours are compared with; what it makes of a probe is found once."""

    def __init__(self, module: nn.Module, scales_weight: bool) -> None:
        self.module, self.scales_weight = module, scales_weight
        self._own = functools.cache(functools.partial(_result, module, None, {}))

    def agrees(self, cls: type[Replaced], attributes: Mapping[str, Any], shape: Shape) -> bool:
        """Whether ours makes of everything what the module does, to float32's rounding, and of 16 bits is as near to
        the truth."""
        ways = itertools.product((False, True), _SCALES, _TYPES)
        return all(self._agrees_on(cls, attributes, shape, *way) for way in ways)

    def agrees_at_a_glance(self, cls: type[Replaced], attributes: Mapping[str, Any], shape: Shape) -> bool:
        """The same of float32 numbers of a usual size alone."""
        ways = itertools.product((False, True), _SCALES[:1], [torch.float32])
        return all(self._agrees_on(cls, attributes, shape, *way) for way in ways)

    def _agrees_on(
        self,
        cls: type[Replaced],
        attributes: Mapping[str, Any],
        shape: Shape,
        training: bool,
        scale: float,
        dtype: torch.dtype,
    ) -> bool:
        probe = Probe(shape, dtype, dtype, training, scale, self.scales_weight)
        with use_backend("torch"):  # a probe lies on the CPU
            found = _result(self.module, cls, attributes, probe)
            given = self._own(probe)
            truth = given if dtype == torch.float32 else self._own(probe._replace(compute=torch.float64))
        if found is None or given is None or len(found) != len(given):
            return False
        truth = given if truth is None or len(truth) != len(given) else truth
        return all(map(functools.partial(_close, _TYPES[dtype]), found, given, truth))


def _close(tolerance: float, found: Tensor | None, given: Tensor | None, truth: Tensor | None) -> bool:
    if found is None or given is None or truth is None:
        return found is given
    if found.dtype != given.dtype or found.shape != given.shape:
        return False
    if given.numel() == 0:
        return True
    allowed = tolerance * (1.0 + truth.double().abs().max().item())
    return _apart(found, truth) <= max(allowed, 2 * _apart(given, truth))


def _apart(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def _result(
    module: nn.Module, cls: type[Replaced] | None, attributes: Mapping[str, Any], probe: Probe
) -> list[Tensor | None] | None:
    """What a copy of the module, with other numbers in it, makes of a probe; None where it makes nothing of it, or
    something of itself besides."""
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, device="cpu") + 0.5).to(probe.dtype)

    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            tried = _alone(module).to("cpu", probe.dtype).train(probe.training)
            if cls is not None:
                replace(tried, cls, attributes)
            scale = _fill(tried, probe, drawn)
            x = (scale * (3.0 * drawn(*probe.shape) - 2.5)).to(probe.compute).requires_grad_(probe.learns)
            tried = tried.to(probe.compute).requires_grad_(probe.learns)
            before = own_fields(tried)
            with torch.set_grad_enabled(probe.learns):
                out = tried(x.clone())  # which it may overwrite
            if not isinstance(out, Tensor) or not same_fields(own_fields(tried), before):
                return None
            learned = _gradients(out, [x, *tried.parameters()], drawn) if probe.learns else []
    except Exception:  # somebody's module, of any kind, copied and given what it may not expect
        return None
    return [out.detach(), *learned, *(buffer.detach() for buffer in tried.buffers())]


def _alone(module: nn.Module) -> nn.Module:
    """A copy to whose calls nobody listens."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return copied


def _fill(tried: Any, probe: Probe, drawn: Callable[..., Tensor]) -> float:
    """Gives a module numbers of the probe's scale, and returns what is left of it for the input."""
    with torch.no_grad():
        for tensor in itertools.chain(tried.parameters(), tried.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(drawn(*tensor.shape))
        for buffer in tried.buffers():
            if buffer.is_floating_point():
                buffer.mul_(probe.scale**2)
        if probe.scales_weight:
            tried.weight.mul_(probe.scale)
            return 1.0
    return probe.scale


def _gradients(out: Tensor, learning: Sequence[Tensor], drawn: Callable[..., Tensor]) -> list[Tensor | None]:
    if not out.requires_grad:
        return [None] * len(learning)
    return list(torch.autograd.grad(out, learning, drawn(*out.shape).to(out.dtype), allow_unused=True))


# --- activations ---------------------------------------------------------------------------------------------------

_LINE = torch.cat([torch.linspace(-40, 40, 161, device="cpu"), torch.linspace(-4, 4, 97, device="cpu")]).double()
_SMOOTH = ~torch.isin(_LINE, torch.tensor([-3.0, 0.0, 3.0, 6.0, 20.0], dtype=torch.float64, device="cpu"))


@functools.cache
def _curve(name: str) -> tuple[Tensor, Tensor]:
    return _with_slope(lambda line: activate(line, Activation(name)))


def _with_slope(function: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    """A function's values along the line, and its slope where no known one has a corner; None: nothing is learned."""
    line = _LINE.clone().requires_grad_()
    with torch.enable_grad():
        values = function(line.clone())
        learns = isinstance(values, Tensor) and values.requires_grad
        slope = torch.autograd.grad(values.sum(), line)[0][_SMOOTH] if learns else None
    return values.detach() if isinstance(values, Tensor) else values, slope


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes, torch.nn's or another library's under a name of its own."""
    try:
        return resolve(module)
    except ValueError:
        pass
    if type(module).__module__.startswith("torch.nn") or isinstance(module, torch.jit.ScriptModule):
        return None  # torch.nn's others
    if any(module.children()) or "forward" in vars(module):
        return None
    curves = []
    try:
        if next(iter(module.state_dict()), None) is not None:  # what learns
            return None
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            for training in (False, True):
                tried = _alone(module).train(training)
                before = own_fields(tried)
                curves.append(_with_slope(tried))
                if not same_fields(own_fields(tried), before):
                    return None
    except Exception:  # somebody's module, of any kind, given what it may not expect
        return None
    for name in KNOWN:
        if all(_same_curve(mine, known) for curve in curves for mine, known in zip(curve, _curve(name), strict=True)):
            return Activation(name)
    return None


def _same_curve(curve: Any, known: Tensor) -> bool:
    return isinstance(curve, Tensor) and curve.shape == known.shape and torch.allclose(curve.to(known), known, 0, 1e-6)
